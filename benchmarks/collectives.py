"""What a compiled program sends between devices, read out of its text.

collectives(jax.jit(step).lower(...).compile().as_text())
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4}
BYTES |= {"s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8}

# Of the size that a collective is about, the part that each of n devices sends, on a ring.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,  # a reduce-scatter, then an all-gather
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array of one collective operation; an operation on a tuple is several.

    Attributes:
        kind: a key of SENT.
        dtype: as XLA writes it, "f32".
        shape: of the whole array: what is reduced or exchanged, what a gather results in.
        group: how many devices take part together.
        where: the operation of the source it was made for, XLA's `op_name`.
        times: how often a run of the program does it; None in a loop of unknown length.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    group: int
    where: str
    times: int | None = 1

    @property
    def bytes(self) -> int:
        """Of the array."""
        return math.prod(self.shape) * BYTES[self.dtype]

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a run of the program, with the formulas of SENT.

        Raises:
            ValueError: the collective is in a loop of unknown length.
        """
        if self.times is None:
            raise ValueError(f"{self.kind} of {self.where}: in a loop of unknown length")
        return self.times * self.bytes * SENT[self.kind](self.group)


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(
    rf"= (.*?) ({'|'.join(SENT)})(-start)?\(([^)]*)\)(.*)"  # shapes, kind, operands, attributes
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled module, from `compiled.as_text()`.

    A TPU's compiler writes one that runs beside other work many times over, in computations of
    its own, as parts with one channel id and one origin; it is one.
    """
    entry, bodies = _computations(text)
    devices = math.prod(map(int, re.findall(r"(?:num_partitions|replica_count)=(\d+)", text)))
    results: list[Collective] = []
    seen: dict[tuple[str, str, tuple[str, ...]], str] = {}  # where it was met first

    def visit(name: str, times: int | None) -> None:
        for line in bodies.get(name, ()):
            if match := _OPERATION.search(line):
                arrays = list(_arrays(match, devices, times))
                channel = re.search(r"channel_id=(\d+)", line)
                part = channel[1] if channel else f"line {len(results)}"
                key = (match[2], part, tuple(array.where for array in arrays))
                if seen.setdefault(key, name) == name:
                    results.extend(arrays)
                continue  # what it calls is the sum of two numbers
            inner = times
            if " while(" in line:
                trips = _TRIPS.search(line)
                inner = times * int(trips[1]) if trips and times is not None else None
            for called in _called(line):
                visit(called, inner)

    visit(entry, 1)
    return results


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """(name of the entry, {name of a computation: its lines})."""
    entry, lines = "", list[str]()
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line.startswith(" ") and (match := _COMPUTATION.match(line)):
            lines = bodies[match[2]] = []
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return entry, bodies


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        yield from re.findall(r"[\w.\-]+", branches)


def _arrays(match: re.Match[str], devices: int, times: int | None) -> Iterator[Collective]:
    shapes, kind, started, operands, attributes = match.groups()
    arrays = [(t, tuple(map(int, s.split(","))) if s else ()) for t, s in _ARRAY.findall(shapes)]
    if started and kind != "all-reduce":  # (operands, results, what the device keeps for itself)
        count = operands.count("%")
        arrays = arrays[count : 2 * count]
    where = re.search(r'op_name="([^"]*)"', attributes)
    group = _group(attributes) or devices
    for dtype, shape in arrays:
        if kind == "reduce-scatter":  # the result is a device's part
            shape = (group * math.prod(shape),)
        yield Collective(kind, dtype, shape, group, where[1] if where else "", times)


def _group(attributes: str) -> int:
    """How many devices take part together; 0 where all do."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):  # groups, devices in each
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"('[^']+')=(\d+)", match[1]))
        parts = re.findall(r"('[^']+')(?::\(\d+\)(\d+))?", match[2])  # 'x', or a part of it
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return 0
