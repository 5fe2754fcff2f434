"""What all programs share: exit statuses, signals, logging, options, and flags of a config."""

import argparse
import contextlib
import difflib
import errno
import io
import math
import os
import re
import select
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import WARNING, Formatter, LogRecord
from typing import Any, NoReturn, TextIO

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from vop_jax.config.base import check_keys
from vop_jax.errors import UserError

BROKEN_PIPE = 128 + signal.SIGPIPE
_PACKAGE = os.path.dirname(__file__)
_HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}
# Control characters, line separators, changes of the writing direction, surrogates: a terminal
# obeys them instead of showing them.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# ---------------------------------------------------------------- signals


class Interrupted(BaseException):
    """A signal stops the process; its exit status is 128 + the signal's number."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


_pending: list[int] = []
_deferring = False


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise `Interrupted`."""
    before = {s: signal.signal(s, _handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _pending.clear()
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)


def _handle(signum: int, frame: object) -> None:
    if _deferring and not _pending:
        _pending.append(signum)
    else:  # nothing must be finished first, or this is the second signal
        raise Interrupted(signum)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Inside, a first signal only makes `stop_requested` true; leaving raises `Interrupted`."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
    if _pending:
        raise Interrupted(_pending.pop())


def stop_requested() -> bool:
    """Whether a deferred signal has arrived."""
    return bool(_pending)


# ---------------------------------------------------------------- running a program


def run(program: Callable[[], int | None], *, resumes: bool = False) -> int:
    """Runs a program and returns its exit status.

    0: done. 2: the call, the config or the input is wrong, which is one line on stderr. 130 and
    143: stopped by SIGINT or SIGTERM. 141: the reader of the output left, as in `… | head`.

    Args:
        program: returns another status, or None for 0.
        resumes: whether the same command continues after a signal; stderr then names this.

    Raises:
        Exception: any other error of the program.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name can be any bytes
    try:
        with raise_on_signals():
            return _status(program, resumes)
    except BrokenPipeError:
        if not any(map(_is_broken_pipe, (1, 2))):
            raise
        return BROKEN_PIPE
    finally:
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            try:
                _flush(stream)
            except OSError:  # Python would try again when it ends, and print a traceback
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _status(program: Callable[[], int | None], resumes: bool) -> int:
    try:
        try:
            status = program() or 0
        except SystemExit as end:  # after --help
            status = int(end.code or 0)
        _flush(sys.stdout)
        return status
    except Interrupted as stop:
        if resumes:
            print(f"stopped by {stop}; the same command continues", file=sys.stderr)
        return stop.exit_status
    except Exception as error:
        if (wrong := as_user_error(error)) is None:
            raise
        print(f"error: {printable(' '.join(str(wrong).split()))}", file=sys.stderr)
        return 2


def _flush(stream: TextIO | None) -> None:
    if stream is not None:  # it is None if it was closed before the start
        stream.flush()


def _is_broken_pipe(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def as_user_error(error: BaseException) -> UserError | None:
    """The error that a user can correct, as one line; None for a defect of the program."""
    if isinstance(error, UserError):
        return error
    # etils raises these for a path in an unknown store, or in one whose package is missing.
    if isinstance(error, KeyError) and error.args and str(error.args[0]).endswith("://"):
        return UserError(f"{error.args[0]}… is no folder or file; give a path of this machine")
    if isinstance(error, ImportError) and " to access " in str(error):
        return UserError(str(error))
    if (path := _full_disk(error)) is not None:
        return UserError(
            f"{path}: no space left on the disk; free some, the same command continues"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}")
    return None


def _full_disk(error: BaseException | None) -> str | None:
    """The path on a full disk if that is the cause of an exception, else None."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error.filename or "workdir")
        if "No space left on device" in str(error):
            return "workdir"
        error = error.__cause__ or error.__context__
    return None


# ---------------------------------------------------------------- logging


def set_up_logging(level: int = logging.INFO) -> None:
    """Logs the package's progress, and warnings of other packages, on stderr."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # else absl warns that it logs before that
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    if _is_relevant not in handler.filters:
        handler.addFilter(_is_relevant)
    handler.setFormatter(_PrintableFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.set_verbosity(level)
    if not sys.stderr.isatty():  # tqdm's bars become lines; it reads this when it is imported
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds


class _PrintableFormatter(Formatter):
    def format(self, record: LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def _is_relevant(record: LogRecord) -> bool:
    if record.pathname.startswith(_PACKAGE):
        return True
    # What other packages log with a traceback (orbax: a full disk) they raise as well.
    return record.levelno >= WARNING and not record.exc_info


def printable(text: str) -> str:
    """One line for a terminal: escapes what a file's name can hold and a terminal would obey."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


# ---------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """Reports a wrong call in one line, and accepts no abbreviated options."""

    def __init__(self, **options: Any):
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        raise UserError(f"{message}; --help lists the options")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an option: a whole number from `low` to `high`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= (int(text) if high is None else high):
            allowed = f"a number, {low} or more" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r}: {allowed}")
        return int(text)

    return parse


def number(low: float) -> Callable[[str], float]:
    """The type of an option: a finite number, `low` or more."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: a number, {low:g} or more")
        return value

    return parse


# ---------------------------------------------------------------- flags of a config


def parse_flags(
    argv: Sequence[str], usage: str, define: Callable[[flags.FlagValues], object]
) -> tuple[flags.FlagValues, list[str]]:
    """Parses a command line with --config=FILE; `--help` prints `usage` and every flag.

    Args:
        argv: the arguments, without the program's name.
        define: defines the program's other flags.

    Returns:
        The flags, whose `config` is "" without one, and the arguments --config.KEY=VALUE, which
        `override` takes.

    Raises:
        UserError: an unknown flag, a value that is not allowed, or an unknown key.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()
    flags.DEFINE_multi_string(
        "config", [], "FILE:METHOD, or a shipped config, such as demo:vop_c", flag_values=values
    )
    define(values)
    if _HELP & {*argv}:
        lines = [f"  --{name}: {values[name].help.splitlines()[0]}" for name in [*values]]
        print(usage.strip(), "", *lines, "  --config.KEY=VALUE: changes a key", sep="\n")
        sys.exit(0)
    try:
        rest = values(["vop", *argv], known_only=True)[1:]
    except flags.Error as error:
        raise UserError(_wrong_value(error)) from None
    if len(values.config) > 1:
        raise UserError("--config: give one file; --config.KEY=VALUE changes its keys")
    values.config = (values.config or [""])[0]
    for argument in rest:
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("-") and not _is_override(argument):
            near = difflib.get_close_matches(name, [*values], n=1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
            raise UserError(f"--{name}: no such flag; {hint}")
    check_keys(overridden_keys(rest))
    return values, rest


def _is_override(argument: str) -> bool:
    return re.match("--?(no)?config[.]", argument) is not None


def overridden_keys(overrides: Sequence[str]) -> list[str]:
    """The keys, such as "train.steps", that --config.KEY=VALUE arguments set."""
    names = (a.lstrip("-").partition("=")[0] for a in overrides if _is_override(a))
    return [name.removeprefix("no").removeprefix("config.") for name in names]


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The config with the values of --config.KEY=VALUE arguments.

    Raises:
        UserError: a value of another type, or an argument that is not a flag.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=["vop", *overrides]
    )
    try:
        rest = values(["vop", *overrides])
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(_wrong_value(error)) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]}: not a flag; flags look like --config=FILE")
    changed: ConfigDict = values.config
    return changed


def _wrong_value(error: Exception) -> str:
    """The message of absl, with the allowed kind of value instead of Python's message."""
    message = str(error).removeprefix("flag ")
    kinds = {"int()": "a whole number", "to float": "a number", "boolean": "True or False"}
    for words, kind in kinds.items():
        if words in message:
            return f"{message.split(': ')[0]}: must be {kind}"
    return message


def beam_options(options: str | None) -> Any:
    """Apache Beam's pipeline options; None for None."""
    if options is None:
        return None
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError("Apache Beam is not installed: pip install -e '.[beam]'") from None
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):  # argparse prints its whole usage
            parsed = PipelineOptions(shlex.split(options))
            parsed.get_all_options()
            apache_beam.Pipeline(options=parsed)
    except (Exception, SystemExit) as error:
        reason = (printed.getvalue().strip() or str(error)).splitlines()[-1]
        raise UserError(f"--beam_options={options}: {reason}") from None
    return parsed
