"""The benchmark of memory: what it counts, and a row of it."""

import argparse

import jax
import jax.numpy as jnp
import pytest

from benchmarks import memory
from vop_jax.clip.kernels import splash_attention


def counted(function, *shapes):
    arrays = [jnp.ones(shape) for shape in shapes]
    return memory.matmul_flops(jax.make_jaxpr(function)(*arrays).jaxpr)


def test_products_are_counted_as_often_as_loops_turn():
    product = 2 * 3 * 4 * 5
    assert counted(lambda a, b: jnp.tanh(a @ b), (3, 4), (4, 5)) == product
    assert counted(lambda a, b: jax.lax.map(lambda x: x @ b, a), (7, 3, 4), (4, 5)) == 7 * product
    batched = counted(lambda a, b: jnp.einsum("nij,njk->nik", a, b), (6, 3, 4), (6, 4, 5))
    assert batched == 6 * product


def test_what_is_computed_again_is_counted_again():
    def loss(w, x):
        return jnp.tanh(jnp.tanh(x @ w) @ w).sum()

    shapes, product = ((4, 4), (3, 4)), 2 * 3 * 4 * 4
    assert counted(jax.grad(loss), *shapes) == 5 * product
    assert counted(jax.grad(jax.checkpoint(loss)), *shapes) == 7 * product


def test_products_in_a_kernel_are_counted_as_often_as_it_has_programs():
    def attend(q, k, v):
        return splash_attention.attention(q, k, v).sum()

    shapes = [(2, 1280, 3, 16), *[(2, 640, 3, 16)] * 2]
    product = 2 * 2 * 3 * 1280 * 640 * 16
    assert counted(attend, *shapes) == 2 * product
    found = counted(jax.grad(attend, argnums=(0, 1, 2)), *shapes)  # 3 for queries, 4 for keys
    assert 9 * product <= found < 9.01 * product


def test_settings_are_keys_of_the_config():
    assert memory.Settings.parse("plain") == memory.Settings()
    parsed = memory.Settings.parse("remat=full frame_chunk=32 attention=blocks")
    assert parsed == memory.Settings("full", 32, attention="blocks")
    with pytest.raises(TypeError, match="chunks"):
        memory.Settings.parse("chunks=3")


@pytest.mark.slow
def test_rows_of_the_table(monkeypatch):
    # XLA counts no FLOPs of a program for a device that is not there.
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    args = argparse.Namespace(arch="tiny", frames=4, batch=4)
    device = jax.devices()[0]
    plain, parts = (
        memory.measure(text, "vop", args, device) for text in ("plain", "remat=full frame_chunk=4")
    )
    assert plain["arguments"] == parts["arguments"]
    # All blocks once more, of which the last product of each is not needed.
    assert 1.2 < parts["of_plain"] == parts["flops"] / plain["flops"] < 1.5
    refused = {**plain, "peak": None, "refused": "20G of 16G"}
    table = memory.format_table([plain, parts, refused]).splitlines()
    assert len(table) == 5 and table[2].endswith("| 1.00 |") and "20G of 16G" in table[4]
