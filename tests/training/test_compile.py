"""The step compiled ahead: once for each shape of a batch, only where it fits, and its FLOPs."""

import dataclasses
from datetime import timedelta
from unittest import mock

import jax
import numpy as np
import pytest
from absl import logging

from benchmarks.step_cost import Programs
from tests.training import rows
from vop_jax.config.clip import PRESETS, ClipConfig
from vop_jax.errors import UserError
from vop_jax.training import compile, sharding
from vop_jax.training.compile import CompiledStep, MemoryEstimate, matmul_flops
from vop_jax.tuning.methods import MethodConfig

GB = 10**9
# Few layers, but widths at which matrix products outweigh the rest as in a real CLIP.
SMALL = ClipConfig(96, 16, 256, 2, 4, 128, 2, 2, 128)


@pytest.fixture
def compilations():
    """A list that grows with each program that is compiled or taken from a cache."""
    events, active = [], [True]

    def listen(event, *_, **__):
        if active and event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    active.clear()  # jax keeps its listeners


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_each_shape_of_a_batch_is_compiled_once_and_all_widths_before_the_first_step(
    shape, compilations, caplog
):
    logging.set_verbosity(logging.INFO)
    mesh, _, make_step, state, frozen = rows.prepare(*shape)
    run = CompiledStep(make_step, mesh, widths=(3, 5))
    narrow, whole = (sharding.to_global(mesh, rows.batch(0, width=width)) for width in (3, 5))
    larger = sharding.to_global(mesh, rows.batch(0, size=16))
    places = jax.tree.map(lambda x: x.sharding, state)
    compilations.clear()
    seen = []
    with caplog.at_level("INFO", logger="absl"):
        for batch in (narrow, whole, narrow, larger, larger, whole):
            state, metrics = run(state, frozen, batch)
            seen.append((len(run.programs), len(compilations)))
    assert seen == [(2, 2)] * 3 + [(3, 3)] * 3
    assert "step for captions of 3 and 5 slots compiled in" in caplog.text
    assert int(state.step) == 6 and np.isfinite(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == places


def test_memory_and_duration_are_logged(caplog, monkeypatch):
    logging.set_verbosity(logging.INFO)
    mesh, _, make_step, state, frozen = rows.prepare(1)
    batch = sharding.to_global(mesh, rows.batch(0))
    size = sum(x.nbytes for x in jax.tree.leaves((state, frozen, batch)))
    monkeypatch.setattr(compile, "available_memory", lambda: 10)  # bytes
    monkeypatch.setattr(compile.products, "flops_per_second", lambda dtype, device: 100.0)
    flops = matmul_flops(jax.make_jaxpr(make_step(1))(state, frozen, batch).jaxpr)
    run = CompiledStep(make_step, mesh, 1, steps=100)
    with caplog.at_level("INFO", logger="absl"):
        run(state, frozen, batch)
    (line,) = [m for m in caplog.messages if m.startswith("step compiled in")]
    (warning,) = [m for m in caplog.messages if "this machine has 0.000 free" in m]
    assert warning.startswith("a step takes 0.0") and "config.compute.remat" in warning
    (time,) = [m for m in caplog.messages if m.startswith("100 steps take ")]
    assert f"take {timedelta(seconds=round(flops))} or more: {flops / 1e9:.3g} GFLOP" in time
    (program,) = run.programs.values()
    estimate = MemoryEstimate.of(program)
    assert estimate.limit is None and estimate.activations > 0 and str(estimate) in line
    assert size <= estimate.arguments < 1.5 * size + 1000  # also metrics


SIZES = {"argument": 3 * GB, "output": 2 * GB, "alias": 1 * GB, "temp": 10 * GB}
MEMORY = mock.Mock(**{f"{name}_size_in_bytes": size for name, size in SIZES.items()})
PROGRAM = mock.Mock(**{"memory_analysis.return_value": MEMORY})


def device(**stats):
    """One that reports its memory, or nothing."""
    return mock.Mock(**{"memory_stats.return_value": stats or None})


def test_a_step_that_does_not_fit_is_refused_before_it_runs(monkeypatch):
    fits = None, device(), device(bytes_in_use=GB), device(bytes_limit=14 * GB)
    for estimate in (MemoryEstimate.of(PROGRAM, one) for one in fits):
        assert estimate.total == 14 * GB and estimate.other == 0
        estimate.check()
    estimate = MemoryEstimate.of(PROGRAM, device(bytes_limit=16 * GB, bytes_in_use=6 * GB))
    assert estimate == MemoryEstimate(4 * GB, 10 * GB, other=3 * GB, limit=16 * GB)
    message = (
        "a step needs 17.0 GB of a device: 4.0 parameters, state and batch, 10.0 activations, 3.0 "
        "other arrays; it has 16.0, 1.0 GB are missing: set config.compute.remat='full', "
    )
    mesh, _, make_step, state, frozen = rows.prepare(1)
    monkeypatch.setattr(compile.MemoryEstimate, "of", lambda *_: estimate)
    with pytest.raises(UserError) as caught:
        CompiledStep(make_step, mesh)(state, frozen, sharding.to_global(mesh, rows.batch(0)))
    assert str(caught.value).startswith(message)
    for key in ("frame_chunk", "train.microbatches", "compute.dtype", "mesh.fsdp", "memory.md"):
        assert key in str(caught.value)
    assert int(state.step) == 0  # not consumed


@pytest.mark.parametrize(
    ("message", "error", "match"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory.\nUsed 20G of 16G hbm.",
            *(UserError, r"does not fit a device .*Used 20G of 16G.*remat='full'"),
        ),
        ("INTERNAL: something else", jax.errors.JaxRuntimeError, "INTERNAL"),
    ],
)
def test_a_compiler_that_lacks_memory_is_an_error_of_the_user(message, error, match):
    mesh, _, _, state, frozen = rows.prepare(1)
    step = mock.Mock(side_effect=jax.errors.JaxRuntimeError(message), __name__="step")
    with pytest.raises(error, match=match):
        CompiledStep(lambda _: step, mesh)(state, frozen, sharding.to_global(mesh, rows.batch(0)))


SHORT = {1: 800, 2: 500, 4: 300, 8: 200}  # bytes of activations by the number of microbatches


class Compilations(list):
    """The numbers of microbatches for which steps are made; their estimates are `SHORT`'s."""

    def __init__(self, monkeypatch, free, limit=None):
        super().__init__()
        monkeypatch.setattr(compile, "available_memory", lambda: free)
        monkeypatch.setattr(compile.MemoryEstimate, "of", lambda *_: self.estimate(limit))

    def estimate(self, limit):
        return MemoryEstimate(70, SHORT[self[-1]], 30, limit)

    def run(self, shape=(1,), microbatches=0, meta=None):
        """The state after a step."""
        mesh, _, make_step, state, frozen = rows.prepare(*shape)

        def make(count):
            self.append(count)
            return make_step(count)

        step = CompiledStep(make, mesh, microbatches, meta)
        return step(state, frozen, sharding.to_global(mesh, rows.batch(0)))[0]


@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "accelerator"])
@pytest.mark.parametrize(
    ("free", "compiled"),
    [(800, [1]), (450, [1, 2, 4]), (300, [1, 4]), (250, [1, 4, 8]), (200, [1, 4, 8])],
)
def test_a_step_takes_the_fewest_microbatches_that_fit(free, compiled, on_cpu, monkeypatch, caplog):
    """Numbers that halved activations could not make fit are not compiled."""
    logging.set_verbosity(logging.INFO)
    plain = Compilations(monkeypatch, 10**6).run()
    counts, meta = Compilations(monkeypatch, *((free,) if on_cpu else (0, free + 100))), {}
    with caplog.at_level("INFO", logger="absl"):
        state = counts.run(meta=meta)
    assert counts == compiled and meta == {"microbatch": 8 // compiled[-1]}
    assert "a step takes" not in caplog.text
    chosen = f"train.microbatches={compiled[-1]}: activations take 0.000 GB of a device, 0.000 are"
    assert (chosen in caplog.text) == (compiled != [1])
    for ours, theirs in zip(*map(jax.tree.leaves, (state, plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_number_of_microbatches_stays(monkeypatch, caplog):
    """With an explicit one, in a continued run, and among processes."""
    counts, meta = Compilations(monkeypatch, 150), {"microbatch": 2}
    counts.run(microbatches=2, meta=meta)
    assert counts == [2] and meta == {"microbatch": 2}
    assert "a step takes 0.000 GB more" in caplog.text
    counts = Compilations(monkeypatch, 10**6)
    counts.run(meta=meta)
    assert counts == [4]  # two rows at a time
    counts.clear()
    counts.run((4, 2), meta=meta)  # of 8 devices each has one
    assert counts == [1] and meta == {"microbatch": 1}
    counts.clear()
    monkeypatch.setattr(compile.hosts, "largest", lambda number: max(number, 4))
    counts.run(meta={})
    assert counts == [1, 4]


def test_a_step_that_fits_with_no_number_is_refused_or_reported(monkeypatch, caplog):
    counts = Compilations(monkeypatch, 90)
    counts.run()
    assert counts == [1, 8] and "a step takes 0.000 GB more" in caplog.text
    counts = Compilations(monkeypatch, 0, limit=190)
    with pytest.raises(UserError, match="a step needs"):
        counts.run()
    assert counts == [1, 8]


def test_a_compiler_that_lacks_memory_gets_more_microbatches():
    mesh, _, make_step, state, frozen = rows.prepare(1)
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 16G hbm.")
    refused = mock.Mock(side_effect=error, __name__="step")
    run = CompiledStep(lambda count: make_step(count) if count > 2 else refused, mesh)
    state, _ = run(state, frozen, sharding.to_global(mesh, rows.batch(0)))
    assert refused.call_count == 2 and int(state.step) == 1


def flops_of(clip, method, frames, what="forward"):
    """FLOPs of "forward", the loss of two clips, or of a whole "step"; traced only."""
    programs = Programs(clip, method, frames, batch=2)
    shapes = programs.shapes if what == "step" else programs._forward_shapes()
    function = programs.train_step if what == "step" else programs._forward
    return matmul_flops(jax.make_jaxpr(function)(*shapes).jaxpr)


def cost_ratio(clip, name, frames):
    """FLOPs of a step by those of its forward pass."""
    method = MethodConfig(name)
    return flops_of(clip, method, frames, "step") / flops_of(clip, method, frames)


def test_a_prompt_tuning_step_costs_two_forward_passes():
    """Less in the first block, where prompts alone have a gradient: hence more blocks than two."""
    deeper = dataclasses.replace(SMALL, vision_layers=4, text_layers=4)
    assert 1.8 <= cost_ratio(deeper, "vop", frames=4) <= 2.1


@pytest.mark.slow
def test_full_tuning_costs_three_and_vit_b32_two():
    assert 2.7 <= cost_ratio(SMALL, "full", frames=4) <= 3.3
    assert 1.8 <= cost_ratio(PRESETS["ViT-B/32"], "vop", frames=12) <= 2.1


def test_prompts_are_no_part_of_the_sequence_and_plain_clip_costs_its_matrix_products():
    """The similarities of two clips add a little to the products counted by hand."""
    c, frames, batch = SMALL, 4, 2

    def block(width, tokens, queries):
        # Keys and values of all tokens; query and out, 2 D^2, and the MLP of the queries.
        dense = 2 * width**2 * tokens + 10 * width**2 * queries
        return 2 * (dense + 2 * width * tokens * queries)

    def blocks(layers, width, tokens):
        return (layers - 1) * block(width, tokens, tokens) + block(width, tokens, 1)

    patches = 2 * c.patches * 3 * c.patch_size**2 * c.vision_width
    frame = patches + blocks(c.vision_layers, c.vision_width, 1 + c.patches)
    caption = blocks(c.text_layers, c.text_width, c.context_length)
    plain = flops_of(c, MethodConfig("proj"), frames)
    assert 1 <= plain / (batch * (frames * frame + caption)) <= 1.01
    prompts = flops_of(c, MethodConfig("vop", visual_prompts=64), frames)
    assert prompts / plain < 1.15  # as part of it they would make 2.4 times as many tokens


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(compile, "CGROUP", tmp_path)
    machine = compile.available_memory()
    (tmp_path / "memory.stat").write_text("anon 400\nfile 7\n")
    (tmp_path / "memory.max").write_text("1400\n")
    assert compile.available_memory() == 800
    (tmp_path / "memory.max").write_text("max\n")
    assert machine is None or compile.available_memory() > 800
