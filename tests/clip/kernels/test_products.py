"""Products in bfloat16: what they add up in, their gradients, and what each device computes."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from tests import tiny
from vop_jax.clip.kernels import products
from vop_jax.clip.remat import Remat
from vop_jax.clip.weights import cast_frozen
from vop_jax.training.step import loss_and_gradient
from vop_jax.tuning.methods import METHODS, MethodConfig
from vop_jax.tuning.partition import partition

DIMENSIONS = {  # shapes of both operands, and their contracted and batch axes
    "dense": ((2, 3, 4), (4, 5), (((2,), (0,)), ((), ()))),
    "two axes": ((2, 3, 4), (3, 4, 5), (((1, 2), (0, 1)), ((), ()))),
    "batch": ((6, 2, 3), (3, 6, 4), (((2,), (0,)), ((0,), (1,)))),
}
# The operands and the result of a product in a lowered program.
PRODUCT = re.compile(
    r"stablehlo\.dot_general.*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) "
    r"-> tensor<(?:\d+x)*(\w+)>"
)


def draw(*shapes, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_product_and_its_gradients_are_those_of_float32_rounded_once(name):
    left, right, dimensions = DIMENSIONS[name]
    x, y = draw(left, right)
    shape = jax.eval_shape(lambda x, y: jax.lax.dot_general(x, y, dimensions), x, y).shape
    (gradient,) = draw(shape)
    wide = [a.astype(jnp.float32) for a in (x, y, gradient)]
    expected, pull = jax.vjp(lambda x, y: jax.lax.dot_general(x, y, dimensions), *wide[:2])
    out, pull_rounded = jax.vjp(lambda x, y: products.dot_general(x, y, dimensions), x, y)
    for ours, exact in zip((out, *pull_rounded(gradient)), (expected, *pull(wide[2])), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))


def test_a_long_sum_loses_nothing():
    ones = jnp.ones((1, 4096), jnp.bfloat16)  # a sum in bfloat16 would end at 256
    assert products.linear(ones, ones.T).item() == 4096
    assert products.einsum("ab,cb->ac", ones, ones, jnp.float32).item() == 4096


def lowered_products(method: str, dtype, platform: str) -> collections.Counter:
    """The dtypes of all products of a step: loss and gradient."""
    model, params = tiny.model_and_params(MethodConfig(method, frames=tiny.FRAMES))
    model = model.clone(dtype=dtype)
    trainable, frozen = partition(params, model.method.trainable_patterns(tiny.CLIP))
    batch = {
        "frames": tiny.frames(2),
        "ids": tiny.captions(2, model.method.text_slots(tiny.CLIP)),
    }
    step = jax.jit(lambda *args: loss_and_gradient(model, *args))
    traced = step.trace(trainable, cast_frozen(frozen, dtype), batch)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = collections.Counter(PRODUCT.findall(text))
    assert found.total() == text.count("stablehlo.dot_general ")
    return found


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].trainable])
def test_a_cpu_is_asked_for_float32_results_of_bfloat16_operands(method):
    loss = ("f32", "f32", "f32")  # three products: similarities and both their gradients
    found = lowered_products(method, jnp.bfloat16, "cpu")
    assert set(found) == {("bf16", "bf16", "f32"), loss}
    assert found[loss] == 3


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_write_products_with_weights_in_bfloat16(platform):
    found = lowered_products("vop_c", jnp.bfloat16, platform)
    attention = found[("bf16", "bf16", "f32")]
    cpu = lowered_products("vop_c", jnp.bfloat16, "cpu")
    assert set(found) == set(cpu) | {("bf16", "bf16", "bf16")}
    assert found.total() == cpu.total()
    # Forward, scores and weighted values; backward, no result of a product is wide.
    layers = tiny.CLIP.vision_layers + tiny.CLIP.text_layers
    assert attention == 2 * 2 * layers


def test_float32_is_left_alone():
    assert set(lowered_products("vop_c", jnp.float32, "cpu")) == {("f32", "f32", "f32")}


@pytest.mark.parametrize("policy", ["none", "dots"])
def test_the_backward_pass_keeps_no_wide_product_with_weights(policy, capsys):
    model, params = tiny.model_and_params(MethodConfig("vop", frames=tiny.FRAMES))
    model = dataclasses.replace(model, dtype=jnp.bfloat16, remat=Remat(policy))
    params = cast_frozen(params, jnp.bfloat16)

    def video(prompts):
        variables = {"params": {**params, "prompts": prompts}}
        return model.apply(variables, tiny.frames(2), method="encode_video").sum()

    jax.ad_checkpoint.print_saved_residuals(video, params["prompts"])
    saved = capsys.readouterr().out
    width = tiny.CLIP.vision_width
    assert re.search(rf"bf16\[6,\d+,{4 * width}\]", saved)  # of the MLP
    assert not re.search(rf"f32\[6,\d+,({width}|{4 * width})\]", saved), saved


measure = products.fastest_dtype  # tests run in float32 on any machine


@pytest.mark.parametrize("rates, expected", [((9.0, 3.0), "bfloat16"), ((3.1, 3.0), "float32")])
def test_the_faster_dtype_is_chosen_and_said(monkeypatch, caplog, rates, expected):
    speeds = dict(zip(("bfloat16", "float32"), rates, strict=True))
    monkeypatch.setattr(products, "flops_per_second", lambda dtype, _: 1e9 * speeds[dtype])
    logging.set_verbosity(logging.INFO)
    assert measure(jax.devices()[0]) == expected
    assert f"products in {expected}" in caplog.text


def test_a_rate_is_measured():
    assert 1e6 < products.flops_per_second("float32", jax.devices()[0]) < 1e16


@pytest.mark.parametrize(
    "equation, sizes, merged",
    [
        ("abc,cDE->abDE", [2, 3, 4, 4, 5, 6], ("ac,cD->aD", [[6, 4], [4, 30], [2, 3, 5, 6]])),
        ("abDE,cDE->abc", [2, 3, 5, 6, 4, 5, 6], ("aD,cD->ac", [[6, 30], [4, 30], [2, 3, 4]])),
        (
            "abc,abDE->cDE",
            [2, 3, 4, 2, 3, 5, 6],
            ("abc,abD->cD", [[2, 3, 4], [2, 3, 30], [4, 5, 6]]),
        ),
        ("abcd,d->abc", [2, 3, 4, 5, 5], ("ad,d->a", [[24, 5], [5], [2, 3, 4]])),
        ("tmhk,mshk->tmhs", [2, 3, 4, 5, 3, 6, 4, 5], None),
    ],
)
def test_neighbours_are_merged(equation, sizes, merged):
    left = equation.split(",")[0]
    unchanged = equation, [sizes[: len(left)], sizes[len(left) :], [2, 3, 4, 6]]
    assert products.merge_axes(equation, sizes) == (merged or unchanged)
