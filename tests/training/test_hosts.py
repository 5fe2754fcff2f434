"""What several processes share, as far as one process shows it."""

import errno
import json
import os
import socket
import sys

import pytest

from tests import processes, runs
from vop_jax.errors import UserError
from vop_jax.training import hosts


def test_one_process_is_the_first_and_waits_for_nobody():
    assert hosts.is_first()
    assert hosts.on_first(lambda: {"a": 1}) == {"a": 1}
    hosts.agree({"config": "x"})
    assert hosts.on_all(lambda: "done") == "done"
    assert not hosts.preempted()


class Store:
    """What processes say to each other; `told` is what the others have said."""

    def __init__(self, told):
        self.told, self.said = told, []

    def key_value_set(self, key, value):
        self.said.append(json.loads(value))

    def blocking_key_value_get(self, key, timeout):
        place = int(key.rpartition("/")[2])
        return json.dumps(self.told if place == 1 else self.said[-1])


@pytest.fixture
def among_two(monkeypatch):
    """This process is the first of two; the other has found nothing wrong, or what is given."""

    def first(told=""):
        store = Store(told)
        monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
        monkeypatch.setattr(hosts, "_client", lambda: store)
        return store

    return first


def raises(error):
    raise error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("not there"), "not there"),
        (PermissionError(errno.EACCES, "Permission denied", "/root"), "/root: Permission denied"),
        (FULL, "/disk: no space left on the disk; free some, the same command continues"),
    ],
)
def test_what_is_wrong_in_one_is_told_to_the_others(among_two, error, told):
    store = among_two()
    with pytest.raises(UserError, match=told):
        hosts.on_all(lambda: raises(error))
    with pytest.raises(type(error)):
        hosts.on_first(lambda: raises(error))
    assert store.said == [told, {"error": told}]


def test_what_is_wrong_in_another_is_raised_here(among_two):
    among_two("not there")
    with pytest.raises(UserError, match="not there"):
        hosts.on_all(lambda: "done")
    among_two()
    assert hosts.on_all(lambda: "done") == "done"


def test_what_nobody_expected_is_not_told(among_two):
    store = among_two()
    for turn in (hosts.on_all, hosts.on_first):
        with pytest.raises(ZeroDivisionError):
            turn(lambda: 1 // 0)
    assert store.said == []


def test_every_wait_of_jax_takes_as_long_as_asked(monkeypatch):
    given = {}
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda **kwargs: given.update(kwargs))
    with runs.kept_signals():
        hosts.start("127.0.0.1:1", 2, 1, timeout=7)
    waits = {key: value for key, value in given.items() if "timeout" in key}
    assert len(waits) == 3 and set(waits.values()) == {7}


ALONE = """
from vop_jax.training import hosts
hosts.start("127.0.0.1:{port}", 2, {process}, timeout=2)
"""


@pytest.mark.parametrize("process", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_nobody_joins_says_where(process):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = free.getsockname()[1]
    alone = ALONE.format(port=where, process=process)
    found = processes.run([sys.executable, "-c", alone], env=runs.environment())
    assert found.returncode
    assert f"error: no run to join at 127.0.0.1:{where}: " in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, "--processes is missing: --coordinator, --processes, --process"),
        ({"processes": 2, "process": 0}, "--coordinator is missing"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "--coordinator=a: must be HOST:PORT"),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, "--processes=0: must be 1 or more"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "--process=2: must be 0 to 1"),
    ],
)
def test_a_start_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        hosts.start(**arguments)


SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, False),
        ({**SLURM, "SLURM_NTASKS": "2"}, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),  # one task: it is the run
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, False),  # a shell of salloc, not a step
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_a_cluster_is_seen_in_the_environment(environment, found):
    assert hosts._in_cluster(environment) == found


@pytest.mark.parametrize(
    ("tasks", "alone"), [("1(x4)", True), ("1", True), ("8(x4)", False), ("", False), ("12", False)]
)
def test_a_process_that_has_its_machine_to_itself_takes_all_gpus(tasks, alone):
    assert hosts._one_a_node({"SLURM_STEP_TASKS_PER_NODE": tasks}) == alone
