"""What all programs share: arguments, logging, signals, and how errors become an exit status."""

import argparse
import io
import math
import os
import re
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import WARNING, Formatter, LogRecord
from typing import Any, NoReturn, TextIO

from absl import flags, logging
from ml_collections import ConfigDict

from vop_jax.config import base as config_defaults
from vop_jax.config.base import check_keys, workdir_config
from vop_jax.errors import UserError, as_user_error


class Interrupted(BaseException):
    """A signal asked the process to stop; its exit status is 128 + the signal's number."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


_pending: list[int] = []
_deferring = False


@contextmanager
def raised() -> Iterator[None]:
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
    else:  # nothing to finish first, or asked a second time
        raise Interrupted(signum)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a first signal waits until `requested` is asked; leaving raises it."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False
    if _pending:
        raise Interrupted(_pending.pop())


def requested() -> bool:
    """Whether a signal is waiting."""
    return bool(_pending)


BROKEN_PIPE = 128 + signal.SIGPIPE
_PACKAGE = os.path.dirname(__file__)
# What a terminal obeys instead of showing it, and what is no character: control characters, line
# separators, changes of the writing direction, surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def run(program: Callable[[], int | None], *, resumes: bool = False) -> int:
    """Runs a program and returns its exit status.

    0: done. 2: the call, the config or the input is wrong, which is one line on stderr. 130 and
    143: stopped by SIGINT or SIGTERM. 141: the reader of the output left, as in `… | head`.

    Args:
        program: returns another status, or None.
        resumes: the same command continues what a signal stopped, and a line says so.

    Raises: what nobody expected.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names are any bytes
    try:
        with raised():
            return _status_of(program, resumes)
    except BrokenPipeError:
        if not any(map(_reader_left, (1, 2))):
            raise
        return BROKEN_PIPE
    finally:
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            try:
                _flush(stream)
            except OSError:  # Python would try again at its end, and complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _status_of(program: Callable[[], int | None], resumes: bool) -> int:
    try:
        try:
            status = program() or 0
        except SystemExit as end:  # of --help
            status = int(end.code or 0)
        _flush(sys.stdout)
        return status
    except Interrupted as stopped:
        if resumes:
            print(f"stopped by {stopped}; the same command continues", file=sys.stderr)
        return stopped.exit_status
    except Exception as error:
        if (wrong := as_user_error(error)) is None:
            raise
        print(f"error: {printable(' '.join(str(wrong).split()))}", file=sys.stderr)
        return 2


def _flush(stream: TextIO | None) -> None:
    if stream is not None:  # None: it was closed before the start
        stream.flush()


def _reader_left(descriptor: int) -> bool:
    """Whether nobody reads a pipe any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def set_up_logging(level: int = logging.INFO) -> None:
    """Logs our own progress, and the warnings of other packages, on stderr."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # absl would warn that it logs before that
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    if _is_of_interest not in handler.filters:
        handler.addFilter(_is_of_interest)
    handler.setFormatter(_Lines("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.set_verbosity(level)
    if not sys.stderr.isatty():  # tqdm's bars are lines of a log then; it reads this when imported
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds


class _Lines(Formatter):
    """Lines that a terminal shows as they are, whatever a file is named."""

    def format(self, record: LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def printable(text: str) -> str:
    """A file's name, or an error about one, as one line for a terminal; the rest is escaped."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def _is_of_interest(record: LogRecord) -> bool:
    if record.pathname.startswith(_PACKAGE):
        return True
    # What other packages log with its traceback (orbax, of a full disk) they raise as well.
    return record.levelno >= WARNING and not record.exc_info


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; abbreviated options are wrong."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """One line, not the whole usage."""
        raise UserError(f"{message}; --help lists the options")


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an option: a whole number of so much or more, and of so much or less."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= (int(text) if high is None else high):
            allowed = f"a number, {low} or more" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r}: {allowed}")
        return int(text)

    return read


def number(low: float) -> Callable[[str], float]:
    """The type of an option: a finite number of so much or more."""

    def read(text: str) -> float:
        try:
            given = float(text)
        except ValueError:
            given = math.nan
        if not low <= given < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: a number, {low:g} or more")
        return given

    return read


def parse_flags(argv: Sequence[str], usage: str) -> None:
    """Parses the command line into `flags.FLAGS`; `--help` prints `usage` and every flag.

    Raises:
        UserError: it is wrong, or the config file is.
    """
    if {"--help", "-help", "-h", "--helpfull", "--helpshort"} & {*argv}:
        module = flags.FLAGS.find_module_defining_flag("config")
        print(f"{usage.strip()}\n\n{flags.FLAGS.module_help(module)}")
        sys.exit(0)
    try:
        argv = _with_config_file(argv)
        overrides = (a.lstrip("-") for a in argv if re.match("--?config[.]", a))
        check_keys(o.split("=")[0].removeprefix("config.") for o in overrides)
        with warnings.catch_warnings():
            # ml_collections' way to load the file, under `python -W error`.
            warnings.filterwarnings("ignore", "the load_module", DeprecationWarning)
            rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]}: not a flag; flags look like --config=FILE")
        _check_flags(flags.FLAGS.config)
    except OSError as error:  # the config file could not be loaded, and is overridden
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(f"--config: {where}") from None
    except flags.IllegalFlagValueError as error:
        raise UserError(_wrong_value(str(error))) from None
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    except UserError:
        raise
    except Exception as error:  # the config file's own
        if "has no attribute 'get_config'" in str(error):
            raise UserError("--config: the file defines no get_config()") from None
        why = f"{_where(error)}{type(error).__name__}: {_last_line(error)}"
        raise UserError(f"--config: {why}") from None


def _wrong_value(message: str) -> str:
    """What absl says of a value, with the kind that is allowed instead of what Python says."""
    kinds = {"int()": "a whole number", "to float": "a number", "boolean": "True or False"}
    for words, kind in kinds.items():
        if words in message:
            return f"{message.split(': ')[0].removeprefix('flag ')}: must be {kind}"
    return message.removeprefix("flag ")


def _with_config_file(argv: Sequence[str]) -> list[str]:
    """The command line with a --config that exists; ml_collections says it in many words.

    A workdir that has a config needs no other; what the flags change is then counted from it, see
    `_config`.
    """
    if (value := _value(argv, "config")) is not None:
        path = value.partition(":")[0]
        if not os.path.isfile(path):
            raise UserError(f"--config={path}: no such file; configs/ has some")
        if sum(bool(re.fullmatch("--?config(=.*)?", flag)) for flag in argv) > 1:
            raise UserError("--config: give one file; --config.KEY=VALUE changes its keys")
        return list(argv)
    workdir = _value(argv, "workdir") if "mode" in flags.FLAGS else None
    if not workdir or workdir_config(workdir) is None:
        return list(argv)
    return [argv[0], f"--config={config_defaults.__file__}", *argv[1:]]


def _value(argv: Sequence[str], name: str) -> str | None:
    """Of --NAME=VALUE or --NAME VALUE, the last one; None without."""
    found = None
    for flag, following in zip(argv, [*argv[1:], ""], strict=True):
        if given := re.fullmatch(f"--?{name}(?:=(.*))?", flag):
            found = following if given[1] is None else given[1]
    return found


def _check_flags(config: Any) -> None:
    if config is None:
        given = flags.FLAGS.workdir if "workdir" in flags.FLAGS else None
        why = f", and --workdir={given} holds no run" if given else ""
        raise UserError(f"--config=FILE is missing{why}; take one of configs/, as configs/demo.py")
    if not isinstance(config, ConfigDict):
        try:
            config.seed  # noqa: B018  what went wrong in the file is raised on first use
        except Exception as error:
            raise UserError(f"--config: {_last_line(error)}") from None
    if "workdir" in flags.FLAGS and not flags.FLAGS.workdir and flags.FLAGS.mode != "params":
        raise UserError("--workdir=DIR is missing")
    # Other programs parse their flags here, and have none of this name.
    if "format" in flags.FLAGS and flags.FLAGS["format"].present and flags.FLAGS.mode != "export":
        raise UserError(f"--format goes with --mode=export, not with --mode={flags.FLAGS.mode}")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()


def _where(error: Exception) -> str:
    """FILE:LINE where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: "
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}: "
