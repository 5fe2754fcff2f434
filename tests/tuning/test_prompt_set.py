import dataclasses

import jax
import numpy as np
import pytest

from tests import tiny
from vop_jax.config.clip import PRESETS
from vop_jax.errors import UserError
from vop_jax.model import TextVideoModel
from vop_jax.storage import tensors
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.partition import partition
from vop_jax.tuning.prompt_set import FORMAT, check_same_clip, load_prompts, save_prompts

METHOD = MethodConfig(
    visual_prompts=2, text_prefix=1, text_suffix=2, specific_prompts=1, suffix="released"
)
VIDEO = {"frames": 7, "short_side": 128, "stored_fps": 2.0}


def trained_shapes(method, clip):
    """The trainable subtree as shapes."""
    model = TextVideoModel(clip, method)
    params = tensors.unflatten(model.shapes())
    return partition(params, method.trainable_patterns(clip))[0]


def random_params(method=METHOD, clip=tiny.CLIP):
    rng = np.random.default_rng(0)
    shapes = trained_shapes(method, clip)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def save(path, params, method=METHOD, clip=tiny.CLIP, **changes):
    about = {"clip_fingerprint": "f" * 64, "clip_name": "tiny from x.pt (ffff)", "video": VIDEO}
    save_prompts(path, params, method=method, clip_config=clip, **(about | changes))


@pytest.mark.parametrize("name", METHODS)
def test_round_trip_of_every_method(tmp_path, name):
    method = dataclasses.replace(METHOD, name=name)
    params = random_params(method)
    save(tmp_path / "p.safetensors", params, method)
    given = load_prompts(tmp_path / "p.safetensors")
    assert (given.method, given.clip_config, given.video) == (method, tiny.CLIP, VIDEO)
    assert (given.clip_fingerprint, given.clip_name) == ("f" * 64, "tiny from x.pt (ffff)")
    saved, loaded = tensors.flatten(params), tensors.flatten(given.params)
    assert saved.keys() == loaded.keys()
    for key in saved:
        np.testing.assert_array_equal(saved[key], loaded[key])


def test_video_is_optional(tmp_path):
    save(tmp_path / "p", random_params(), video=None)
    assert load_prompts(tmp_path / "p").video == {}


def test_the_file_says_what_it_is(tmp_path):
    save(tmp_path / "p", random_params())
    metadata = tensors.read_metadata(tmp_path / "p")
    assert metadata["format"] == FORMAT and metadata["method"] == "vop"
    assert metadata["activation"] == "quick_gelu" and metadata["clip_fingerprint"] == "f" * 64


def test_base_vop_over_vit_b32_is_half_a_megabyte(tmp_path):
    clip = PRESETS["ViT-B/32"]
    save(tmp_path / "p", random_params(MethodConfig(), clip), MethodConfig(), clip)
    size = (tmp_path / "p").stat().st_size
    # 122,880 float32 are 491,520 bytes; the rest is the header.
    assert 480_000 <= size <= 520_000


@pytest.mark.parametrize("metadata", [{}, {"format": "vop_jax.clip"}])
def test_another_safetensors_file_is_refused(tmp_path, metadata):
    tensors.save(tmp_path / "p", {"a": np.zeros(2)}, metadata)
    with pytest.raises(UserError, match="p: not a prompts file; --mode=export writes one"):
        load_prompts(tmp_path / "p")


@pytest.mark.parametrize("changes", [None, {"video": "3"}, {"video": "[" * 100_000}])
def test_wrong_metadata_is_refused(changes, tmp_path):
    save(tmp_path / "p", random_params())
    tree, metadata = tensors.load(tmp_path / "p")
    stated = {k: v for k, v in metadata.items() if k != tensors.CHECKSUM} | (changes or {})
    tensors.save(tmp_path / "p", tree, stated if changes else {"format": FORMAT})
    with pytest.raises(UserError, match="p: its metadata is not a prompts file's"):
        load_prompts(tmp_path / "p")


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file"):
        load_prompts(tmp_path / "nowhere")


def test_a_truncated_file_is_refused(tmp_path):
    save(tmp_path / "p", random_params())
    (tmp_path / "p").write_bytes((tmp_path / "p").read_bytes()[:-8])
    with pytest.raises(UserError, match="p: not a readable safetensors file"):
        load_prompts(tmp_path / "p")


def test_a_method_this_version_does_not_know_is_refused(tmp_path):
    save(tmp_path / "p", random_params(), dataclasses.replace(METHOD, name="vop_2"))
    with pytest.raises(UserError, match=r"method.name='vop_2': allowed are"):
        load_prompts(tmp_path / "p")


def test_prompts_over_another_clip_are_refused_naming_both(tmp_path):
    save(tmp_path / "p", random_params())
    given = load_prompts(tmp_path / "p")
    check_same_clip(tmp_path / "p", given, "f" * 64, "the same, renamed", tiny.CLIP)
    with pytest.raises(UserError) as caught:
        check_same_clip(tmp_path / "p", given, "0" * 64, "ViT-B/32 from y.pt (0000)", tiny.CLIP)
    message = str(caught.value)
    for part in (str(tmp_path / "p"), "tiny from x.pt (ffff)", "ViT-B/32 from y.pt (0000)"):
        assert part in message
    assert "\n" not in message
    other = dataclasses.replace(tiny.CLIP, activation="gelu")  # of the same parameters
    with pytest.raises(UserError, match=r"over a CLIP with activation='quick_gelu'; .* 'gelu'"):
        check_same_clip(tmp_path / "p", given, "f" * 64, "the same, renamed", other)
