"""Exported programs, their weights and their README."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import readers, tiny
from vop_jax.clip.weights import cast_frozen
from vop_jax.inference.stablehlo import README, save_encoders
from vop_jax.storage.tensors import flatten
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.video.crops import eval_crop

pytest.importorskip("flatbuffers", reason="with which jax writes programs")

SIZES = {"visual_prompts": 2, "text_prefix": 1, "text_suffix": 1, "specific_prompts": 1}
ABOUT = {"method": "vop", "clip": "a tiny CLIP"}


def exported(folder, name="vop", dtype=jnp.float32):
    """(model, params) whose encoders are in the folder."""
    model, params = tiny.model_and_params(MethodConfig(name, frames=tiny.FRAMES, **SIZES))
    model = model.clone(dtype=dtype)
    params = params | cast_frozen({"clip": params["clip"]}, dtype)
    save_encoders(folder, model, params, ABOUT)
    return model, params


@pytest.mark.parametrize("name", ["zero_shot", "adapter_ffn", "vop_f+c"])
def test_each_program_takes_its_own_tower(tmp_path, name):
    exported(tmp_path / "e", name)
    video, text = (np.load(tmp_path / f"e/{tower}.npz").files for tower in ("video", "text"))
    assert not {*video} & {*text}
    assert {n.split("/")[1] for n in video if n.startswith("clip/")} == {"visual"}
    assert {n.split("/")[1] for n in text if n.startswith("clip/")} == {"text"}
    added = {n for n in {*video, *text} if not n.startswith("clip/")}
    assert bool(added) == (METHODS[name].prompts or bool(METHODS[name].adapter))


def test_bfloat16_weights_take_half_the_space_and_give_the_same_vectors(tmp_path):
    model, params = exported(tmp_path / "half", dtype=jnp.bfloat16)
    size = sum((tmp_path / "half" / f"{tower}.npz").stat().st_size for tower in ("video", "text"))
    assert size < 0.7 * sum(leaf.size * 4 for leaf in flatten(params).values())
    ids = tiny.captions(2, model.method.text_slots(tiny.CLIP))
    ours = model.apply({"params": params}, ids, method="encode_text")
    [theirs] = readers.embed(tmp_path / "half", tmp_path, text=[ids])["text"]
    assert theirs.dtype == np.float32
    assert (theirs * np.asarray(ours)).sum(axis=1).min() > 0.999


def test_an_existing_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def program(model, name, params, rows):
        return bytearray(b"program"), flatten(params["prompts"])

    monkeypatch.setattr("vop_jax.inference.stablehlo.make_program", program)
    exported(tmp_path / "e")
    before = {f.name: f.read_bytes() for f in (tmp_path / "e").iterdir()}
    assert set(before) == {
        *("video.stablehlo", "video.npz", "text.stablehlo", "text.npz"),
        *("meta.json", "tokenizer.json", "README.md"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            exported(tmp_path / "e", "vop_p")
    assert {f.name: f.read_bytes() for f in (tmp_path / "e").iterdir()} == before
    exported(tmp_path / "e", "vop_p")
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
