"""How the tests' programs are compiled."""

# Tiny programs that run once: LLVM's optimizations cost them more than they save, and XLA's older
# emitter makes less code (a gradient compiles in 1.5 s instead of 5.2). XLA's passes, which fuse
# and place and count, stay. What users run is in the slow tests with `quick=False`.
EMITTER = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"  # jax 0.10.0 to 0.11.2
CACHE_BYTES = 1 << 33  # of compiled programs, more than tests make
QUICK_TO_COMPILE = f"--xla_backend_optimization_level=0 {EMITTER}"


def flags(devices: int, *, quick: bool = True) -> str:
    """The value of XLA_FLAGS for that many devices of a CPU.

    Args:
        quick: to compile, at the cost of the time to run.
    """
    count = f"--xla_force_host_platform_device_count={devices}"
    return f"{count} {QUICK_TO_COMPILE}" if quick else count
