"""Our datasets in scenic's registry: in a stand-in for it, and in the real one."""

import sys
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import runs
from vop_jax.data.tokenizer import CaptionTokenizer
from vop_jax.errors import UserError
from vop_jax.interop import scenic, scenic_data


@pytest.fixture
def registry(monkeypatch):
    """{name: builder} of a stand-in for scenic's registry, which refuses a second builder."""
    builders = {}

    def add_dataset(name):
        assert name not in builders
        return lambda builder: builders.setdefault(name, builder)

    modules = {name: types.ModuleType(name) for name in ("scenic", "scenic.dataset_lib")}
    datasets = types.ModuleType("scenic.dataset_lib.datasets")
    datasets.add_dataset = add_dataset
    datasets.DatasetRegistry = types.SimpleNamespace(list=lambda: list(builders))
    utils = types.ModuleType("scenic.dataset_lib.dataset_utils")
    utils.Dataset = types.SimpleNamespace
    for module in (*modules.values(), datasets, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return builders


@pytest.fixture
def configs(folder):
    return {
        "annotations": str(folder / "captions.csv"),
        "videos": str(folder / "videos"),
        "records": str(folder / "records"),
        "num_frames": 3,
        "min_resize": 32,
        "crop_size": 16,
        "max_num_words": 24,
        "threads": 2,
    }


def build(configs, **changed):
    """Builds as scenic's `train_utils.get_dataset` does on 8 devices."""
    arguments = {
        "batch_size": 8,
        "eval_batch_size": 16,
        "num_shards": 8,
        "dtype_str": "uint8",
        "rng": jax.random.PRNGKey(0),
        "shuffle_seed": None,
        "dataset_service_address": None,
    }
    return scenic_data.build(**{**arguments, **changed}, dataset_configs=ConfigDict(configs))


def test_batches_have_scenic_s_axes_mask_and_seed(registry, configs):
    for _ in range(2):
        scenic.register_dataset()
    assert registry == {"vop_jax": scenic_data.build}
    data = build(configs)
    batch = next(data.train_iter)
    assert batch["frames"].shape == (8, 1, 3, 16, 16, 3) and batch["frames"].dtype == np.uint8
    assert batch["ids"].shape == (8, 1, 24) and batch["ids"].dtype == np.int32
    np.testing.assert_array_equal(batch["batch_mask"], np.ones((8, 1), np.float32))
    other = next(build(configs, rng=jax.random.PRNGKey(1)).train_iter)
    assert (batch["ids"] != other["ids"]).any()
    assert data.valid_iter is None
    assert data.meta_data == {
        "input_shape": (-1, 3, 16, 16, 3),
        "input_dtype": np.uint8,
        "text_shape": (-1, 24),
        "num_train_examples": runs.TRAIN,
        "num_eval_examples": 0,
        "num_test_examples": runs.TEST,
        "target_is_onehot": False,
    }


def test_evaluation_repeats_and_masks_padded_rows(registry, configs):
    captions = [f"clip number {runs.TRAIN + i}" for i in range(runs.TEST)]
    expected = CaptionTokenizer(24)(captions)
    data = build(configs | {"val_share": 0.3})
    for _ in range(2):  # passes of one batch
        batch = next(data.test_iter)
        mask = batch["batch_mask"].reshape(-1)
        np.testing.assert_array_equal(mask, [1] * runs.TEST + [0] * (16 - runs.TEST))
        ids = batch["ids"].reshape(16, 24)
        np.testing.assert_array_equal(ids[: runs.TEST], expected)
        assert not ids[runs.TEST :].any() and not batch["frames"].reshape(16, -1)[-1].any()
    counts = [data.meta_data[f"num_{s}_examples"] for s in ("train", "eval")]
    assert sum(counts) == runs.TRAIN and min(counts) > 0
    assert next(data.valid_iter)["batch_mask"].sum() == counts[1]


def test_processes_share_a_batch_in_their_order_of_one_seed_in_any_dtype(
    registry, configs, monkeypatch
):
    monkeypatch.setattr(scenic_data, "packed_once", lambda load: load())

    def batch(process=0, count=1, **changed):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        data = build(configs, batch_size=8 // count, num_shards=None, **changed)
        return next(data.train_iter)

    one = batch(shuffle_seed=3)
    halves = [batch(i, 2, shuffle_seed=3, rng=None, dtype_str="float32") for i in (0, 1)]
    both = {name: np.concatenate([half[name] for half in halves]) for name in ("ids", "frames")}
    np.testing.assert_array_equal(both["ids"], one["ids"])
    assert one["frames"].shape == (8, 3, 16, 16, 3) and both["frames"].dtype == np.float32
    np.testing.assert_allclose(both["frames"], one["frames"] / 255, atol=1e-7)
    assert (one["ids"] != batch(shuffle_seed=4)["ids"]).any()


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({"records": None}, {}, r"dataset_configs\.records: must be the folder"),
        ({"stride": 2}, {}, r"dataset_configs\.stride: not a field of vop_jax"),
        ({"text_buckets": (8,)}, {}, r"dataset_configs\.text_buckets: only runs"),
        ({"num_frames": 0}, {}, r"data\.frames=0"),
        ({"num_frames": "3"}, {}, r"data\.frames='3'"),
        ({"train_split": "nowhere"}, {}, "train_split='nowhere': no such split"),
        ({}, {"dtype_str": "bfloat16"}, "data_dtype_str='bfloat16': allowed"),
        ({}, {"dataset_service_address": "grpc://x"}, "dataset_service_address"),
    ],
)
def test_wrong_fields_are_refused(registry, configs, fields, arguments, message):
    with pytest.raises(UserError, match=message):
        build(configs | fields, **arguments)


def test_scenic_s_own_calls(real_scenic, configs):
    from scenic.dataset_lib import dataset_utils
    from scenic.train_lib import train_utils

    scenic.register_dataset()
    config = ConfigDict({"dataset_name": "vop_jax", "dataset_configs": configs})
    config.update(batch_size=16, eval_batch_size=8, data_dtype_str="uint8", num_training_steps=2)
    data = train_utils.get_dataset(config, jax.random.PRNGKey(0))
    assert isinstance(data, dataset_utils.Dataset)
    devices = jax.local_device_count()
    batch = next(data.train_iter)
    assert batch["frames"].shape == (devices, 16 // devices, 3, 16, 16, 3)
    # What scenic's pmapped trainers do with a batch.
    mean = jax.pmap(
        lambda b: jax.lax.pmean(b["frames"].astype("float32").mean(), "batch"), axis_name="batch"
    )(batch)
    np.testing.assert_allclose(mean, batch["frames"].mean(), rtol=1e-5)
    assert dataset_utils.unshard(batch)["ids"].shape == (16, 24)
    assert train_utils.get_num_training_steps(config, data.meta_data)[0] == 2
