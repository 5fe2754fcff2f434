"""A released checkpoint, converted and loaded, gives the features of an independent VoP."""

import dataclasses

import numpy as np
import pytest

import vop_jax
from tests import checkpoints
from tests.peers import import_open_clip
from vop_jax import convert
from vop_jax.config.clip import PRESETS, ClipConfig
from vop_jax.tuning.prompt_set import load_prompts, released_method, save_prompts

torch = pytest.importorskip("torch", reason="the reference is a PyTorch model")

from tests.reference_vop import SUFFIXES, ReferenceVop  # noqa: E402  it imports torch

TOLERANCE = 1e-5  # of the largest difference between unit features; 1e-4 is required
# Real captions need the real vocabulary and 77 positions; two heads and one by width // 64.
ODD = ClipConfig(24, 8, 128, 3, 2, 40, 4, 1, 20)
CAPTIONS = [
    "a squid is talking",
    "",
    "naïve café — ﬁancée’s ½ 中文 🎬 \u200b\u00a0ＦＵＬＬ",
    "tom &amp;amp; jerry &lt;3 &#39;quoted&#39; &eacute;",
    "  Tabs\tand\nnew   LINES  ",
    "exactly " + "one two three " * 15,
    "a very long caption " * 40,
    "don't they'll 1234567890 !!! ...",
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((ODD, 3), id="odd"),
        pytest.param((PRESETS["ViT-B/32"], 8), id="ViT-B/32", marks=pytest.mark.slow),
    ],
)
def released(request, tmp_path_factory, quiet):
    """(sizes, state dict, converted clip, converted prompts)."""
    sizes, visual_prompts = request.param
    folder = tmp_path_factory.mktemp("released")
    state = checkpoints.released_state(checkpoints.openai_state(sizes), visual_prompts, 8)
    source = checkpoints.save_torch(folder / "VoP.pth", state, "state_dict")
    clip, prompts = folder / "clip.safetensors", folder / "prompts.safetensors"
    flags = [f"--source={source}", f"--output={clip}", f"--prompts-output={prompts}"]
    assert convert.main(flags) == 0
    return sizes, {k: torch.from_numpy(np.array(v)) for k, v in state.items()}, clip, prompts


def frames_of(sizes, videos=2, count=3):
    shape = (videos, count, sizes.image_size, sizes.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def token_ids(slots):
    """Ids by open_clip's tokenizer, truncated as the released code does."""
    return import_open_clip().SimpleTokenizer()(CAPTIONS, context_length=slots)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_features_equal_the_reference(released, suffix, tmp_path):
    sizes, state, clip, prompts = released
    if suffix != "released":
        loaded = load_prompts(prompts)
        method = dataclasses.replace(loaded.method, suffix=suffix)
        prompts = tmp_path / "prompts.safetensors"
        save_prompts(prompts, dataclasses.replace(loaded, method=method))
    expected = ReferenceVop(state, suffix).encode_text(token_ids(sizes.context_length - 8))
    features = vop_jax.load(clip, prompts).embed_text(CAPTIONS)
    assert np.abs(features - expected.numpy()).max() <= TOLERANCE


def test_video_features_equal_the_reference(released):
    sizes, state, clip, prompts = released
    frames = frames_of(sizes)
    pooled = ReferenceVop(state).encode_video(torch.from_numpy(frames))
    # The released code leaves the mean as it is, ours is normalised again.
    expected = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    features = vop_jax.load(clip, prompts).embed_frames(frames)
    assert np.abs(features - expected).max() <= TOLERANCE


def test_prompts_and_the_place_of_the_suffix_matter_to_the_reference(released):
    sizes, state, *_ = released
    without = {k: v * 0 if "learner" in k else v for k, v in state.items()}
    ids, frames = token_ids(sizes.context_length - 8), torch.from_numpy(frames_of(sizes))
    text = {s: ReferenceVop(state, s).encode_text(ids) for s in SUFFIXES}
    assert (text["eot"] - text["released"]).abs().max() > 0.01
    assert (text["released"] - ReferenceVop(without).encode_text(ids)).abs().max() > 0.01
    video = ReferenceVop(state).encode_video(frames)
    assert (video - ReferenceVop(without).encode_video(frames)).abs().max() > 0.01


def test_the_converted_prompt_set_describes_itself(released):
    sizes, state, _, prompts = released
    loaded = load_prompts(prompts)
    visual = state["module.visual_prompt_learner.visual_prompts"]
    assert loaded.clip_config == sizes
    assert loaded.method == released_method(visual.shape[2], 8)
    np.testing.assert_array_equal(loaded.params["prompts"]["visual"], visual[:, 0])
