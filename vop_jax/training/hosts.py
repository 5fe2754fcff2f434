"""Several processes, one run: how they start, agree, take turns, and stop together.

Without a cluster all of this does nothing: the one process is the first.
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
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from vop_jax import cli
from vop_jax.errors import UserError, as_user_error

T = TypeVar("T")

TIMEOUT = 100  # seconds after which a process that does not answer counts as dead
_turns = itertools.count()  # every process takes the same turns in the same order
_asked = itertools.count(1)  # of `preempted`


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout: int = TIMEOUT,
) -> None:
    """Joins the run's other processes; to be called before anything else of jax.

    Without arguments the cluster says who they are (a TPU slice, Slurm, Open MPI); outside of
    one the run is this process alone.

    Args:
        coordinator: HOST:PORT of the first process, for all the same.
        processes: how many there are.
        process: which one this is, from 0.
        timeout: seconds without an answer after which the others give a process up and end.

    Raises:
        UserError: only some of the arguments are given, or the others cannot be reached.
    """
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    arguments: dict[str, Any] = {
        "initialization_timeout": timeout,
        "heartbeat_timeout_seconds": timeout,
        "shutdown_timeout_seconds": timeout,
    }
    if not missing:
        _check_place(coordinator or "", processes or 0, process or 0)
        arguments |= {"coordinator_address": coordinator, "num_processes": processes}
        arguments |= {"process_id": process, "local_device_ids": []}  # []: all of this machine
    elif len(missing) < len(given):
        raise UserError(f"{missing[0]} is missing: --{', --'.join(given)} go together")
    elif not _in_cluster(os.environ):
        return
    elif _one_a_node(os.environ):
        arguments["local_device_ids"] = []  # else Slurm's processes take one GPU each
    where = coordinator or "the cluster's first process"
    _leave_last_words(f"error: no run to join at {where}: not all processes came there in time")
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"no run to join at {where}: {' '.join(str(error).split())}") from None
    finally:
        finish()
    if jax.process_count() > 1:
        _leave_last_words(
            f"error: process {jax.process_index()} of {jax.process_count()} ended before the run "
            "did, because it was killed or because another one died (its own log says why); what "
            "was saved is kept, the same command on all processes continues"
        )
    # A signal reaches one process; all of them stop after the same step, see `preempted`.
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def _check_place(coordinator: str, processes: int, process: int) -> None:
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator}: must be HOST:PORT of the first process")
    if processes < 1:
        raise UserError(f"--processes={processes}: must be 1 or more")
    if not 0 <= process < processes:
        raise UserError(f"--process={process}: must be 0 to {processes - 1}")


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax can find the other processes by itself."""

    def tasks(name: str) -> int:
        value = environment.get(name, "1")
        return int(value) if value.isdigit() else 1

    in_step = "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment
    on_tpu = importlib.util.find_spec("libtpu") and (
        glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    )
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or (in_step and tasks("SLURM_NTASKS") > 1)
        or tasks("OMPI_COMM_WORLD_SIZE") > 1
        or bool(on_tpu and environment.get("JAX_PLATFORMS", "tpu") != "cpu")
    )


def _one_a_node(environment: Mapping[str, str]) -> bool:
    """Whether each machine of a Slurm job runs one process, which then drives all its GPUs."""
    return (
        re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")) is not None
    )


_last_words: subprocess.Popen | None = None


def _leave_last_words(message: str) -> None:
    """What is said if this process ends without `finish`.

    When a process of the run dies or does not come, jax's C++ runtime aborts the others and Python
    has no say any more; so a shell waits behind a pipe for the end of this one.
    """
    global _last_words
    _last_words = subprocess.Popen(
        ["sh", "-c", 'read -r done || echo "$0" >&2', message],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C at the terminal is not for it
    )


def finish() -> None:
    """This process has said how it ends: nothing needs to be said for it."""
    global _last_words
    if _last_words is not None:
        _last_words.communicate(b"done\n")
        _last_words = None


def is_first() -> bool:
    """Whether this process is the one that writes logs and files."""
    return jax.process_index() == 0


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process; the others wait for it.

    Args:
        work: returns what JSON can hold. What is wrong for a user is raised in all processes.
    """
    if jax.process_count() == 1:
        return work()
    turn = f"vop_jax/turn/{next(_turns)}"
    if not is_first():
        outcome = json.loads(_wait_for(turn))
        if "error" in outcome:
            raise UserError(outcome["error"])
        return outcome["result"]
    try:
        result = work()
    except Exception as error:
        if (wrong := as_user_error(error)) is not None:
            _client().key_value_set(turn, json.dumps({"error": str(wrong)}))
        raise
    _client().key_value_set(turn, json.dumps({"result": result}))
    return result


def agree(facts: Mapping[str, str]) -> None:
    """Makes sure that all processes hold the same facts, such as {"config": "…"}.

    Raises:
        UserError: in every process, and names the first fact that differs and in which process.
    """
    if jax.process_count() == 1:
        return
    turn = f"vop_jax/turn/{next(_turns)}"
    mine = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in facts.items()}
    _client().key_value_set(f"{turn}/{jax.process_index()}", json.dumps(mine))

    def compare() -> None:
        for process in range(1, jax.process_count()):
            theirs = json.loads(_wait_for(f"{turn}/{process}"))
            for name, value in mine.items():
                if theirs.get(name) != value:
                    raise UserError(
                        f"process {process} has another {name} than process 0: all processes of "
                        "a run need the same command, code and data"
                    )

    on_first(compare)


def on_all(work: Callable[[], T]) -> T:
    """What `work` returns in this process; what is wrong for a user in one is raised in all."""
    if jax.process_count() == 1:
        return work()
    turn, said, done = f"vop_jax/turn/{next(_turns)}", "", []
    try:
        done.append(work())
    except Exception as error:
        if (wrong := as_user_error(error)) is None:
            raise
        said = str(wrong)
    _client().key_value_set(f"{turn}/{jax.process_index()}", json.dumps(said))
    for process in range(jax.process_count()):
        if theirs := json.loads(_wait_for(f"{turn}/{process}")):
            raise UserError(theirs)
    return done[0]


def preempted() -> bool:
    """Whether all processes shall stop after this step, since one of them got SIGTERM.

    To be asked after every step by all of them; they get the same answer at the same step. jax has
    them stop at the number after the largest that one has asked with, and at no other: so it is
    counted how often they asked. The step would be beyond that number where a run that continues
    gets the signal before its first.
    """
    return jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(
        next(_asked)
    )


def stop() -> None:
    """Ends a run that was `preempted`; exit status 143."""
    raise cli.Interrupted(signal.SIGTERM)


def _client() -> Any:
    return multihost.get_jax_distributed_client()


def _wait_for(key: str) -> str:
    """The value of a key once it is there; a process that dies meanwhile ends this one."""
    while True:
        try:
            return _client().blocking_key_value_get(key, 60_000)  # milliseconds
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            logging.info("still waiting for another process")
