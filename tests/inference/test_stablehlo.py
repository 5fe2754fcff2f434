"""Exported programs, their weights and their README."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vop_jax.clip.weights import cast_frozen
from vop_jax.inference.stablehlo import README, make_program, save_encoders
from vop_jax.storage.tensors import flatten
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.video.crops import eval_crop

pytest.importorskip("flatbuffers", reason="with which jax writes programs")

SIZES = {"visual_prompts": 2, "text_prefix": 1, "text_suffix": 1, "specific_prompts": 1}
ABOUT = {"method": "vop", "clip": "a tiny CLIP"}


def make_model(name="vop", dtype=jnp.float32):
    """(model, its parameters)."""
    model, params = tiny.model_and_params(MethodConfig(name, frames=tiny.FRAMES, **SIZES))
    return model.clone(dtype=dtype), params | cast_frozen({"clip": params["clip"]}, dtype)


def export_encoder(model, params, name, rows):
    """(program, weights) of an encoder for any number of rows like these."""
    shape = (*jax.export.symbolic_shape("b"), *rows.shape[1:])
    return make_program(model, name, params, jax.ShapeDtypeStruct(shape, rows.dtype))


@pytest.mark.parametrize("name", ["adapter_ffn", "vop_f+c"])
def test_each_program_has_the_weights_of_its_own_tower(name):
    model, params = make_model(name)
    frames, ids = model.example()
    _, video = export_encoder(model, params, "encode_video", frames)
    _, text = export_encoder(model, params, "encode_text", ids)
    assert not {*video} & {*text}
    assert {n.split("/")[1] for n in video if n.startswith("clip/")} == {"visual"}
    assert {n.split("/")[1] for n in text if n.startswith("clip/")} == {"text"}
    added = {n for n in {*video, *text} if not n.startswith("clip/")}
    assert bool(added) == (METHODS[name].prompts or bool(METHODS[name].adapter))


def test_bfloat16_weights_travel_as_bits_and_give_the_same_vectors():
    model, params = make_model(dtype=jnp.bfloat16)
    ids = tiny.captions(2, model.method.text_slots(tiny.CLIP))
    program, weights = export_encoder(model, params, "encode_text", ids)
    assert {str(leaf.dtype) for leaf in weights.values()} == {"uint16", "float32"}
    assert sum(w.nbytes for w in weights.values()) < 0.7 * 4 * sum(w.size for w in weights.values())
    encode = jax.jit(lambda p, rows: model.apply({"params": p}, rows, method="encode_text"))
    ours = encode(params, ids)
    theirs = np.asarray(jax.jit(jax.export.deserialize(program).call)(weights, ids))
    assert theirs.dtype == np.float32
    assert (theirs * np.asarray(ours)).sum(axis=1).min() > 0.999


def test_an_existing_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def program(model, name, params, rows):
        return bytearray(b"program"), flatten(params["prompts"])

    def export(name):
        save_encoders(tmp_path / "e", *make_model(name), ABOUT)

    monkeypatch.setattr("vop_jax.inference.stablehlo.make_program", program)
    export("vop")
    before = {f.name: f.read_bytes() for f in (tmp_path / "e").iterdir()}
    assert set(before) == {
        *("video.stablehlo", "video.npz", "text.stablehlo", "text.npz"),
        *("meta.json", "tokenizer.json", "README.md"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            export("vop_p")
    assert {f.name: f.read_bytes() for f in (tmp_path / "e").iterdir()} == before
    export("vop_p")
    assert (tmp_path / "e/video.npz").read_bytes() != before["video.npz"]
    assert [f.name for f in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (9, 12), (16, 16), (16, 31)])
def test_the_readme_crops_as_we_do(shape):
    readme = README.safe_substitute(image_size=16)
    code = re.search(r"def cropped.*?\n\n\n", readme, re.DOTALL)[0]
    names = {"np": np}
    exec(code, names)
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    cropped = names["cropped"](Image.fromarray(frame))
    np.testing.assert_array_equal(cropped, eval_crop(frame[None], 16)[0])
