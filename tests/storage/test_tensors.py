import os
import shutil
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

BOTH = (("x", tensors.save, tensors.load), ("y", tensors.save_orbax, tensors.load_orbax))


def assert_same(a, b):
    a, b = tensors.flatten(a), tensors.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        np.testing.assert_array_equal(a[name], b[name])


def test_names_are_joined_and_sorted():
    assert list(tensors.flatten(TREE)) == ["a/c.0/i", "b/scalar", "b/w"]


NAMES = st.text("abc.", min_size=1, max_size=3)


@settings(max_examples=25)
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


def test_a_truncated_file(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors.save(path, TREE, {"kind": "test"})
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
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


def test_a_number_that_is_not_finite_is_named(tmp_path):
    for bad in (np.nan, np.inf, -np.inf):
        tree = {"a": {"b": np.array([1, bad, 2])}}
        for name, save, load in BOTH:
            save(tmp_path / name, tree, {})
            with pytest.raises(UserError, match=f"{name}: tensor a/b holds numbers that are not f"):
                load(tmp_path / name)


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


def test_an_orbax_folder_holds_the_same_and_replaces_another(tmp_path):
    path = tmp_path / "p.orbax"
    tensors.save_orbax(path, {"old": np.ones(2)}, {"format": "old"})
    tensors.save_orbax(path, TREE, {"format": "x"})
    tree, metadata = tensors.load_orbax(path)
    assert_same(tree, TREE)
    assert metadata == {"format": "x"}
    assert [f.name for f in tmp_path.iterdir()] == ["p.orbax"]


def test_a_damaged_orbax_folder_is_one_line(tmp_path):
    tensors.save_orbax(tmp_path / "whole", TREE, {})
    for number, (spoil, message) in enumerate(
        (
            (lambda p: (p / "metadata.json").unlink(), "not an orbax folder of this project"),
            (lambda p: (p / "metadata.json").write_text("{"), "not a readable orbax folder"),
            (lambda p: (p / "params/_METADATA").unlink(), "no params/_METADATA"),
            (lambda p: (p / "params/manifest.ocdbt").unlink(), "no params/manifest.ocdbt"),
        )
    ):
        path = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", path)
        spoil(path)
        with pytest.raises(UserError, match=message) as caught:
            tensors.load_orbax(path)
        assert "\n" not in str(caught.value)
