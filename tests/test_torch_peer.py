"""The PyTorch peer of the benchmarks computes what the JAX model computes."""

import dataclasses
import functools

import jax
import numpy as np
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


# Methods without added parts compute the same; of the others the two with most parts are quick.
FORWARD = ("zero_shot", "adapter_attn", "adapter_ffn", *(n for n in METHODS if "vop" in n))
QUICK = ("zero_shot", "adapter_ffn", "vop_f+p", "vop_f+c")


def cases(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


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


def as_torch(frames, ids):
    return torch.from_numpy(frames), torch.from_numpy(ids).long()


@pytest.mark.parametrize("name", cases(FORWARD, QUICK))
def test_features_are_equal(name):
    model, params, peer, *rows = peers(name)
    frames, ids = as_torch(*rows)
    expected = jax.jit(lambda params: model.apply({"params": params}, *rows))(params)
    with torch.no_grad():
        features = peer.encode_video(frames), peer.encode_text(ids)
    for ours, theirs in zip(expected, features, strict=True):
        assert np.abs(ours - theirs.numpy()).max() <= 1e-5


@pytest.mark.parametrize("name", cases(("vop_f+c", "vop", "adapter_ffn", "full"), ("vop_f+c",)))
def test_loss_and_gradients_are_equal(name):
    model, params, peer, *rows = peers(name)
    trainable, frozen = partition(params, METHODS[name].trainable)

    def loss_of(trainable):
        batch = dict(zip(("frames", "ids"), rows, strict=True))
        return batch_loss(model, merge(trainable, frozen), batch)

    expected, gradient = jax.jit(jax.value_and_grad(loss_of))(trainable)
    peer.zero_grad()
    loss = peer.loss(*as_torch(*rows))
    loss.backward()
    assert abs(loss.item() - float(expected)) <= 1e-5
    ours = to_state(flatten(gradient))
    theirs = {k: p.grad for k, p in peer.named_parameters() if p.requires_grad}
    assert theirs.keys() == ours.keys()
    for key, value in ours.items():
        error = (theirs[key] - value).abs().max().item()
        assert error <= 1e-5 + 1e-4 * value.abs().max().item(), key


def test_parameters_of_another_method_are_refused():
    _, params, *_ = peers("adapter_attn")
    with pytest.raises(ValueError, match=r"unknown: \['visual\.blocks\.0\.adapter"):
        load(TorchVop(tiny.CLIP, METHOD), flatten(params), ())
    _, params, *_ = peers("zero_shot")
    with pytest.raises(ValueError, match=r"not filled: \['prompts\.text"):
        load(TorchVop(tiny.CLIP, METHOD), flatten(params), ())


@pytest.mark.parametrize("change", [{"branches": "text"}, {"cmm": "lstm"}, {"suffix": "released"}])
def test_a_method_that_the_peer_lacks_is_refused(change):
    with pytest.raises(ValueError, match="knows the default of"):
        TorchVop(tiny.CLIP, dataclasses.replace(METHOD, name="vop_c", **change))


def test_frozen_weights_have_the_compute_dtype():
    method = dataclasses.replace(METHOD, name="vop_f+c")
    _, params, peer, *rows = peers("vop_f+c")
    half = TorchVop(tiny.CLIP, method, torch.bfloat16)
    load(half, flatten(params), [name for name in flatten(params) if name.startswith("prompts/")])
    assert half.visual.blocks[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert half.prompts.visual.dtype == half.logit_scale.dtype == torch.float32
    frames, _ = as_torch(*rows)
    with torch.no_grad():
        close = (half.encode_video(frames) * peer.encode_video(frames)).sum(dim=-1)
    assert close.min() > 0.98
