import json
import os
import pathlib
import resource
import stat
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from vop_jax.errors import UserError
from vop_jax.storage import files, tensors

TREE: dict[str, Any] = {
    "b": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.float32(2.5)},
    "a": {"c.0": {"i": np.array([1, 2], np.int32)}},
}


def assert_same(a, b):
    a, b = tensors.flatten(a), tensors.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        np.testing.assert_array_equal(a[name], b[name])


def test_names_are_joined_and_sorted():
    assert list(tensors.flatten(TREE)) == ["a/c.0/i", "b/scalar", "b/w"]


NAMES = st.text("abc.", min_size=1, max_size=3)


@given(
    st.recursive(
        st.dictionaries(NAMES, st.integers(), min_size=1),
        lambda t: st.dictionaries(NAMES, t, min_size=1),
        max_leaves=8,
    )
)
def test_unflatten_is_the_inverse(tree):
    assert tensors.unflatten(tensors.flatten(tree)) == tree


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    metadata = {"kind": "test", "note": "é\n"}
    tensors.save(path, TREE, metadata)
    tree, read = tensors.load(path)
    assert_same(tree, TREE)
    assert read == tensors.read_metadata(path)
    assert read.pop(tensors.CHECKSUM) and read == metadata
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_round_trip_of_device_arrays_and_views(tmp_path):
    tensors.save(tmp_path / "x", {"t": TREE["b"]["w"].T, "j": jnp.ones((2, 2))}, {})
    tree, _ = tensors.load(tmp_path / "x")
    np.testing.assert_array_equal(tree["t"], TREE["b"]["w"].T)
    np.testing.assert_array_equal(tree["j"], np.ones((2, 2)))


def test_equal_trees_are_equal_files(tmp_path):
    metadata = {key: key for key in "zyxwvutsrq"}
    backwards = dict(reversed(metadata.items()))
    tensors.save(tmp_path / "one", TREE, metadata)
    tensors.save(tmp_path / "two", dict(reversed(TREE.items())), backwards)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_no_file(tmp_path):
    for read in (tensors.load, tensors.read_metadata):
        with pytest.raises(UserError, match=r"x\.safetensors: no such file"):
            read(tmp_path / "x.safetensors")


def test_a_directory(tmp_path):
    with pytest.raises(UserError, match="is a directory, not a safetensors file"):
        tensors.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"short", b"PK\3\4" + bytes(100), b"\xff" * 100])
def test_another_kind_of_file(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (tensors.load, tensors.read_metadata):
        with pytest.raises(UserError, match="not a readable safetensors file") as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_may_not_be_opened_says_why(tmp_path):
    os.mknod(tmp_path / "x", stat.S_IFSOCK)  # to root, too, as one of another user
    for read in (tensors.load, tensors.read_metadata):
        with pytest.raises(UserError, match="x: No such device or address"):
            read(tmp_path / "x")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_file(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    tensors.save(path, TREE, {"kind": "test"})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        tensors.load(path)


def test_a_changed_byte_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors.save(path, TREE, {"heads": "12"})
    whole = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, (start + len(whole)) // 2, len(whole) - 1, whole.index(b'"12"') + 1):
        changed = whole.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"x\.safetensors: (damaged|tensor|not a readable)"):
            tensors.load(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named(tmp_path, bad):
    tensors.save(tmp_path / "x", {"a": {"b": np.array([1, bad, 2])}}, {})
    with pytest.raises(UserError, match="x: tensor a/b holds numbers that are not finite"):
        tensors.load(tmp_path / "x")


@contextmanager
def full_disk():
    """Files cannot grow beyond 10 kB: a write ends half way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path, large = tmp_path / "x.safetensors", {"w": np.zeros(10_000, np.float32)}
    tensors.save(path, TREE, {"version": "old"})
    old = path.read_bytes()
    for write in (
        lambda: tensors.save(path, large, {"version": "new"}),
        lambda: files.write_atomic(path, bytes(20_000)),
    ):
        with full_disk(), pytest.raises((OSError, SafetensorError), match="File too large"):
            write()
        assert path.read_bytes() == old
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
    tensors.save(path, large, {"version": "new"})
    assert tensors.read_metadata(path)["version"] == "new"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tensors.epath.Path(tmp_path)), "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "x", b"data")
    assert not list(tmp_path.iterdir())


def test_files_have_usual_permissions(tmp_path):
    files.write_atomic(tmp_path / "x", b"")
    tensors.save(tmp_path / "y", TREE, {})
    (tmp_path / "z").write_bytes(b"")
    modes = {stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in "xyz"}
    assert len(modes) == 1


def test_json(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": [1, 2.5, "é"]})
    text = pathlib.Path(tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": [1, 2.5, "é"]} and text.endswith("}\n")


def test_a_fingerprint_is_independent_of_order_container_and_exact_casts():
    value = np.arange(6, dtype=np.float16).reshape(2, 3)
    one = {"a": {"x": value.astype(np.float32), "y": np.zeros(2, np.float32)}}
    assert len(tensors.fingerprint(one)) == 64
    for other in (
        {"a": {"y": np.zeros(2), "x": value.astype(np.float64)}},
        {"a": {"x": value, "y": jnp.zeros(2)}},
        {"a": {"x": np.asfortranarray(value), "y": np.zeros(2, ">f4")}},
    ):
        assert tensors.fingerprint(other) == tensors.fingerprint(one)


def test_a_fingerprint_differs_by_name_shape_and_value():
    trees: list[dict[str, Any]] = [
        {"a": np.zeros((2, 3))},
        {"b": np.zeros((2, 3))},
        {"a": np.zeros((3, 2))},
        {"a": np.zeros(6)},
        {"a": np.full((2, 3), np.float32(1e-45))},
        {"a": {"a": np.zeros((2, 3))}},
        {},
    ]
    assert len({tensors.fingerprint(tree) for tree in trees}) == len(trees)
