"""How the tests' programs are compiled."""

# Most of the suite's time is LLVM's, whose optimizations matter to tiny programs that run once
# less than what they cost, and for which XLA's older way to emit a fusion makes less code (1.5 s
# instead of 5.2 for a tiny model's gradient). XLA's passes, which fuse and place and count, stay.
EMITTER = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"  # jax 0.10.0 to 0.11.2
QUICK_TO_COMPILE = f"--xla_backend_optimization_level=0 {EMITTER}"


def flags(devices: int, *, quick: bool = True) -> str:
    """The value of XLA_FLAGS for that many devices of a CPU.

    Args:
        quick: to compile, at the cost of the time to run.
    """
    count = f"--xla_force_host_platform_device_count={devices}"
    return f"{count} {QUICK_TO_COMPILE}" if quick else count
