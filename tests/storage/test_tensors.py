import os
import stat
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop_jax.errors import UserError
from vop_jax.storage import tensors

TREE: dict[str, Any] = {
    "b": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.float32(2.5)},
    "a": {"c.0": {"i": np.array([1, 2], np.int32)}},
}

ONES = np.ones((2, 2), np.float32)
BOTH = (("x", tensors.save, tensors.load), ("y", tensors.save_orbax, tensors.load_orbax))


def assert_same(a, b):
    a, b = tensors.flatten(a), tensors.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        np.testing.assert_array_equal(a[name], b[name])


NAMES = st.text("abc.", min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(
    st.recursive(
        st.dictionaries(NAMES, st.integers(), min_size=1),
        lambda t: st.dictionaries(NAMES, t, min_size=1),
        max_leaves=8,
    )
)
def test_unflatten_is_the_inverse(tree):
    assert tensors.unflatten(tensors.flatten(tree)) == tree


@pytest.mark.parametrize(("save", "load"), [BOTH[0][1:], BOTH[1][1:]])
def test_round_trip(tmp_path, save, load):
    """Of arrays on a device and views, too; what was there is replaced."""
    metadata = {"kind": "test", "note": "é\n"}
    save(tmp_path / "new/x", {"old": np.ones(2)}, {"format": "old"})
    save(tmp_path / "new/x", TREE | {"t": TREE["b"]["w"].T, "j": jnp.ones((2, 2))}, metadata)
    tree, read = load(tmp_path / "new/x")
    assert_same(tree, TREE | {"t": np.array([[0, 3], [1, 4], [2, 5]], np.float32), "j": ONES})
    if save is tensors.save:
        assert read == tensors.read_metadata(tmp_path / "new/x") and read.pop(tensors.CHECKSUM)
    assert read == metadata
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x"]


def test_equal_trees_are_equal_files(tmp_path):
    metadata = {key: key for key in "zyxwvutsrq"}
    backwards = dict(reversed(metadata.items()))
    tensors.save(tmp_path / "one", TREE, metadata)
    tensors.save(tmp_path / "two", dict(reversed(TREE.items())), backwards)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x: no such file"),
        ("directory", "is a directory, not a safetensors file"),
        ("socket", "x: No such device or address"),  # as a file of another user
        (b"", "not a readable safetensors file"),
        (b"short", "not a readable safetensors file"),
        (b"PK\3\4" + bytes(100), "not a readable safetensors file"),
        (b"\xff" * 100, "not a readable safetensors file"),
    ],
)
def test_a_path_without_a_safetensors_file_is_one_line(tmp_path, content, message):
    if content == "directory":
        (tmp_path / "x").mkdir()
    elif content == "socket":
        os.mknod(tmp_path / "x", stat.S_IFSOCK)
    elif content is not None:
        (tmp_path / "x").write_bytes(content)
    for read in (tensors.load, tensors.read_metadata):
        with pytest.raises(UserError, match=message) as caught:
            read(tmp_path / "x")
        assert str(tmp_path / "x") in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_file_and_a_changed_byte(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors.save(path, TREE, {"heads": "12"})
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, (start + len(whole)) // 2, len(whole) - 1, whole.index(b'"12"') + 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"x\.safetensors: (damaged|tensor|not a readable)"):
            tensors.load(path)
    for size in (9, start, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a readable safetensors file"):
            tensors.load(path)


def test_a_number_that_is_not_finite_is_named(tmp_path):
    for bad in (np.nan, np.inf, -np.inf):
        tree = {"a": {"b": np.array([1, bad, 2])}}
        for name, save, load in BOTH:
            save(tmp_path / name, tree, {})
            with pytest.raises(UserError, match=f"{name}: tensor a/b holds numbers that are not f"):
                load(tmp_path / name)


def test_a_fingerprint():
    """Differs by name, shape and value, not by order, container and exact casts."""
    value = np.arange(6, dtype=np.float16).reshape(2, 3)
    one = {"a": {"x": value.astype(np.float32), "y": np.zeros(2, np.float32)}}
    assert len(tensors.fingerprint(one)) == 64
    for same in (
        {"a": {"y": np.zeros(2), "x": value.astype(np.float64)}},
        {"a": {"x": value, "y": jnp.zeros(2)}},
        {"a": {"x": np.asfortranarray(value), "y": np.zeros(2, ">f4")}},
    ):
        assert tensors.fingerprint(same) == tensors.fingerprint(one)
    zeros = np.zeros((2, 3))
    trees: list[dict[str, Any]] = [{}, {"a": zeros}, {"b": zeros}, {"a": {"a": zeros}}]
    trees += [{"a": x} for x in (zeros.T, zeros.ravel(), zeros + np.float32(1e-45))]
    assert len({tensors.fingerprint(tree) for tree in trees}) == len(trees)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.json", None, "not an orbax folder of this project"),
        ("metadata.json", "{", "not a readable orbax folder"),
        ("params/_METADATA", None, "no params/_METADATA"),
        ("params/manifest.ocdbt", None, "no params/manifest.ocdbt"),
    ],
)
def test_a_damaged_orbax_folder_is_one_line(tmp_path, name, content, message):
    tensors.save_orbax(tmp_path / "x", {"a": np.ones(2)}, {})
    (tmp_path / "x" / name).unlink()
    if content:
        (tmp_path / "x" / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        tensors.load_orbax(tmp_path / "x")
    assert "\n" not in str(caught.value)
