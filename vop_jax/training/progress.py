"""The progress of a long loop and the time it still takes: a log line about every ten seconds.

A thread writes the lines, so they come while the program is compiled or one step takes minutes.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import ClassVar, Self

from absl import logging

INTERVAL = 10.0  # seconds


class Progress:
    """The progress of one loop; use it in `with`. Of nested ones the innermost is logged."""

    _active: ClassVar[list["Progress"]] = []

    def __init__(
        self,
        unit: str,
        total: int,
        done: int = 0,
        note: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        """A loop over `total` units, such as "step", of which `done` are done already."""
        self._unit, self._total, self._done, self._note = unit, total, done, note
        self._clock, self._start = clock, clock()
        # The rate is measured from the first advance, which ends compilation: (time, done).
        self._base: tuple[float, int] | None = None
        self._advanced = self._start
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def advance(self, done: int, note: str | None = None) -> None:
        """Sets how many units are done, and the text that stands after the numbers."""
        self._advanced, self._done = self._clock(), done
        self._base = self._base or (self._advanced, done)
        self._note = self._note if note is None else note

    def line(self) -> str:
        """As "step 12/1000  loss 2.31  0:52:10 left"."""
        left, elapsed = self._seconds_left(), self._clock() - self._start
        ending = f"{_format(elapsed)} so far" if left is None else f"{_format(left)} left"
        parts = (f"{self._unit} {self._done}/{self._total}", self._note, ending)
        return "  ".join(part for part in parts if part)

    def _seconds_left(self) -> float | None:
        """None while no rate is known."""
        if self._done >= self._total:
            return 0.0
        if self._base is None or self._done == self._base[1]:
            return None
        start, first = self._base
        rate = (self._advanced - start) / (self._done - first)
        return (self._total - self._done) * rate - (self._clock() - self._advanced)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            if self._active[-1] is self:
                logging.info("%s", self.line())

    def __enter__(self) -> Self:
        self._active.append(self)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._active.remove(self)


def _format(seconds: float) -> str:
    """h:mm:ss."""
    return str(timedelta(seconds=max(0, round(seconds))))
