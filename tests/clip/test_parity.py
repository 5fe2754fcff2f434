"""Our CLIP with converted weights has the features of open_clip's and transformers'."""

import dataclasses
import functools
import json
import warnings

import jax
import numpy as np
import pytest

from tests.checkpoints import hugging_face_config, open_clip_config
from tests.peers import import_open_clip, import_transformers
from vop_jax.clip.convert.pytorch import convert
from vop_jax.clip.model import PIXEL_MEAN, PIXEL_STD, Clip
from vop_jax.config.clip import PRESETS, ClipConfig

torch = pytest.importorskip("torch", reason="the peers are PyTorch models")

TOLERANCE = 1e-5  # of the largest difference between unit features
TINY = ClipConfig(24, 8, 32, 3, 2, 48, 2, 3, 20, context_length=19)
# Three of 27 pixels fill no patch; the MLPs have odd widths, as in ViT-g and bigG.
ODD = dataclasses.replace(TINY, image_size=27, activation="gelu", vision_mlp=140, text_mlp=200)
OPENAI_PIXELS = (PIXEL_MEAN, PIXEL_STD)
OTHER_PIXELS = ((0.5, 0.5, 0.4), (0.5, 0.25, 1.0))
LARGE = {"vision_layers": 4, "text_layers": 4}  # all of ViT-L/14 but its depth
PUBLISHED = {
    "ViT-B/32": PRESETS["ViT-B/32"],
    "ViT-B/16-gelu": dataclasses.replace(PRESETS["ViT-B/16"], activation="gelu"),
    "ViT-L/14-shallow": dataclasses.replace(PRESETS["ViT-L/14"], **LARGE),
    "ViT-L/14@336px-shallow-gelu": dataclasses.replace(
        PRESETS["ViT-L/14@336px"], activation="gelu", **LARGE
    ),
}
SIZES = [
    pytest.param(TINY, OPENAI_PIXELS, id="tiny"),
    pytest.param(ODD, OTHER_PIXELS, id="odd"),
    *(
        pytest.param(config, OPENAI_PIXELS, id=name, marks=pytest.mark.slow)
        for name, config in PUBLISHED.items()
    ),
]


def shake(model):
    """Random biases, scales and positions, which peers initialise to zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale" and (parameter.ndim == 1 or "position" in name):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def inputs(config, statistics):
    """uint8 [2, S, S, 3], the same normalised float [2, 3, S, S], and ids [3, T]."""
    rng = np.random.default_rng(0)
    # A few large areas of colour, noise on top: noise alone averages out over many patches.
    area = np.arange(config.image_size) * 4 // config.image_size
    colours = rng.integers(0, 192, (2, 4, 4, 3))[:, area][:, :, area]
    frames = (colours + rng.integers(0, 64, colours.shape)).astype(np.uint8)
    mean, std = np.array(statistics)
    pixels = (frames / 255 - mean) / std
    ids = np.zeros((3, config.context_length), np.int32)
    for row, length in zip(ids, (1, 7, config.context_length - 1), strict=True):
        row[1:length] = rng.integers(0, config.vocab_size - 2, length - 1)
        row[0], row[length] = config.vocab_size - 2, config.vocab_size - 1
    return frames, torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32), ids


@functools.cache
def program(config):
    return jax.jit(Clip(config).apply)


def assert_equal(path, config, frames, ids, *peers):
    """Converted, the file has the features of frames and captions that a peer has."""
    converted = convert(path)
    assert converted.config == config
    assert converted.notes == (), "the configs beside it state everything"
    features = program(config)({"params": converted.params}, frames, ids)
    for ours, peer in zip(features, peers, strict=True):
        unit = torch.nn.functional.normalize(peer.detach(), dim=-1).numpy()
        assert np.ptp(unit, axis=0).max() > 1000 * TOLERANCE, "inputs look alike to the peer"
        assert np.abs(ours - unit).max() <= TOLERANCE


@pytest.mark.parametrize(("config", "statistics"), SIZES)
def test_equals_open_clip(config, statistics, tmp_path):
    open_clip = import_open_clip()
    torch.manual_seed(0)
    mean, std = statistics
    stated = open_clip_config(config, mean=mean, std=std)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(stated))
    peer = shake(open_clip.model.CLIP(**stated["model_cfg"]))
    torch.save(peer.state_dict(), tmp_path / "open_clip.pt")
    frames, pixels, ids = inputs(config, statistics)
    theirs = peer.encode_image(pixels), peer.encode_text(torch.tensor(ids))
    assert_equal(tmp_path / "open_clip.pt", config, frames, ids, *theirs)


@pytest.mark.parametrize(("config", "statistics"), SIZES)
def test_equals_transformers(config, statistics, tmp_path):
    transformers = import_transformers()
    torch.manual_seed(0)
    mean, std = statistics
    preprocessor = {"image_mean": mean, "image_std": std, "crop_size": config.image_size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = transformers.CLIPConfig(**hugging_face_config(config))
        peer = shake(transformers.CLIPModel(settings))
        # config.json, and model.safetensors or, of the odd one, shards and their index
        peer.save_pretrained(tmp_path, max_shard_size="9MB" if config is ODD else "5GB")
    [source] = tmp_path.glob("model.safetensors*")
    frames, pixels, ids = inputs(config, statistics)
    # The towers, not `get_*_features`: what these return differs between versions.
    vision_out = peer.vision_model(pixel_values=pixels).pooler_output
    text_out = peer.text_model(input_ids=torch.tensor(ids).long()).pooler_output
    theirs = peer.visual_projection(vision_out), peer.text_projection(text_out)
    assert_equal(source, config, frames, ids, *theirs)
