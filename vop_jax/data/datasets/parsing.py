"""What the parsers of the benchmarks' official files share.

Parsers append what a user should know, but may well accept, to a list of notes; anything that
is not as the format says is a `UserError`.
"""

import collections
import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.errors import UserError


def find_optional(folder: epath.Path, names: Sequence[str]) -> epath.Path | None:
    """The first of the files that is in the folder, if any."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def find(folder: epath.Path, names: Sequence[str]) -> epath.Path:
    """The first of the files that is in the folder.

    Raises:
        UserError: none is.
    """
    path = find_optional(folder, names)
    if path is None:
        raise UserError(f"{folder}: no {' or '.join(names)} in this folder of annotations")
    return path


def read_text(path: epath.Path, notes: list[str], fallback: str | None = None) -> str:
    """The text of a UTF-8 file, or, with a note, of one in the encoding `fallback`.

    Raises:
        UserError: it is in neither.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text ({error.reason} at byte {error.start})"
    if fallback:
        try:
            text = data.decode(fallback)
        except UnicodeDecodeError as error:
            reason += f", nor {fallback} (at byte {error.start})"
        else:
            notes.append(f"{path.name}: {reason}; read as {fallback}")
            return text
    raise UserError(f"{path}: {reason}")


def read_lines(
    path: epath.Path, notes: list[str], fallback: str | None = None
) -> Iterator[tuple[int, str]]:
    """(line number, line) of the lines that are not blank."""
    # Not splitlines(): captions may hold the rarer line separators of Unicode.
    for number, line in enumerate(read_text(path, notes, fallback).split("\n"), 1):
        if line.strip():
            yield number, line


def read_list(path: epath.Path, notes: list[str]) -> list[str]:
    """The ids of a file with one a line; repeated ones are noted.

    Raises:
        UserError: a line that is no id.
    """
    lines = read_lines(path, notes)
    return unique(path, [(n, identifier(f"{path}:{n}", line)) for n, line in lines], notes)


def read_csv(
    path: epath.Path, columns: Sequence[str], notes: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """(line number, the cells of `columns`) of each row of a CSV file with a header.

    Raises:
        UserError: a column is missing, or a row is not as long as the header.
    """
    reader = csv.reader(io.StringIO(read_text(path, notes), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        for name in columns:
            if name not in header:
                found = short(", ".join(header)) if header else "nothing"
                raise UserError(f"{path}:1: no column {name!r}; found {found}")
        chosen = [header.index(name) for name in columns]
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}:{reader.line_num}: {len(cells)} cells, the header has {len(header)}"
                )
            yield reader.line_num, [cells[i] for i in chosen]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def read_json(path: epath.Path, notes: list[str]) -> Any:
    """The value of a JSON file; keys that an object has twice are noted.

    Raises:
        UserError: it is no JSON.
    """
    repeated: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            repeated.extend(key for key, times in counts.items() if times > 1)
        return value

    try:
        value = json.loads(read_text(path, notes), object_pairs_hook=to_dict)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg})") from None
    except ValueError:  # Python reads no integers of thousands of digits
        raise UserError(f"{path}: not JSON that can be read (a number is too long)") from None
    except RecursionError:
        raise UserError(f"{path}: not JSON that can be read (too deeply nested)") from None
    if repeated:
        notes.append(f"{path.name}: {count(repeated, 'key')} repeated; the last one counts")
    return value


T = TypeVar("T")
Captions = dict[str, list[str]]  # id -> captions in file order

# Lone surrogates cannot be written as UTF-8; a NUL never is part of a text.
NO_TEXT = re.compile("[\0\ud800-\udfff]")
NAMES: dict[type, str] = {
    **{str: "a text", list: "a list", dict: "an object"},
    **{bool: "a truth value", int: "a number", float: "a number", type(None): "null"},
}


@dataclasses.dataclass(frozen=True)
class Size:
    """What a split is known to hold; None: not known.

    Attributes:
        tolerance: the share by which published counts of this split differ.
    """

    videos: int | None = None
    captions: int | None = None
    tolerance: float = 0.0


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark in its official files.

    Attributes:
        name: as in the config.
        protocol: what is trained on and tested on, in words.
        files: split -> the file that says which videos it has, under its accepted names.
        sizes: split -> its size; the splits of the benchmark.
        read: (folder of annotations, split) -> (clips with official relative paths, notes).
    """

    name: str
    protocol: str
    files: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, Size]
    read: Callable[[epath.Path, str], tuple[list[VideoClip], list[str]]]


def expect(where: str, value: object, kind: type[T]) -> T:
    """The value, of the type.

    Raises:
        UserError: it has another.
    """
    if not isinstance(value, kind):
        found = NAMES.get(type(value), f"a {type(value).__name__}")
        raise UserError(f"{where}: {found}; {NAMES[kind]} is needed")
    return value


def member(where: str, value: object, key: str, kind: type[T]) -> T:
    """`value[key]` of a JSON object, of the type.

    Raises:
        UserError: `value` is no object, has no such key, or something else there.
    """
    entry = expect(where, value, dict)
    if key not in entry:
        raise UserError(f"{where}: no key {key!r}; found {short(', '.join(entry) or 'nothing')}")
    return expect(f"{where}: {key}", entry[key], kind)


def caption(where: str, value: object) -> str:
    """A caption without the white space around it.

    Raises:
        UserError: it is no text.
    """
    text = expect(where, value, str).strip()
    if NO_TEXT.search(text):
        raise UserError(f"{where}: a caption with a NUL or half a character (lone surrogate)")
    return text


def identifier(where: str, value: object) -> str:
    """An id or file name without the white space around it.

    Raises:
        UserError: it cannot be the name of a file.
    """
    name = expect(where, value, str).strip()
    if not name.isprintable() or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise UserError(f"{where}: {short(name)}; the name of a video, without folders, is needed")
    return name


def unique(path: epath.Path, rows: Iterable[tuple[int, str]], notes: list[str]) -> list[str]:
    """The ids of (line number, id), each once; repeated ones are noted."""
    ids: dict[str, None] = {}
    repeated: dict[str, int] = {}
    for line, name in rows:
        if name in ids:
            repeated.setdefault(name, line)
        ids[name] = None
    if repeated:
        line = next(iter(repeated.values()))
        notes.append(f"{path.name}: {count(list(repeated), 'id')} repeated (line {line}); merged")
    return list(ids)


def without_empty(path: epath.Path, captions: Captions, notes: list[str]) -> Captions:
    """The captions that are not empty, of the videos that have one; empty ones are noted."""
    empty = [name for name, own in captions.items() for text in own if not text]
    if empty:
        plural = "s" * (len(empty) > 1)
        notes.append(
            f"{path.name}: {len(empty)} empty caption{plural} left out, first of {empty[0]}"
        )
    kept = {name: [text for text in own if text] for name, own in captions.items()}
    return {name: own for name, own in kept.items() if own}


def clips_of(
    listed: tuple[epath.Path, Sequence[str]],
    described: tuple[epath.Path, Captions],
    path_of: Callable[[str], str],
    notes: list[str],
) -> list[VideoClip]:
    """Clips of the ids of a list file, with the captions of another file.

    Empty captions, and videos without any caption, are left out and noted.
    """
    (list_file, ids), (caption_file, captions) = listed, described
    wanted = {name: captions[name] for name in ids if name in captions}
    kept = without_empty(caption_file, wanted, notes)
    missing = [name for name in ids if name not in kept]
    note_ids(list_file, missing, f"without a caption in {caption_file.name}, left out", notes)
    return [VideoClip(name, path_of(name), tuple(own)) for name, own in kept.items()]


def note_ids(path: epath.Path, ids: Sequence[str], what: str, notes: list[str]) -> None:
    """Notes, if there are any, how many ids of a file are `what`."""
    if ids:
        notes.append(f"{path.name}: {count(ids, 'id')} {what}")


def count(names: Sequence[str], what: str) -> str:
    """How many names there are, and the first."""
    return f"{len(names)} {what}{'s' * (len(names) > 1)} (first {short(names[0])})"


def short(text: str) -> str:
    """A text for a message: quoted, on one line, of bearable length."""
    return f"{text[:60]!r}" + ("..." if len(text) > 60 else "")
