"""Our CLIP with converted weights equals open_clip's and transformers' in every feature."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

from tests.peers import import_open_clip, import_transformers
from vop_jax.clip.config import PRESETS, ClipConfig
from vop_jax.clip.convert import convert
from vop_jax.clip.model import Clip
from vop_jax.clip.towers import PIXEL_MEAN, PIXEL_STD

torch = pytest.importorskip("torch", reason="the peers are PyTorch models")

TOLERANCE = 1e-5  # of the largest difference between unit features
TINY = ClipConfig(24, 8, 32, 3, 2, 48, 2, 3, 20, context_length=19, vocab_size=61)
LARGE = {"vision_layers": 4, "text_layers": 4}  # all of ViT-L/14 but its depth
PUBLISHED = [
    pytest.param(PRESETS["ViT-B/32"], id="ViT-B/32"),
    pytest.param(dataclasses.replace(PRESETS["ViT-B/16"], activation="gelu"), id="ViT-B/16-gelu"),
    pytest.param(dataclasses.replace(PRESETS["ViT-L/14"], **LARGE), id="ViT-L/14-shallow"),
    pytest.param(
        dataclasses.replace(PRESETS["ViT-L/14@336px"], activation="gelu", **LARGE),
        id="ViT-L/14@336px-shallow-gelu",
    ),
]
SIZES = [
    pytest.param(TINY, id="tiny"),
    pytest.param(dataclasses.replace(TINY, activation="gelu"), id="tiny-gelu"),
    *(pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) for p in PUBLISHED),
]


def shake(model):
    """Random biases, scales and positions, which peers initialise to zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale" and (parameter.ndim == 1 or "position" in name):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs(config):
    """uint8 [2, S, S, 3], the same normalised float [2, 3, S, S], and ids [3, T]."""
    rng = np.random.default_rng(0)
    # A few large areas of colour, noise on top: noise alone averages out over many patches.
    area = np.arange(config.image_size) * 4 // config.image_size
    colours = rng.integers(0, 192, (2, 4, 4, 3))[:, area][:, :, area]
    frames = (colours + rng.integers(0, 64, colours.shape)).astype(np.uint8)
    pixels = (frames / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
    ids = np.zeros((3, config.context_length), np.int32)
    for row, length in zip(ids, (1, 7, config.context_length - 1), strict=True):
        row[1:length] = rng.integers(0, config.vocab_size - 2, length - 1)
        row[0], row[length] = config.vocab_size - 2, config.vocab_size - 1
    return frames, torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32), ids


def ours(path, config, frames, ids):
    converted = convert(
        path,
        activation=config.activation,
        vision_heads=config.vision_heads,
        text_heads=config.text_heads,
    )
    assert converted.config == config
    image, text = jax.jit(Clip(config).apply)({"params": converted.params}, frames, ids)
    return np.asarray(image), np.asarray(text)


def largest_difference(features, peer):
    with torch.no_grad():
        unit = torch.nn.functional.normalize(peer, dim=-1).numpy()
    assert np.ptp(unit, axis=0).max() > 1000 * TOLERANCE, "inputs must not look alike to the peer"
    return np.abs(features - unit).max()


@pytest.mark.parametrize("config", SIZES)
def test_equals_open_clip(config, tmp_path):
    open_clip = import_open_clip()
    torch.manual_seed(0)
    vision = {
        "layers": config.vision_layers,
        "width": config.vision_width,
        "head_width": config.vision_width // config.vision_heads,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
    }
    text = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
    }
    peer = shake(
        open_clip.model.CLIP(
            config.embed_dim, vision, text, quick_gelu=config.activation == "quick_gelu"
        )
    )
    torch.save(peer.state_dict(), tmp_path / "open_clip.pt")
    frames, pixels, ids = inputs(config)
    image, caption = ours(tmp_path / "open_clip.pt", config, frames, ids)
    assert largest_difference(image, peer.encode_image(pixels)) <= TOLERANCE
    assert largest_difference(caption, peer.encode_text(torch.tensor(ids))) <= TOLERANCE


@pytest.mark.parametrize("config", SIZES)
def test_equals_transformers(config, tmp_path):
    transformers = import_transformers()
    torch.manual_seed(0)
    shared = {"hidden_act": config.activation, "projection_dim": config.embed_dim}
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        **shared,
    }
    eot = config.vocab_size - 1
    text = {
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "bos_token_id": eot - 1,
        "eos_token_id": eot,
        **shared,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = transformers.CLIPConfig(
            text_config=text, vision_config=vision, projection_dim=config.embed_dim
        )
        peer = shake(transformers.CLIPModel(settings))
        peer.save_pretrained(tmp_path)  # model.safetensors and config.json
    frames, pixels, ids = inputs(config)
    image, caption = ours(tmp_path / "model.safetensors", config, frames, ids)
    # The towers, not `get_*_features`: what these return differs between versions.
    vision_out = peer.vision_model(pixel_values=pixels).pooler_output
    text_out = peer.text_model(input_ids=torch.tensor(ids).long()).pooler_output
    assert largest_difference(image, peer.visual_projection(vision_out)) <= TOLERANCE
    assert largest_difference(caption, peer.text_projection(text_out)) <= TOLERANCE
