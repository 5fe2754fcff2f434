"""Which attention kernel the devices of a mesh can run."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vop_jax.clip.layers import Kernel
from vop_jax.config import base as configs
from vop_jax.errors import UserError
from vop_jax.training import sharding


def check_kernel(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if these devices lack the configured `compute.attention`."""
    kernel, platform = config.compute.attention, platform_of(mesh)
    if kernel in configs.ON_CUDA and not _on_cuda(mesh):
        raise UserError(f"config.compute.attention={kernel!r}: needs an NVIDIA GPU, not {platform}")
    if kernel == "splash" and platform != "tpu":
        raise UserError(f"config.compute.attention={kernel!r}: needs a TPU, not {platform}")
    if kernel in ("fused", "splash") and sharding.shards_parameters(mesh):
        # The compiler cannot divide a kernel among devices.
        cudnn = "cudnn, " if _on_cuda(mesh) else ""
        raise UserError(
            f"config.compute.attention={kernel!r}: needs all parameters on every device, set "
            f"mesh.fsdp and mesh.model to 1; allowed on this mesh are auto, {cudnn}xla, blocks"
        )


def attention_kernel(config: ConfigDict, mesh: Mesh) -> Kernel:
    """The configured `compute.attention`, with auto resolved for these devices."""
    kernel = config.compute.attention
    return best_kernel(config.compute.dtype, mesh) if kernel == "auto" else kernel


def best_kernel(dtype: str, mesh: Mesh) -> Kernel:
    """The fastest attention kernel for this dtype on these devices."""
    if not _on_cuda(mesh) or dtype != "bfloat16":
        return "xla"
    return "cudnn" if sharding.shards_parameters(mesh) else "fused"


def _on_cuda(mesh: Mesh) -> bool:
    version = mesh.devices.flat[0].client.platform_version
    return platform_of(mesh) == "gpu" and "rocm" not in version.lower()


def platform_of(mesh: Mesh) -> str:
    """cpu, gpu or tpu."""
    return mesh.devices.flat[0].platform
