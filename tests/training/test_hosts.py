"""What several processes share, as far as one process shows it; tests/test_hosts.py has two."""

import pytest

from vop_jax.errors import UserError
from vop_jax.training import hosts


def test_one_process_is_the_first_and_waits_for_nobody():
    assert hosts.is_first()
    assert hosts.on_first(lambda: {"a": 1}) == {"a": 1}
    hosts.agree({"config": "x"})
    done: list[int] = []
    hosts.in_all(lambda: done.append(1))
    assert done == [1]
    assert not hosts.preempted(3)


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
