"""Every key of other people's configs is used, known to be without effect, or refused by name."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import checkpoints
from tests.checkpoints import SIZES
from vop_jax.clip.convert import layouts
from vop_jax.clip.convert.pytorch import choose_heads, fold_pixels
from vop_jax.clip.convert.source_config import SourceConfig, read_config
from vop_jax.clip.convert.source_keys import PUBLISHED_HEADS
from vop_jax.clip.model import PIXEL_MEAN, PIXEL_STD, Clip, patches
from vop_jax.clip.weights import parameter_shapes
from vop_jax.errors import UserError
from vop_jax.storage.tensors import unflatten

OPEN_CLIP = layouts.OPENAI, "open_clip_config.json", checkpoints.open_clip_config(SIZES)
HUGGING_FACE = layouts.HUGGING_FACE, "config.json", checkpoints.hugging_face_config(SIZES)
# What tensors show: not the heads.
FOUND = {k: v for k, v in SIZES.to_dict().items() if not k.endswith("heads")}
FOUND |= {"vision_mlp": 512, "text_mlp": 40}
HALF = ((0.5,) * 3, (0.5,) * 3)
CLIPS = (PIXEL_MEAN, PIXEL_STD)
PREPROCESSOR = {
    "crop_size": {"height": 24, "width": 24},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [*PIXEL_MEAN],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [*PIXEL_STD],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 24},
}


def changed(config, changes):
    """A copy with other values at dotted keys."""
    config = json.loads(json.dumps(config))
    for key, value in changes.items():
        *sections, last = key.split(".")
        inner = config
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return config


def read(folder, kind, changes, preprocessor=None):
    """The facts of a folder with a config of `kind` and `changes` to it."""
    layout, name, config = kind
    (folder / name).write_text(json.dumps(changed(config, changes)))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    facts = read_config(folder / "model.safetensors", layout)
    facts.check_sizes("model.safetensors", FOUND)
    return facts


@pytest.mark.parametrize("kind", [OPEN_CLIP, HUGGING_FACE], ids=["open_clip", "hugging_face"])
def test_a_config_states_activation_and_heads(kind, tmp_path):
    facts = read(tmp_path, kind, {})
    assert (facts.activation, facts.vision_heads, facts.text_heads) == ("quick_gelu", 2, 1)
    assert facts.pixels == (CLIPS if kind is OPEN_CLIP else None)
    assert facts.notes == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_cfg.quick_gelu": False}, {"activation": "gelu"}),
        ({"model_cfg.custom_text": True, "model_cfg.vision_cfg.patch_dropout": 0.5}, {}),
        ({"model_cfg.vision_cfg.output_tokens": True}, {}),
        ({"model_cfg.vision_cfg.image_size": [24, 24]}, {}),
        ({"model_cfg.text_cfg.norm_kwargs": {"eps": 1e-5}, "model_cfg.init_logit_bias": None}, {}),
        ({"model_cfg.vision_cfg.act_kwargs": {}}, {}),
        ({"preprocess_cfg": {"mean": 0.5, "std": [0.5, 0.5, 0.5]}}, {"pixels": HALF}),
        ({"preprocess_cfg": {"size": [24, 24], "interpolation": "bicubic"}}, {}),
        ({"preprocess_cfg": {"size": None, "mean": None}}, {}),
    ],
)
def test_an_open_clip_config_that_converts(changes, expected, tmp_path):
    facts = read(tmp_path, OPEN_CLIP, changes)
    stated = {"activation": "quick_gelu", "pixels": CLIPS, "vision_heads": 2} | expected
    assert {key: getattr(facts, key) for key in stated} == stated
    assert facts.notes == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_cfg.embed_dim", 21),
        ("model_cfg.quick_gelu", "false"),
        ("model_cfg.init_logit_bias", -10),
        ("model_cfg.multimodal_cfg", {"width": 512}),
        ("model_cfg.vision_cfg.layers", [3, 4, 6, 3]),
        ("model_cfg.vision_cfg.layers", 4),
        ("model_cfg.vision_cfg.width", 192),
        ("model_cfg.vision_cfg.image_size", [24, 32]),
        ("model_cfg.vision_cfg.mlp_ratio", 4.3637),
        ("model_cfg.vision_cfg.timm_model_name", "convnext_base"),
        ("model_cfg.vision_cfg.eva_model_name", "eva-clip-b-16"),
        ("model_cfg.vision_cfg.pool_type", "avg"),
        ("model_cfg.vision_cfg.global_average_pool", True),
        ("model_cfg.vision_cfg.attentional_pool", True),
        ("model_cfg.vision_cfg.no_ln_pre", True),
        ("model_cfg.vision_cfg.ls_init_value", 1e-4),
        ("model_cfg.vision_cfg.act_kwargs", {"approximate": "tanh"}),
        ("model_cfg.vision_cfg.norm_kwargs", {"eps": 1e-6}),
        ("model_cfg.vision_cfg.pos_embed_type", "sin_cos_2d"),
        ("model_cfg.vision_cfg.qk_norm", True),
        ("model_cfg.text_cfg.hf_model_name", "roberta-base"),
        ("model_cfg.text_cfg.hf_tokenizer_name", "bert-base-uncased"),
        ("model_cfg.text_cfg.tokenizer_kwargs", {"clean": "canonicalize"}),
        ("model_cfg.text_cfg.no_causal_mask", True),
        *(("model_cfg.text_cfg.pool_type", kind) for kind in ("last", "first", "eos")),
        ("model_cfg.text_cfg.norm_kwargs", {"eps": 1e-6}),
        ("model_cfg.text_cfg.proj_type", "none"),
        ("model_cfg.text_cfg.context_length", 77),
        ("preprocess_cfg.std", 0),
        ("preprocess_cfg.mean", [0.5, 0.5]),
        ("preprocess_cfg.size", 336),
        ("preprocess_cfg.gamma", 2),
        ("rope", True),
        ("quick_gelu", True),  # open_clip reads it in model_cfg alone
    ],
)
def test_an_open_clip_config_of_another_model_is_refused(key, value, tmp_path):
    name = key.removeprefix("model_cfg.").replace("preprocess_cfg.", "").replace("std", "pixel std")
    with pytest.raises(UserError, match=rf"open_clip_config\.json: .*{name.split('.')[-1]}"):
        read(tmp_path, OPEN_CLIP, {key: value})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text_config.eos_token_id": 2, "text_config.projection_dim": 512}, {}),
        ({"torch_dtype": "float16", "vision_config.top_k": 50, "architectures": ["CLIPModel"]}, {}),
        ({"text_config_dict": None, "vision_config_dict": None}, {}),
        (
            {
                "text_config_dict": {**HUGGING_FACE[2]["text_config"], "num_attention_heads": 5},
                "text_config.num_attention_heads": 2,
            },
            {"text_heads": 5},
        ),
        (
            {f"{tower}_config.hidden_act": "gelu" for tower in ("text", "vision")},
            {"activation": "gelu"},
        ),
    ],
)
def test_a_hugging_face_config_that_converts(changes, expected, tmp_path):
    facts = read(tmp_path, HUGGING_FACE, changes)
    stated = {"activation": "quick_gelu", "text_heads": 1, "pixels": None} | expected
    assert {key: getattr(facts, key) for key in stated} == stated


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "siglip"}, "model_type='siglip'"),
        ({"model_type": "chinese_clip"}, "model_type"),
        ({"vision_config.model_type": "siglip_vision_model"}, r"vision_config\.model_type"),
        ({"projection_dim": 512}, "projection_dim=512, but the tensors of .* have 20"),
        ({"text_config.hidden_act": "gelu"}, r"text_config\.hidden_act='gelu'"),
        ({"vision_config.hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"vision_config.layer_norm_eps": 1e-6}, r"vision_config\.layer_norm_eps=1e-06"),
        ({"vision_config.intermediate_size": 600}, "intermediate_size=600"),
        ({"vision_config.num_channels": 4}, "num_channels=4"),
        ({"vision_config.num_attention_heads": "4"}, "num_attention_heads='4'"),
        ({"text_config.num_attention_heads": 4.0}, r"num_attention_heads=4\.0"),
        ({"text_config.eos_token_id": 7}, "eos_token_id=7: .* allowed are 49407 and 2"),
        ({"text_config.vocab_size": 901629}, "vocab_size=901629, but the tensors of .* have 49408"),
        ({"hidden_act": "gelu", "model_type": "clip_vision_model"}, "model_type='clip_vision_mod"),
        ({"text_config_dict": {}}, r"text_config\.hidden_size=512"),  # transformers' defaults
        ({"quantization_config": {"bits": 8}}, "unknown key quantization_config"),
        ({"vision_config.use_head": False}, r"unknown key vision_config\.use_head=False"),
        ({"vision_config": 3}, "vision_config is 3"),
    ],
)
def test_a_hugging_face_config_of_another_model_is_refused(changes, named, tmp_path):
    with pytest.raises(UserError, match=rf"config\.json: .*{named}"):
        read(tmp_path, HUGGING_FACE, changes)


@pytest.mark.parametrize("kind", [OPEN_CLIP, HUGGING_FACE], ids=["open_clip", "hugging_face"])
@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"model_cfg": 3, "vision_config": 3}', "\xff"]
)
def test_a_broken_config_is_refused(kind, text, tmp_path):
    (tmp_path / kind[1]).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=rf"{kind[1]}: "):
        read_config(tmp_path / "model.safetensors", kind[0])


@pytest.mark.parametrize(
    ("changes", "pixels", "notes"),
    [
        ({}, CLIPS, []),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, HALF, []),
        ({"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3), []),
        ({"size": 24, "crop_size": 24}, CLIPS, []),
        ({"resample": 2}, CLIPS, ["resample=2"]),
        ({"size": {"height": 24, "width": 24}, "do_center_crop": False}, CLIPS, ["do_center_crop"]),
        ({"size": {"shortest_edge": 28}}, CLIPS, ["size="]),
    ],
)
def test_a_preprocessor_config(changes, pixels, notes, tmp_path):
    facts = read(tmp_path, HUGGING_FACE, {}, PREPROCESSOR | changes)
    assert facts.pixels == pixels
    assert len(facts.notes) == len(notes)
    assert all(part in note for part, note in zip(notes, facts.notes, strict=True))
    another = {"image_mean": [0.1] * 3, "resample": 0}  # transformers does not read it then
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(another))
    both = {"image_processor": PREPROCESSOR | changes, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    again = read(tmp_path, HUGGING_FACE, {})
    assert (again.pixels, len(again.notes)) == (pixels, len(notes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"crop_size": {"height": 336, "width": 336}}, "crop_size=336"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"do_rescale": False}, "do_rescale"),
        ({"image_std": [0.5, 0.0, 0.5]}, "pixel std"),
        ({"do_tile": True}, "unknown key do_tile"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": None}, "a ViTImageProcessor"),
    ],
)
def test_a_preprocessor_config_of_another_model_is_refused(changes, named, tmp_path):
    with pytest.raises(UserError, match=rf"preprocessor_config\.json: .*{named}"):
        read(tmp_path, HUGGING_FACE, {}, PREPROCESSOR | changes)


def test_other_pixel_statistics_are_folded_in_exactly():
    rng = np.random.default_rng(0)
    config, frames = SIZES, rng.integers(0, 256, (2, 24, 24, 3), np.uint8)
    shapes = parameter_shapes(config)
    params = unflatten({name: 0.1 * rng.standard_normal(shapes[name]) for name in shapes})
    params = jax.tree.map(np.float32, params)
    mean, std = (0.1, 0.5, 0.7), (0.2, 1.0, 0.5)
    visual = params["visual"]
    pixels = (frames / 255 - mean) / std
    kernel = visual["conv1"]["kernel"].astype(np.float64).reshape(-1, config.vision_width)
    expected = np.asarray(patches(jnp.asarray(pixels), 8)) @ kernel
    expected += visual["positional_embedding"][1:]
    cls = visual["class_embedding"] + visual["positional_embedding"][0]
    fold_pixels(params, (mean, std))
    found = Clip(config).apply({"params": params}, frames, method=lambda m, x: m.visual.embed(x))
    np.testing.assert_allclose(found[:, 1:], expected, atol=2e-6)
    np.testing.assert_allclose(found[:, 0], np.broadcast_to(cls, found[:, 0].shape), atol=1e-6)
    kept = jax.tree.map(np.copy, params)
    fold_pixels(params, CLIPS)
    jax.tree.map(np.testing.assert_array_equal, params, kept)


@pytest.mark.parametrize(
    ("tower", "width", "asked", "heads"),
    [("vision", 1280, None, 16), ("text", 1280, None, 20), ("vision", 1280, 20, 20)],
)
def test_heads_that_are_assumed_are_said(tower, width, asked, heads):
    found, note = choose_heads("x.pt", tower, width, asked, SourceConfig())
    assert found == heads
    assert bool(note) == (asked is None) and (asked or f"--{tower}-heads" in note)


def test_heads_that_nothing_states_are_asked_for():
    with pytest.raises(UserError, match="width, 128; pass --vision-heads"):
        choose_heads("x.pt", "vision", 128, None, SourceConfig())
    with pytest.raises(UserError, match="128 cannot be divided into 3 heads"):
        choose_heads("x.pt", "vision", 128, 3, SourceConfig())
    with pytest.raises(UserError, match=r"^c\.json: .*128 cannot be divided into 0 heads; correct"):
        choose_heads("x.pt", "vision", 128, None, SourceConfig("c.json", vision_heads=0))
    with pytest.raises(UserError, match=r"--text-heads=4 contradicts c\.json, which states 8"):
        choose_heads("x.pt", "text", 128, 4, SourceConfig("c.json", text_heads=8))


# Of open_clip's own list, those that are a CLIP as ours.
CONVERTIBLE = """
ViT-B-16 ViT-B-16-plus ViT-B-16-plus-240 ViT-B-16-quickgelu ViT-B-32 ViT-B-32-256
ViT-B-32-plus-256 ViT-B-32-quickgelu ViT-H-14 ViT-H-14-378 ViT-H-14-378-quickgelu
ViT-H-14-quickgelu ViT-H-16 ViT-L-14 ViT-L-14-280 ViT-L-14-336 ViT-L-14-336-quickgelu
ViT-L-14-quickgelu ViT-L-16 ViT-L-16-320 ViT-M-16 ViT-M-32 ViT-M-32-alt ViT-S-16 ViT-S-16-alt
ViT-S-32 ViT-S-32-alt ViT-bigG-14 ViT-bigG-14-quickgelu ViT-e-14 ViT-g-14
"""
MLPS = {"ViT-g-14": (6144, 4096), "ViT-bigG-14": (8192, 5120), "ViT-B-32": (3072, 2048)}


def test_every_published_config_converts_or_is_refused_by_a_key(tmp_path):
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed: it has the configs")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "model_configs"
    files = {file.stem: file.read_text() for file in folder.glob("*.json")}
    assert len(files) > 100
    converted = set()
    for name, text in files.items():
        (tmp_path / "open_clip_config.json").write_text(text)
        config = json.loads(text)
        try:
            facts = read_config(tmp_path / "open_clip_model.safetensors", layouts.OPENAI)
        except UserError as error:
            keys = {*config, *config["vision_cfg"], *config["text_cfg"]}
            assert any(f"{key}=" in str(error) for key in keys), (name, error)
            continue
        converted.add(name)
        sizes = {size.field: size.value for size in facts.sizes}
        heads = facts.vision_heads, facts.text_heads
        for tower, found in zip(("vision", "text"), heads, strict=True):
            assert PUBLISHED_HEADS[tower][sizes[f"{tower}_width"]] == found, name
        if name in MLPS:
            assert (sizes["vision_mlp"], sizes["text_mlp"]) == MLPS[name]
        assert facts.activation == ("quick_gelu" if config.get("quick_gelu") else "gelu")
        assert facts.pixels is None, "the model's part alone says nothing of them"
    assert converted == set(CONVERTIBLE.split())
