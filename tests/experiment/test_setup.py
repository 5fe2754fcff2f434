"""The check of a run before its workdir is touched, and the attention kernel of its devices."""

import json
import re
import types

import numpy as np
import pytest
from etils import epath

from vop_jax.config import base as configs
from vop_jax.errors import UserError
from vop_jax.experiment import kernels, setup
from vop_jax.training import sharding


class Devices:
    """As much of a mesh as the choice of a kernel looks at."""

    def __init__(self, platform, version, data, model=1):
        client = types.SimpleNamespace(platform_version=version)
        device = types.SimpleNamespace(platform=platform, client=client)
        self.devices = np.array([device] * (data * model)).reshape(data, 1, model)
        self.shape = {"data": data, "fsdp": 1, "model": model}


@pytest.mark.parametrize(
    ("platform", "version", "shape", "dtype", "kernel"),
    [
        ("cpu", "cpu", (1,), "bfloat16", "xla"),
        ("tpu", "libtpu", (4,), "bfloat16", "xla"),
        ("gpu", "PJRT C API cuda 13000", (1,), "bfloat16", "fused"),
        ("gpu", "PJRT C API cuda 13000", (8,), "bfloat16", "fused"),
        ("gpu", "PJRT C API cuda 13000", (4, 2), "bfloat16", "cudnn"),
        ("gpu", "PJRT C API cuda 13000", (1,), "float32", "xla"),
        ("gpu", "PJRT C API rocm 60000", (1,), "bfloat16", "xla"),
    ],
)
def test_attention_is_by_default_what_the_device_has(platform, version, shape, dtype, kernel):
    config = configs.base_config()
    config.compute.dtype = dtype
    assert kernels.attention_kernel(config, Devices(platform, version, *shape)) == kernel
    config.compute.attention = "blocks"
    assert kernels.attention_kernel(config, Devices(platform, version, *shape)) == "blocks"


def test_a_store_without_its_package_is_told_by_its_key(monkeypatch):
    def missing(path):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(epath.Path("gs://b").__class__, "exists", missing)
    config = configs.base_config()
    config.init.clip = "gs://b/clip"
    says = "config.init.clip=gs://b/clip: Please install gcsfs; pip install -e '.[gcs]'"
    with pytest.raises(UserError, match=re.escape(says)):
        setup._check_paths(config)


@pytest.mark.parametrize(
    ("asked", "devices", "says"),
    [
        ("fused", Devices("cpu", "cpu", 1), "'fused': needs an NVIDIA GPU, not cpu"),
        ("cudnn", Devices("gpu", "rocm", 1), "'cudnn': needs an NVIDIA GPU, not gpu"),
        ("splash", Devices("gpu", "cuda", 1), "'splash': needs a TPU, not gpu"),
        (
            "splash",
            Devices("tpu", "libtpu", 4, 2),
            "set mesh.fsdp and mesh.model to 1; allowed on this mesh are auto, xla, blocks",
        ),
        (
            "fused",
            Devices("gpu", "cuda", 4, 2),
            "'fused': needs all parameters on every device, set mesh.fsdp and mesh.model to 1; "
            "allowed on this mesh are auto, cudnn, xla, blocks",
        ),
    ],
)
def test_a_kernel_that_the_devices_lack_is_refused(asked, devices, says):
    config = configs.base_config()
    config.compute.attention = asked
    with pytest.raises(UserError, match=re.escape(says)):
        kernels.check_kernel(config, devices)


@pytest.mark.parametrize(
    ("configured", "of_the_run", "expected"),
    [
        ("auto", None, "measured"),
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float32", "float32"),
        ("float32", "bfloat16", "float32"),  # which `_check_same_run` refuses
    ],
)
def test_a_run_continues_in_the_dtype_it_began_with(
    monkeypatch, tmp_path, configured, of_the_run, expected
):
    monkeypatch.setattr(setup.products, "fastest_dtype", lambda device: "measured")
    config, root = configs.base_config(), epath.Path(tmp_path)
    if of_the_run:
        config.compute.dtype = of_the_run
        (root / "checkpoints/4").mkdir(parents=True)
        (root / configs.CONFIG_FILE).write_text(json.dumps(config.to_dict()))
    config.compute.dtype = configured
    assert setup.resolved_dtype(config, root, sharding.make_mesh(1)) == expected
