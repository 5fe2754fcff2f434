"""What several processes share, as far as one process shows it."""

import errno
import json
import os
import socket
import sys
from unittest import mock

import pytest

from tests import processes, runs
from vop_jax.errors import UserError
from vop_jax.training import hosts


def test_one_process_is_the_first_and_waits_for_nobody():
    assert hosts.is_first()
    assert hosts.on_first(lambda: {"a": 1}) == {"a": 1}
    hosts.agree({"config": "x"})
    assert hosts.largest(2) == 2
    assert hosts.on_all(lambda: "done") == "done"
    assert not hosts.preempted()


class Store:
    """The key-value store of two processes; process 1 always sends `other`."""

    def __init__(self, other):
        self.other, self.sent = other, []

    def key_value_set(self, key, value):
        self.sent.append(json.loads(value))

    def blocking_key_value_get(self, key, timeout):
        return json.dumps(self.other if key.endswith("/1") else self.sent[-1])


@pytest.fixture
def first_of_two(monkeypatch):
    """Makes this process the first of two, of which the other sends what is passed."""

    def make(other):
        store = Store(other)
        monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
        monkeypatch.setattr(hosts.multihost, "get_jax_distributed_client", lambda: store)
        return store

    return make


@pytest.mark.parametrize("run", [hosts.on_first, hosts.on_all])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("not there"), "not there"),
        (PermissionError(errno.EACCES, "Permission denied", "/root"), "/root: Permission denied"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk"),
            "/disk: no space left on the disk; free some, the same command continues",
        ),
    ],
)
def test_an_error_of_the_user_is_sent_to_the_other_processes(first_of_two, run, error, message):
    store = first_of_two({"result": None})
    with pytest.raises(type(error)):
        run(mock.Mock(side_effect=error))
    assert store.sent == [{"error": message}]


def test_results_are_sent_and_bugs_are_not(first_of_two):
    store = first_of_two({"result": None})
    for run in (hosts.on_all, hosts.on_first):
        with pytest.raises(ZeroDivisionError):
            run(lambda: 1 // 0)
    assert store.sent == []
    assert hosts.on_all(lambda: "done") == "done" and hosts.on_first(lambda: 3) == 3
    first_of_two({"result": 4})
    assert hosts.largest(2) == 4 and hosts.largest(8) == 8
    first_of_two({"error": "not there"})
    with pytest.raises(UserError, match="not there"):
        hosts.on_all(lambda: "done")


def test_facts_that_differ_are_named(first_of_two):
    first_of_two({"result": {"config": "another", "code": "another"}})
    with pytest.raises(UserError, match="process 1 has another config than process 0"):
        hosts.agree({"config": "x", "code": "y"})


def test_an_end_while_jax_waits_for_the_others_is_explained(monkeypatch, capfd):
    def abort(**arguments):
        """As jax's C++ runtime does: all pipes of the process are closed, and nothing is raised."""
        timeouts = [value for key, value in arguments.items() if "timeout" in key]
        assert timeouts == [7] * 3  # every wait has the same
        hosts._watcher.stdin.close()
        hosts._watcher.wait()
        monkeypatch.setattr(hosts, "_watcher", None)
        raise SystemExit

    monkeypatch.setattr(hosts.jax.distributed, "initialize", abort)
    with pytest.raises(SystemExit):
        hosts.start("127.0.0.1:1", 2, 0, timeout=7)
    assert "error: no run to join at 127.0.0.1:1: not all" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_nobody_joins_says_where(process):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    alone = f"""if True:
        from vop_jax.training import hosts
        hosts.start("{address}", 2, {process}, timeout=2)
    """
    done = processes.run([sys.executable, "-c", alone], env=runs.environment())
    assert done.returncode
    assert f"error: no run to join at {address}: " in done.stderr


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
def test_wrong_flags_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        hosts.start(**arguments)


SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "in_cluster"),
    [
        ({}, False),
        ({**SLURM, "SLURM_NTASKS": "2"}, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),  # the only task is the run
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, False),  # a shell of salloc, not a step
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_a_cluster_is_detected_in_the_environment(environment, in_cluster):
    assert hosts._in_cluster(environment) == in_cluster


@pytest.mark.parametrize(
    ("environment", "in_cluster"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_gke_is_detected_with_libtpu_installed(monkeypatch, environment, in_cluster):
    assert not hosts._in_cluster(environment)  # jax could not use the TPU
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu")
    assert hosts._in_cluster(environment) == in_cluster


@pytest.mark.parametrize(
    ("tasks", "alone"), [("1(x4)", True), ("1", True), ("8(x4)", False), ("", False), ("12", False)]
)
def test_a_process_that_has_its_machine_to_itself_takes_all_gpus(tasks, alone):
    assert hosts._one_process_per_node({"SLURM_STEP_TASKS_PER_NODE": tasks}) == alone
