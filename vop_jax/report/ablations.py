"""Which of the runs vary one thing of a method, and what that does."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vop_jax.report.runs import Row

_FOLLOWS = ("train.learning_rate", "train.steps")  # may be tuned along with what is varied


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Rows of one method that differ in one setting, or in several that go together.

    Attributes:
        keys: the settings, such as ("method.split_layer",).
        points: (values of the settings, row), sorted by value; one is `reference`.
        reference: the values that the method's other rows have.
    """

    method: str
    keys: tuple[str, ...]
    points: list[tuple[tuple[Any, ...], Row]]
    reference: tuple[Any, ...]


def references(rows: Sequence[Row], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Row]:
    """{method: its row with the most common settings}; of several, the one with the best R@1.

    Args:
        settings: {workdir: that run's, see `Run.settings`}.
    """
    chosen = {}
    for method, members in _by_method(rows).items():
        votes = {
            key: collections.Counter(str(_of(row, settings).get(key)) for row in members)
            for key in _of(members[0], settings)
        }

        def commonness(row: Row, votes: dict[str, collections.Counter] = votes) -> tuple:
            mine = _of(row, settings)
            told = (key for key in votes if key not in _FOLLOWS)
            return sum(votes[k][str(mine.get(k))] for k in told), row["metrics"]["t2v/R@1"][0]

        chosen[method] = max(members, key=commonness)
    return chosen


def find_ablations(
    rows: Sequence[Row], settings: Mapping[str, Mapping[str, Any]]
) -> list[Ablation]:
    """All there are among the rows: what differs from the reference in the same settings is one.

    Args:
        settings: {workdir: that run's, see `Run.settings`}.
    """
    found = []
    for method, reference in references(rows, settings).items():
        base = _of(reference, settings)
        varied: dict[tuple[str, ...], list[Row]] = {}
        for row in _by_method(rows)[method]:
            mine = _of(row, settings)
            differ = [key for key in base if str(mine.get(key)) != str(base[key])]
            keys = tuple(key for key in differ if key not in _FOLLOWS) or tuple(differ)
            if keys:
                varied.setdefault(keys, []).append(row)
        for keys, members in varied.items():
            points = [
                (tuple(_of(row, settings).get(key) for key in keys), row)
                for row in [reference, *members]
            ]
            points.sort(key=lambda point: _order(point[0]))
            found.append(Ablation(method, keys, points, tuple(base[key] for key in keys)))
    return found


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return groups


def _of(row: Row, settings: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    return settings[row["workdirs"][0]]


def _order(values: tuple[Any, ...]) -> tuple[Any, ...]:
    numbers = all(isinstance(v, int | float) for v in values)
    return (0, *values) if numbers else (1, *map(str, values))
