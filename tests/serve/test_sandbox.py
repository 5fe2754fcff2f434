"""A decoder that goes wrong costs its request, and no more."""

import concurrent.futures
import contextlib
import os
import signal
import threading

import pytest

from tests.serve import treacherous
from vop_jax.errors import VideoError
from vop_jax.serve import sandbox as sandboxes
from vop_jax.serve.sandbox import Busy, Sandbox


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox(1, seconds=2.0, memory=1 << 30, waiting=4)
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (treacherous.crash, "crashed .SIGABRT"),
        (treacherous.hang, "more than 2 s"),
        (treacherous.swell, "too much memory"),
        (treacherous.fail, "^not decodable$"),
    ],
)
def test_what_goes_wrong_is_a_video_error_and_the_next_call_works(sandbox, call, reason):
    with pytest.raises(VideoError, match=reason):
        sandbox.submit(call).result(60)
    assert sandbox.submit(treacherous.echo, 1, "two").result(60) == (1, "two")


def test_one_process_does_all_calls_and_is_replaced_when_it_dies_idle(sandbox):
    first = sandbox.submit(treacherous.process).result(60)
    assert sandbox.submit(treacherous.process).result(60) == first != os.getpid()
    os.kill(first, signal.SIGKILL)
    with pytest.raises(VideoError, match="SIGKILL"):
        sandbox.submit(treacherous.process).result(60)
    assert sandbox.submit(treacherous.process).result(60) != first


def test_no_file_is_written_by_a_decoder(sandbox, tmp_path):
    with pytest.raises(VideoError, match="not decodable"):
        sandbox.submit(treacherous.write, tmp_path / "file").result(60)
    assert not (tmp_path / "file").read_bytes()


def test_a_queue_is_bounded(sandbox):
    futures = [sandbox.submit(treacherous.hang)]
    with pytest.raises(Busy):
        for _ in range(6):
            futures.append(sandbox.submit(treacherous.echo))
    assert len(futures) in (4, 5)  # the first is taken, or not yet
    for future in futures[1:]:
        future.cancel()
    with pytest.raises(VideoError, match="more than"):
        futures[0].result(60)


def test_processes_that_cannot_start_are_told_of_and_tried_again(monkeypatch):
    broken, real = threading.Event(), sandboxes.in_processes

    def in_processes(*arguments, **options):
        if broken.is_set():
            raise RuntimeError("no more processes")
        return real(*arguments, **options)

    broken.set()
    monkeypatch.setattr(sandboxes, "RETRY", 0.05)
    monkeypatch.setattr(sandboxes, "in_processes", in_processes)
    sandbox = Sandbox(1, seconds=30.0)
    with pytest.raises(Busy, match="no decoder could be started"):
        sandbox.submit(treacherous.echo).result(30)
    broken.clear()
    for _ in range(10):
        with contextlib.suppress(Busy):  # a try that had begun
            assert sandbox.submit(treacherous.echo, "a").result(60) == ("a",)
            break
    else:
        pytest.fail("not tried again")
    sandbox.close()


def test_one_process_that_cannot_start_costs_nobody_while_another_runs(monkeypatch):
    real, started = sandboxes.in_processes, threading.Event()

    def in_processes(*arguments, **options):
        if threading.current_thread().name.endswith("-1"):
            started.wait(60)
            raise RuntimeError("no more processes")
        return real(*arguments, **options)

    monkeypatch.setattr(sandboxes, "RETRY", 0.05)
    monkeypatch.setattr(sandboxes, "in_processes", in_processes)
    sandbox = Sandbox(2, seconds=30.0)
    assert sandbox.submit(treacherous.echo, "a").result(60) == ("a",)
    started.set()
    futures = [sandbox.submit(treacherous.echo, i) for i in range(20)]
    assert [future.result(60) for future in futures] == [(i,) for i in range(20)]
    sandbox.close()


def test_its_end_cancels_what_waits():
    sandbox = Sandbox(1, seconds=30.0)
    futures = [sandbox.submit(treacherous.hang), sandbox.submit(treacherous.echo)]
    sandbox.close()
    with pytest.raises(concurrent.futures.CancelledError):
        futures[1].result(10)
