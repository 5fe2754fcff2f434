"""Several processes, one run: how they start, share results, and stop together.

In a run of one process the same functions return at once.
"""

import glob
import hashlib
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from vop_jax.cli import as_user_error
from vop_jax.errors import UserError

T = TypeVar("T")

TIMEOUT = 100  # seconds after which a process that does not answer counts as dead
_exchange_numbers = itertools.count()  # every process makes the same exchanges in the same order
_preemption_checks = itertools.count(1)


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = TIMEOUT,
) -> None:
    """Joins the run's other processes; call it before anything else of jax.

    Without arguments the processes of a cluster (a TPU slice, Slurm, Open MPI) discover each
    other; outside of a cluster the run is this process alone.

    Args:
        coordinator: HOST:PORT of the first process, the same for all.
        processes: how many there are.
        process: the number of this one, from 0.
        timeout: seconds without an answer after which the others give a process up and end.

    Raises:
        UserError: only some of the arguments are set, or the others cannot be reached.
    """
    flags = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    arguments: dict[str, Any] = {
        "initialization_timeout": timeout,
        "heartbeat_timeout_seconds": timeout,
        "shutdown_timeout_seconds": timeout,
    }
    if not missing:
        _check_flags(coordinator or "", processes or 0, process or 0)
        arguments |= {"coordinator_address": coordinator, "num_processes": processes}
        arguments |= {"process_id": process, "local_device_ids": []}  # []: all of this machine
    elif len(missing) < len(flags):
        raise UserError(f"{missing[0]} is missing: --{', --'.join(flags)} go together")
    elif not _in_cluster(os.environ):
        return
    elif _one_process_per_node(os.environ):
        arguments["local_device_ids"] = []  # else Slurm's processes take one GPU each
    where = coordinator or "the cluster's first process"
    _print_at_death(f"error: no run to join at {where}: not all processes came there in time")
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"no run to join at {where}: {' '.join(str(error).split())}") from None
    finally:
        finish()
    if jax.process_count() > 1:
        _print_at_death(
            f"error: process {jax.process_index()} of {jax.process_count()} ended before the run "
            "did, because it was killed or because another one died (its own log says why); what "
            "was saved is kept, the same command on all processes continues"
        )
    # A signal reaches one process; all of them stop after the same step, see `preempted`.
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def _check_flags(coordinator: str, processes: int, process: int) -> None:
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator}: must be HOST:PORT of the first process")
    if processes < 1:
        raise UserError(f"--processes={processes}: must be 1 or more")
    if not 0 <= process < processes:
        raise UserError(f"--process={process}: must be 0 to {processes - 1}")


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax can find the other processes without arguments."""

    def several(name: str) -> bool:
        value = environment.get(name, "1")
        return value.isdigit() and int(value) > 1

    in_slurm_step = "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment
    on_tpu = importlib.util.find_spec("libtpu") and (
        "TPU_WORKER_HOSTNAMES" in environment  # GKE sets it
        or glob.glob("/dev/accel[0-9]*")
        or glob.glob("/dev/vfio/[0-9]*")
    )
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or (in_slurm_step and several("SLURM_NTASKS"))
        or several("OMPI_COMM_WORLD_SIZE")
        or bool(on_tpu and environment.get("JAX_PLATFORMS", "tpu") != "cpu")
    )


def _one_process_per_node(environment: Mapping[str, str]) -> bool:
    """Whether each machine of a Slurm job runs one process, which then drives all its GPUs."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return re.fullmatch(r"1(\(x\d+\))?", tasks) is not None


_watcher: subprocess.Popen[bytes] | None = None


def _print_at_death(message: str) -> None:
    """Has `message` printed if this process ends without a call of `finish`.

    When a process of the run dies or does not come, jax's C++ runtime aborts the others without
    a way for Python to explain it; so a shell waits behind a pipe for the end of this process.
    """
    global _watcher
    _watcher = subprocess.Popen(
        ["sh", "-c", 'read -r done || echo "$0" >&2', message],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # so that a Ctrl-C at the terminal does not reach it
    )


def finish() -> None:
    """Ends the watch over this process, which reports its own end."""
    global _watcher
    if _watcher is not None:
        _watcher.communicate(b"done\n")
        _watcher = None


def is_first() -> bool:
    """Whether this process is the one that writes logs and files."""
    return jax.process_index() == 0


def on_first(work: Callable[[], T]) -> T:
    """Runs `work` in the first process and returns its result in all of them.

    Args:
        work: returns what JSON can hold. An error of the user is raised in all processes.
    """
    if jax.process_count() == 1:
        return work()
    return _exchange(work if is_first() else None, [0])[0]


def on_all(work: Callable[[], T]) -> T:
    """Runs `work` in every process, each with its own result.

    An error of the user in one process is raised in all of them.
    """
    if jax.process_count() == 1:
        return work()
    results: list[T] = []
    _exchange(lambda: results.append(work()), range(jax.process_count()))
    return results[0]


def agree(facts: Mapping[str, str]) -> None:
    """Checks that all processes have the same facts, such as {"config": "…"}.

    Raises:
        UserError: in every process; it names the first fact that differs and in which process.
    """
    if jax.process_count() == 1:
        return
    digests = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in facts.items()}
    first, *others = _exchange(lambda: digests, range(jax.process_count()))
    for process, theirs in enumerate(others, 1):
        for name, digest in first.items():
            if theirs.get(name) != digest:
                raise UserError(
                    f"process {process} has another {name} than process 0: all processes of a "
                    "run need the same command, code and data"
                )


def largest(number: int) -> int:
    """The largest of the numbers that the processes have."""
    if jax.process_count() == 1:
        return number
    return max(_exchange(lambda: number, range(jax.process_count())))


def _exchange(work: Callable[[], Any] | None, senders: Iterable[int]) -> list[Any]:
    """Sends what `work` returns, as JSON, to all processes; returns the results of all `senders`.

    Args:
        work: None in a process that sends nothing.

    Raises:
        UserError: `work` raised it in one of the senders.
    """
    key = f"vop_jax/exchange/{next(_exchange_numbers)}"
    client, own = multihost.get_jax_distributed_client(), f"{key}/{jax.process_index()}"
    if work is not None:
        try:
            outcome = {"result": work()}
        except Exception as error:
            # Another error ends this process, and jax then ends those that wait for it.
            if (user_error := as_user_error(error)) is not None:
                client.key_value_set(own, json.dumps({"error": str(user_error)}))
            raise
        client.key_value_set(own, json.dumps(outcome))
    outcomes = [json.loads(_wait_for(client, f"{key}/{sender}")) for sender in senders]
    for outcome in outcomes:
        if "error" in outcome:
            raise UserError(outcome["error"])
    return [outcome["result"] for outcome in outcomes]


def _wait_for(client: Any, key: str) -> str:
    """The value of a key as soon as it is set; a process that dies meanwhile ends this one."""
    while True:
        try:
            return client.blocking_key_value_get(key, 60_000)  # milliseconds
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            logging.info("still waiting for another process")


def preempted() -> bool:
    """Whether all processes should stop after this step because one of them got SIGTERM.

    Every process calls this after every step and gets the same answer at the same step. jax stops
    them at the call after the latest that any of them has made; calls are counted here instead of
    steps, since a resumed run may get the signal before its first step.
    """
    return jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(
        next(_preemption_checks)
    )
