"""What all programs share: one command, help, how errors and signals become an exit status."""

import errno
import os
import signal
import sys

import pytest

from tests import processes, runs
from vop_jax import __main__ as vop
from vop_jax import cli
from vop_jax.errors import UserError

OPTIONS = {
    **dict.fromkeys(("train", "eval", "export", "params"), "--workdir"),
    "prepare": "--annotations",
    "check": "--json",
    "convert": "--prompts-output",
    "search": "query",
    "serve": "--port",
    "push": "--base-model",
    "report": "--compare",
}


def test_the_list_of_programs(capsys):
    assert vop.main([]) == vop.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert list(vop.PROGRAMS) == list(OPTIONS)
    assert all(f"  vop {name} " in printed for name in OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_help_is_printed_and_no_mistake(name, capsys):
    assert vop.main([name, "--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert OPTIONS[name] in printed.out and f"vop {name} " in printed.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "error: vop trian: no such program; did you mean vop train?"),
        (["x"], "error: vop x: no such program; there are train, eval, "),
        (["eval", "--mode=train"], "error: vop eval: takes no --mode"),
        (["search", "find"], "error: argument COMMAND: invalid choice: 'find'"),
        (["params", "--config=dmeo"], "error: --config=dmeo: no such file; did you mean demo?"),
    ],
)
def test_a_wrong_program_or_call_is_one_line(argv, message, capsys):
    assert vop.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


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
    assert cli.run(program, resumes=True) == status
    assert capsys.readouterr().err == line


def test_signals_are_handled_inside_alone():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert cli.run(lambda: signal.raise_signal(signal.SIGINT)) == 130
    assert cli.run(lambda: signal.raise_signal(signal.SIGTERM)) == 143
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("error", [ZeroDivisionError(), BrokenPipeError(errno.EPIPE, "a server")])
def test_a_defect_of_the_program_is_raised(error):
    with pytest.raises(type(error)):
        cli.run(lambda: raises(error))


PRINTS = "from vop_jax import cli; import sys; sys.exit(cli.run(lambda: print({})))"


@pytest.mark.parametrize(
    ("printed", "merged"),
    [("'short'", False), ("'long' * 10**6", False), ("'short', file=sys.stderr", True)],
)
def test_a_reader_that_left(printed, merged):
    """As in `… | true`; with warnings as errors, as in `python -W error`."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = processes.run(
            [sys.executable, "-W", "error", "-c", PRINTS.format(printed)],
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
