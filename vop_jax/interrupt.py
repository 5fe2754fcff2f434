"""SIGINT and SIGTERM end a run cleanly: at once, or after the step that is under way."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


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
