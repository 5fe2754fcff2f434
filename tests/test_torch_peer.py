"""The PyTorch peer of the benchmarks computes what the JAX model computes."""

import dataclasses
import functools

import jax
import pytest

from tests import tiny
from vop_jax.storage.tensors import flatten
from vop_jax.training.step import batch_loss
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.partition import merge, partition

torch = pytest.importorskip("torch", reason="the peer is a PyTorch model")

from benchmarks.torch_vop import TorchVop  # noqa: E402  it imports torch
from benchmarks.torch_weights import load, to_state  # noqa: E402  so does this

METHOD = MethodConfig(
    visual_prompts=3,
    text_prefix=2,
    text_suffix=1,
    specific_prompts=2,
    adapter_width=5,
    frames=tiny.FRAMES,
)
QUICK = ("adapter_ffn", "vop_f+p", "vop_f+c")  # these have all parts
NAMES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name, row in METHODS.items()
    if row.prompts or row.adapter
]


@functools.cache
def peers(name):
    """(model, parameters, the peer with the same parameters, frames, ids)."""
    method = dataclasses.replace(METHOD, name=name)
    model, params = tiny.model_and_params(method)
    trainable, _ = partition(params, method.trainable_patterns(tiny.CLIP))
    peer = TorchVop(tiny.CLIP, method)
    load(peer, flatten(params), flatten(trainable))
    ids = tiny.captions(4, method.text_slots(tiny.CLIP))
    return model, params, peer, tiny.frames(4), ids


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_equal(name):
    """And so the features, on which they depend."""
    model, params, peer, frames, ids = peers(name)
    trainable, frozen = partition(params, METHODS[name].trainable)

    def loss_of(trainable):
        return batch_loss(model, merge(trainable, frozen), {"frames": frames, "ids": ids})

    expected, gradient = jax.jit(jax.value_and_grad(loss_of))(trainable)
    loss = peer.loss(torch.from_numpy(frames), torch.from_numpy(ids).long())
    assert abs(loss.item() - float(expected)) <= 1e-5
    loss.backward()
    ours = to_state(flatten(gradient))
    theirs = {k: p.grad for k, p in peer.named_parameters() if p.requires_grad}
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        error = (theirs[key] - value).abs().max().item()
        assert error <= 1e-5 + 1e-4 * value.abs().max().item(), key


def test_parameters_of_another_method_are_refused():
    _, params, *_ = peers("adapter_ffn")
    with pytest.raises(ValueError, match=r"unknown: \['visual\.blocks\.0\.adapter"):
        load(TorchVop(tiny.CLIP, METHOD), flatten(params), ())
    clip = {"clip": params["clip"]}
    with pytest.raises(ValueError, match=r"not filled: \['prompts\.text"):
        load(TorchVop(tiny.CLIP, METHOD), flatten(clip), ())


@pytest.mark.parametrize("change", [{"branches": "text"}, {"cmm": "lstm"}, {"suffix": "released"}])
def test_a_method_that_the_peer_lacks_is_refused(change):
    with pytest.raises(ValueError, match="knows the default of"):
        TorchVop(tiny.CLIP, dataclasses.replace(METHOD, name="vop_c", **change))


def test_frozen_weights_have_the_compute_dtype():
    method = dataclasses.replace(METHOD, name="vop_f+c")
    _, params, peer, frames, _ = peers("vop_f+c")
    half = TorchVop(tiny.CLIP, method, torch.bfloat16)
    load(half, flatten(params), [name for name in flatten(params) if name.startswith("prompts/")])
    assert half.visual.blocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert half.prompts.visual.dtype == half.logit_scale.dtype == torch.float32
    frames = torch.from_numpy(frames)
    with torch.no_grad():
        close = (half.encode_video(frames) * peer.encode_video(frames)).sum(dim=-1)
    assert close.min() > 0.98
