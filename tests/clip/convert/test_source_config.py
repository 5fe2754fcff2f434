"""Every key of other people's configs is used, known to be without effect, or refused by name."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from tests import checkpoints, reference_methods
from tests.checkpoints import SIZES
from tests.reference_methods import Reference
from vop_jax.clip.convert import layouts
from vop_jax.clip.convert.pytorch import complete_config, fold_pixels
from vop_jax.clip.convert.source_config import SourceConfig, read_config
from vop_jax.clip.convert.source_keys import PUBLISHED_HEADS
from vop_jax.clip.model import PIXEL_MEAN, PIXEL_STD
from vop_jax.errors import UserError
from vop_jax.storage.tensors import fingerprint, flatten, unflatten
from vop_jax.tuning.methods import MethodConfig

OPEN_CLIP = layouts.OPENAI, "open_clip_config.json", checkpoints.open_clip_config(SIZES)
HUGGING_FACE = layouts.HUGGING_FACE, "config.json", checkpoints.hugging_face_config(SIZES)
# The sizes that tensors show: not the heads.
SHOWN = {k: v for k, v in SIZES.to_dict().items() if not k.endswith("heads")}
SHOWN |= {"vision_mlp": 512, "text_mlp": 40}
HALF = ((0.5,) * 3, (0.5,) * 3)
OPENAI_PIXELS = (PIXEL_MEAN, PIXEL_STD)
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
    """The source config of a folder with a config of `kind` and `changes` to it."""
    layout, name, config = kind
    (folder / name).write_text(json.dumps(changed(config, changes)))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    source = read_config(folder / "model.safetensors", layout)
    source.check_sizes("model.safetensors", SHOWN)
    return source


TEXT = HUGGING_FACE[2]["text_config"]
ACTS = ("text_config.hidden_act", "vision_config.hidden_act")


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        (OPEN_CLIP, {}, {}),
        (OPEN_CLIP, {"model_cfg.quick_gelu": False}, {"activation": "gelu"}),
        (OPEN_CLIP, {"model_cfg.custom_text": True}, {}),
        (OPEN_CLIP, {"model_cfg.vision_cfg.image_size": [24, 24]}, {}),
        (OPEN_CLIP, {"model_cfg.text_cfg.norm_kwargs": {"eps": 1e-5}}, {}),
        (OPEN_CLIP, {"model_cfg.vision_cfg.act_kwargs": {}, "model_cfg.init_logit_bias": None}, {}),
        (OPEN_CLIP, {"preprocess_cfg": {"mean": 0.5, "std": [0.5, 0.5, 0.5]}}, {"pixels": HALF}),
        (OPEN_CLIP, {"preprocess_cfg": {"size": [24, 24], "interpolation": "bicubic"}}, {}),
        (OPEN_CLIP, {"preprocess_cfg": {"size": None, "mean": None}}, {}),
        (HUGGING_FACE, {}, {}),
        (HUGGING_FACE, {"text_config.eos_token_id": 2, "text_config.projection_dim": 512}, {}),
        (HUGGING_FACE, {"torch_dtype": "float16", "vision_config.top_k": 50}, {}),
        (HUGGING_FACE, {"text_config_dict": None, "vision_config_dict": None}, {}),
        (HUGGING_FACE, {"text_config_dict": TEXT | {"num_attention_heads": 5}}, {"text_heads": 5}),
        (HUGGING_FACE, dict.fromkeys(ACTS, "gelu"), {"activation": "gelu"}),
    ],
)
def test_a_config_that_converts(kind, changes, expected, tmp_path):
    source = read(tmp_path, kind, changes)
    pixels = OPENAI_PIXELS if kind is OPEN_CLIP else None
    stated = {"activation": "quick_gelu", "vision_heads": 2, "text_heads": 1, "pixels": pixels}
    stated |= expected
    assert {key: getattr(source, key) for key in stated} == stated
    assert source.notes == ()


REFUSED = {
    "open_clip_config.json": [
        ({"model_cfg.embed_dim": 21}, "embed_dim=21, but the tensors of .* have 20"),
        ({"model_cfg.quick_gelu": "false"}, "quick_gelu='false'"),
        ({"model_cfg.multimodal_cfg": {"width": 512}}, "unknown key multimodal_cfg"),
        ({"model_cfg.vision_cfg.layers": [3, 4, 6, 3]}, "layers=.*not a whole number"),
        ({"model_cfg.vision_cfg.image_size": [24, 32]}, "image_size"),
        ({"model_cfg.vision_cfg.mlp_ratio": 4.3637}, "mlp_ratio"),
        ({"model_cfg.vision_cfg.pool_type": "avg"}, "pool_type='avg': not supported; .* 'tok'"),
        ({"model_cfg.vision_cfg.act_kwargs": {"approximate": "tanh"}}, "act_kwargs"),
        ({"preprocess_cfg.std": 0}, "pixel std"),
        ({"preprocess_cfg.mean": [0.5, 0.5]}, "pixel mean"),
        ({"preprocess_cfg.size": 336}, "size=336"),
        ({"quick_gelu": True}, "quick_gelu"),  # open_clip reads it in model_cfg only
    ],
    "config.json": [
        ({"model_type": "siglip"}, "model_type='siglip'"),
        ({"projection_dim": 512}, "projection_dim=512, but the tensors of .* have 20"),
        ({"text_config.hidden_act": "gelu"}, r"text_config\.hidden_act='gelu'"),
        ({"vision_config.hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"vision_config.layer_norm_eps": 1e-6}, r"vision_config\.layer_norm_eps=1e-06"),
        ({"vision_config.num_attention_heads": "4"}, "num_attention_heads='4'"),
        ({"text_config.num_attention_heads": 4.0}, r"num_attention_heads=4\.0"),
        ({"text_config.eos_token_id": 7}, "eos_token_id=7: .* allowed are 49407 and 2"),
        ({"text_config_dict": {}}, r"text_config\.hidden_size=512"),  # transformers' defaults
        ({"vision_config.use_head": False}, r"unknown key vision_config\.use_head=False"),
        ({"vision_config": 3}, "vision_config is 3"),
    ],
    "preprocessor_config.json": [
        ({"crop_size": {"height": 336, "width": 336}}, "crop_size=336"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"do_rescale": False}, "do_rescale"),
        ({"image_std": [0.5, 0.0, 0.5]}, "pixel std"),
        ({"do_tile": True}, "unknown key do_tile"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": None}, "a ViTImageProcessor"),
    ],
}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [(name, *row) for name, rows in REFUSED.items() for row in rows],
)
def test_a_config_of_another_model_is_refused(name, changes, message, tmp_path):
    with pytest.raises(UserError, match=rf"/{name}: .*{message}"):
        if name == "preprocessor_config.json":
            read(tmp_path, HUGGING_FACE, {}, PREPROCESSOR | changes)
        else:
            read(tmp_path, OPEN_CLIP if name == OPEN_CLIP[1] else HUGGING_FACE, changes)


@pytest.mark.parametrize("kind", [OPEN_CLIP, HUGGING_FACE], ids=["open_clip", "hugging_face"])
@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": 3, "vision_config": 3}', "\xff"])
def test_a_broken_config_is_refused(kind, text, tmp_path):
    (tmp_path / kind[1]).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=rf"{kind[1]}: "):
        read_config(tmp_path / "model.safetensors", kind[0])


@pytest.mark.parametrize(
    ("changes", "pixels", "notes"),
    [
        ({}, OPENAI_PIXELS, []),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, HALF, []),
        ({"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3), []),
        ({"size": 24, "crop_size": 24}, OPENAI_PIXELS, []),
        ({"resample": 2, "do_center_crop": False}, OPENAI_PIXELS, ["do_center_crop", "resample=2"]),
        ({"size": {"shortest_edge": 28}}, OPENAI_PIXELS, ["size="]),
    ],
)
def test_a_preprocessor_config(changes, pixels, notes, tmp_path):
    source = read(tmp_path, HUGGING_FACE, {}, PREPROCESSOR | changes)
    assert source.pixels == pixels
    assert all(key in note for key, note in zip(notes, source.notes, strict=True))
    other = {"image_mean": [0.1] * 3, "resample": 0}  # transformers does not read it then
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(other))
    both = {"image_processor": PREPROCESSOR | changes, "processor_class": "CLIPProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    again = read(tmp_path, HUGGING_FACE, {})
    assert (again.pixels, len(again.notes)) == (pixels, len(notes))


def test_other_pixel_statistics_are_folded_in_exactly(monkeypatch):
    """The reference has the same features with them and, after folding, with OpenAI's."""
    params, depth = checkpoints.random_params(SIZES), {"visual": SIZES.vision_layers, "text": 0}
    frames = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)

    def features(flat):
        clip = {f"clip/{name}": leaf for name, leaf in flat.items()}
        return Reference(clip, MethodConfig("zero_shot"), depth, SIZES.patch_size).frames(frames)

    tree = unflatten(params)
    fold_pixels(tree, OPENAI_PIXELS)
    assert fingerprint(tree) == fingerprint(params)
    mean, std = (0.1, 0.5, 0.7), (0.2, 1.0, 0.5)
    fold_pixels(tree, (mean, std))
    folded = features(flatten(tree))
    assert np.abs(folded - features(params)).max() > 1e-3
    monkeypatch.setattr(reference_methods, "PIXEL_MEAN", np.array(mean))
    monkeypatch.setattr(reference_methods, "PIXEL_STD", np.array(std))
    np.testing.assert_allclose(folded, features(params), atol=1e-6)


ARGUMENTS = {"activation": None, "vision_heads": None, "text_heads": None}


def test_heads_of_published_widths_are_assumed_with_a_note():
    sizes = SHOWN | {"vision_width": 1280, "text_width": 1280}
    config, notes = complete_config("x.pt", sizes, SourceConfig(), ARGUMENTS)
    assert (config.vision_heads, config.text_heads) == (16, 20)
    for part in ("--activation=gelu", "pixel mean", "16 are assumed", "--text-heads changes them"):
        assert any(part in note for note in notes)
    known = SourceConfig("c.json", (), "gelu", None, 10, HALF)
    config, notes = complete_config("x.pt", sizes, known, ARGUMENTS | {"vision_heads": 20})
    assert (config.activation, config.vision_heads, config.text_heads) == ("gelu", 20, 10)
    assert notes == []


@pytest.mark.parametrize(
    ("arguments", "stated", "message"),
    [
        ({}, {}, "x.pt: nothing .* width, 128; pass --vision-heads"),
        ({"vision_heads": 3}, {}, "x.pt: .*128 cannot be divided into 3 heads; .*--vision-heads"),
        ({}, {"vision_heads": 0}, r"^c\.json: .*into 0 heads; correct the file"),
        ({"text_heads": 4}, {"text_heads": 8}, r"--text-heads=4 contradicts c\.json, .* states 8"),
        ({"activation": "gelu"}, {"activation": "quick_gelu"}, "--activation=gelu contradicts"),
    ],
)
def test_wrong_or_unknown_values_are_refused(arguments, stated, message):
    with pytest.raises(UserError, match=message):
        complete_config("x.pt", SHOWN, SourceConfig("c.json", **stated), ARGUMENTS | arguments)


def test_every_published_config_converts_or_is_refused_by_a_key(tmp_path):
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed: it has the configs")
    folder = pathlib.Path(spec.submodule_search_locations[0]) / "model_configs"
    files = {file.stem: file.read_text() for file in folder.glob("*.json")}
    assert len(files) > 100
    converted = 0
    for name, text in files.items():
        (tmp_path / "open_clip_config.json").write_text(text)
        config = json.loads(text)
        try:
            source = read_config(tmp_path / "open_clip_model.safetensors", layouts.OPENAI)
        except UserError as error:
            keys = {*config, *config["vision_cfg"], *config["text_cfg"]}
            assert any(f"{key}=" in str(error) for key in keys), (name, error)
            continue
        converted += 1
        sizes = {size.field: size.value for size in source.sizes}
        heads = source.vision_heads, source.text_heads
        for tower, count in zip(("vision", "text"), heads, strict=True):
            assert PUBLISHED_HEADS[tower][sizes[f"{tower}_width"]] == count, name
        assert source.activation == ("quick_gelu" if config.get("quick_gelu") else "gelu")
        assert source.pixels is None, "the model's part does not state them"
    assert converted == 31, "configs of a CLIP of this package"
