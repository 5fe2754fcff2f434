"""What all programs share: arguments, logging, signals, and how errors become an exit status."""

import argparse
import io
import math
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import WARNING, Formatter, LogRecord
from typing import Any, NoReturn, TextIO

from absl import flags, logging

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
