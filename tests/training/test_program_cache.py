"""Compiled programs in files: found again, made anew where they are damaged, optional."""

import itertools
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from vop_jax.training import program_cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder, with no other configured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    configured = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield program_cache.user_folder()
    jax.config.update("jax_compilation_cache_dir", configured)


FACTORS = itertools.count(2)  # so that jax's own cache never has the program


def load(lowered, key="times", device=1, hit=False):
    """Runs a program on one device; `lowered` gets its factor if it is traced."""
    device = jax.devices()[device]

    def lower():
        factor = next(FACTORS)
        lowered.append(factor)
        program = jax.jit(lambda x: factor * x).lower(jax.device_put(jnp.ones(3), device))
        return types.SimpleNamespace(compile=lambda: compile(program))

    def compile(program):
        program_cache._hits.extend(["hit"] * hit)
        return program.compile()

    program = program_cache.load_or_compile(key, [device], lower)
    out = program(jax.device_put(jnp.arange(3.0), device))
    assert out.devices() == {device}
    return out[1]


def test_a_program_is_traced_once(folder, tmp_path, monkeypatch):
    lowered: list[int] = []
    assert load(lowered) == load(lowered)
    assert len(lowered) == 1 and folder.is_relative_to(tmp_path / "vop_jax/compiled")
    load(lowered, "another")
    load(lowered, device=2)
    monkeypatch.setattr(program_cache, "_code", lambda: "other code")
    load(lowered)
    assert len(lowered) == 4 and len([*folder.iterdir()]) == 4


def test_a_damaged_file_is_written_anew(folder):
    lowered: list[int] = []
    load(lowered)
    [file] = folder.iterdir()
    for content in (b"", file.read_bytes()[:-9]):
        file.write_bytes(content)
        load(lowered)
    assert load(lowered) == lowered[-1] and len(lowered) == 3


def test_a_program_from_the_cache_of_jax_is_not_written(folder):
    lowered: list[int] = []
    for _ in range(2):
        load(lowered, hit=True)
    assert len(lowered) == 2 and not folder.exists()


def test_without_a_folder_to_write_in(folder, tmp_path):
    (tmp_path / "vop_jax").write_text("a file")
    load([])
    assert [path.name for path in tmp_path.iterdir()] == ["vop_jax"]


def test_jax_can_be_told_to_keep_none(folder):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        load([])
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not folder.exists()


def test_the_folder_of_a_training_run(folder, tmp_path):
    for cache, expected in (("", str(folder)), ("off", None), (f"{tmp_path}/x", f"{tmp_path}/x")):
        jax.config.update("jax_compilation_cache_dir", None)
        program_cache.set_up(cache, tmp_path, "cpu")
        assert jax.config.values["jax_compilation_cache_dir"] == expected
    program_cache.set_up("", pathlib.Path("w"), "cpu")  # as $JAX_COMPILATION_CACHE_DIR
    assert jax.config.values["jax_compilation_cache_dir"] == f"{tmp_path}/x"
