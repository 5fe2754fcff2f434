"""What all programs share: help, how errors and signals become an exit status, broken pipes."""

import errno
import importlib
import os
import re
import signal
import sys

import pytest
from absl import flags

from tests import processes, runs
from vop_jax import cli, main
from vop_jax.errors import UserError

PROGRAMS = {
    "vop_jax.main": "--workdir",
    "vop_jax.data.check": "--json",
    "vop_jax.data.prepare": "--annotations",
    "vop_jax.search.__main__": "query",
    "vop_jax.serve.__main__": "--port",
    "vop_jax.report.__main__": "--compare",
    "vop_jax.convert": "--prompts-output",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_no_mistake(program, capsys, monkeypatch):
    module = importlib.import_module(program)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    if "workdir" not in flags.FLAGS:
        main.define_flags()
    with runs.kept_signals():
        if program == "vop_jax.data.check":
            status = cli.run(lambda: module.run(sys.argv))
        elif program == "vop_jax.report.__main__":
            status = module.main()
        else:
            status = module.main(sys.argv if program == "vop_jax.main" else ["--help"])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    assert PROGRAMS[program] in printed.out and re.search("python |vop ", printed.out)


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("program", "status", "line"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (lambda: raises(UserError("two\n  lines")), 2, "error: two lines\n"),
        (
            lambda: raises(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.mp4")),
            *(2, "error: a.mp4: No such file or directory\n"),
        ),
        (
            lambda: raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")),
            *(2, "error: file: no space left on the disk; free some, the same command continues\n"),
        ),
        (
            lambda: raises(cli.Interrupted(signal.SIGTERM)),
            *(143, "stopped by SIGTERM; the same command continues\n"),
        ),
    ],
)
def test_exit_statuses(program, status, line, capsys):
    with runs.kept_signals():
        assert cli.run(program, resumes=True) == status
    assert capsys.readouterr().err == line


def test_signals_are_handled_inside_alone():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert cli.run(lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert cli.run(lambda: signal.raise_signal(signal.SIGTERM)) == 143
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("error", [ZeroDivisionError(), BrokenPipeError(errno.EPIPE, "a server")])
def test_what_nobody_expected_is_raised(error):
    with runs.kept_signals(), pytest.raises(type(error)):
        cli.run(lambda: raises(error))


PRINTS = "from vop_jax import cli; import sys; sys.exit(cli.run(lambda: print({})))"
PARAMS = ["-m", "vop_jax.main", f"--config={runs.ROOT}/configs/demo.py", "--mode=params"]


@pytest.mark.parametrize(
    ("argv", "merged"),
    [
        (["-c", PRINTS.format("'short'")], False),
        (["-c", PRINTS.format("'long' * 10**6")], False),
        (["-c", PRINTS.format("'short', file=sys.stderr")], True),
        (PARAMS, False),
    ],
    ids=["short", "long", "stderr", "params"],
)
def test_a_reader_that_left(argv, merged):
    """As in `… | true`; with warnings as errors, as in `python -W error`."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = processes.run(
            [sys.executable, "-W", "error", *argv],
            env=runs.environment(),
            stdout=write,
            stderr=write if merged else processes.PIPE,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, None if merged else "")


def test_a_full_output_is_one_line():
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-c", PRINTS.format("'short'")]
        done = processes.run(argv, env=runs.environment(), stdout=full)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
