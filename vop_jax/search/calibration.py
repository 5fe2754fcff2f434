"""The minimum of an index: which scores of a text are more than chance.

A cosine says little by itself: it depends on the model, on how a text is put, and on the videos. So
the index is asked about general captions, which mix who, what and where and describe hardly any of
its moments. The evidence that a moment shows what a text says is the sum of two numbers:

- how much higher the score is than the best scores of the general captions in the whole index, and
- how much higher it is than the scores of the general captions with this moment,

each in standard deviations. A hit needs as much evidence as one in ten general captions has by
chance. Captions that name indexed videos show what real descriptions have; with these, the limit
is where as many of them would be missed as general captions pass.
"""

import base64
import dataclasses
import functools
import json
import sqlite3

import numpy as np

from vop_jax.search.stores.base import Snapshot

KEY = "calibration"  # in the table `about`
WHO = (
    *("a dog", "a cat", "a horse", "a bird", "a man", "a woman", "a child", "a crowd of people"),
    *("a car", "a train", "a boat", "a plane", "a chef", "a guitarist", "a dancer", "a player"),
)
WHAT = (
    *("runs", "jumps", "sleeps", "waits", "talks to the camera", "eats", "turns around", "falls"),
    *("opens a door", "shows a book", "carries a box", "plays with a ball", "leaves", "waves"),
    *("looks out of a window", "crosses the street"),
)
WHERE = (
    *("on a beach", "in a kitchen", "in the snow", "at night", "in a city", "in a forest"),
    *("on a stage", "in an office"),
)
GENERAL = [  # no two have the same pair of parts
    f"{WHO[i % 16]} {WHAT[(i * 7 + i // 16 * 3) % 16]} {WHERE[(i * 3 + i // 16) % 8]}"
    for i in range(128)
]
MOMENTS, CAPTIONS = 50, 20  # fewer are not enough to calibrate with
SAMPLE = 256  # captions that are looked at
TAIL = 1.6  # of an extreme value's distribution: (q90 - q50) / (q50 - q10)
TINY = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What the general captions say of an index.

    Attributes:
        general: float32 [G, E], their vectors.
        middle, spread: median and standard deviation of their best scores in the index.
        limit: the evidence that a hit needs.
        passed: the share of the general captions that have it.
        captions: number of the index's captions that were looked at; 0: too few.
        missed: the share of these that have not got it.
    """

    general: np.ndarray
    middle: float
    spread: float
    limit: float = 0.0
    passed: float = 0.0
    captions: int = 0
    missed: float = 0.0

    def evidence(self, scores: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """float [N] of scores [N] with moments whose vectors are [N, E]."""
        general = vectors @ self.general.T
        deviation = np.maximum(general.std(axis=1), TINY)
        return (scores - self.middle) / self.spread + (scores - general.mean(axis=1)) / deviation

    def as_json(self) -> str:
        """What `read` reads."""
        general = base64.b64encode(self.general.tobytes()).decode()
        return json.dumps(vars(self) | {"general": general, "dim": self.general.shape[1]})


def calibrate(
    general: np.ndarray, moments: Snapshot, ids: np.ndarray | None, captions: np.ndarray
) -> Calibration:
    """Calibrates an index: one pass over its vectors.

    Args:
        general: float32 [G, E], the vectors of `GENERAL`.
        moments: the index's vectors.
        ids: of the moments that count, int64; None for all.
        captions: float32 [C, E], vectors of texts that describe indexed videos.
    """
    best, scores = moments.search(np.concatenate([general, captions]), 1, ids)
    scores, count = scores[:, 0], len(general)
    middle = float(np.median(scores[:count]))
    deviation = 1.4826 * float(np.median(np.abs(scores[:count] - middle)))  # robust to outliers
    found = Calibration(general, middle, max(deviation, TINY))
    evidence = found.evidence(scores, moments.get(best[:, 0]))
    chance, real = evidence[:count], evidence[count:]
    # Some videos may show what a general caption says, so the lower half bounds the limit, too.
    low, half, high = np.quantile(chance, (0.1, 0.5, 0.9))
    limit = min(half + TAIL * (half - low), high)
    if len(captions) < CAPTIONS:
        return dataclasses.replace(
            found, limit=float(limit), passed=float(np.mean(chance >= limit))
        )
    limits = np.sort(evidence)
    missed = np.array([(real < limit).mean() for limit in limits])
    passed = np.array([(chance >= limit).mean() for limit in limits])
    i = int(np.argmin(np.abs(missed - passed)))
    return Calibration(
        *(general, found.middle, found.spread, float(limits[i]), float(passed[i])),
        captions=len(captions),
        missed=float(missed[i]),
    )


def read(db: sqlite3.Connection) -> Calibration | None:
    """The calibration of an index; None for one without."""
    row = db.execute("SELECT value FROM about WHERE key = ?", (KEY,)).fetchone()
    return parse(row[0]) if row else None


@functools.lru_cache(maxsize=64)  # searches of one state read it again and again
def parse(text: str) -> Calibration:
    """Of the text that `Calibration.as_json` made."""
    values = json.loads(text)
    general = np.frombuffer(base64.b64decode(values.pop("general")), np.float32)
    return Calibration(general.reshape(-1, values.pop("dim")), **values)
