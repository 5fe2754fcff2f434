"""How far a long loop is, and how long it still takes: a line about every ten seconds.

A thread writes the lines, so they come while the program is compiled or one step takes minutes.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import ClassVar, Self

from absl import logging

EVERY = 10.0  # seconds


class Progress:
    """The progress of one loop; enter it. Of nested ones the innermost writes."""

    _entered: ClassVar[list["Progress"]] = []

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        note: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        """`total` things are to be done, `done` of them are; `note` stands beside the numbers."""
        self._what, self._total, self._done, self._note = what, total, done, note
        self._clock, self._started = clock, clock()
        # When and where the rate is measured from: the first advance, which ends compilation.
        self._base: tuple[float, int] | None = None
        self._advanced = self._started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def advance(self, done: int, note: str | None = None) -> None:
        """So many are done now."""
        self._advanced, self._done = self._clock(), done
        self._base = self._base or (self._advanced, done)
        self._note = self._note if note is None else note

    def line(self) -> str:
        """As "step 12/1000  loss 2.31  0:52:10 left"."""
        parts = [f"{self._what} {self._done}/{self._total}", self._note]
        left = self._left()
        parts.append(f"{_clock_time(self._elapsed())} so far" if left is None else f"{left} left")
        return "  ".join(part for part in parts if part)

    def _elapsed(self) -> float:
        return self._clock() - self._started

    def _left(self) -> str | None:
        """None while no rate is known."""
        if self._done >= self._total:
            return _clock_time(0)
        if self._base is None or self._done == self._base[1]:
            return None
        since, first = self._base
        each = (self._advanced - since) / (self._done - first)
        return _clock_time((self._total - self._done) * each - (self._clock() - self._advanced))

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            if self._entered[-1] is self:
                logging.info("%s", self.line())

    def __enter__(self) -> Self:
        self._entered.append(self)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._entered.remove(self)


def _clock_time(seconds: float) -> str:
    """h:mm:ss."""
    return str(timedelta(seconds=max(0, round(seconds))))
