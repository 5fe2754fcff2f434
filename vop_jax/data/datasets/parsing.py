"""Reads annotation files.

Everything here raises a UserError, with file and line, for content that is not as documented.
"""

import collections
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from etils import epath

from vop_jax.data.clips import VideoClip
from vop_jax.errors import UserError

T = TypeVar("T")
Captions = dict[str, list[str]]  # id -> captions in file order

# Lone surrogates cannot be written as UTF-8, and no text contains a NUL.
UNPRINTABLE = re.compile("[\0\ud800-\udfff]")
TYPE_NAMES: dict[type, str] = {
    **{str: "a text", list: "a list", dict: "an object"},
    **{bool: "a truth value", int: "a number", float: "a number", type(None): "null"},
}


class AnnotationFiles:
    """The folder of a benchmark's official files.

    Attributes:
        folder: the folder.
        notes: what a user should know but may accept, one line each.
    """

    def __init__(self, folder: epath.Path):
        self.folder = folder
        self.notes: list[str] = []

    def find_optional(self, names: Sequence[str]) -> epath.Path | None:
        """The first of these files that exists."""
        return next((self.folder / name for name in names if (self.folder / name).is_file()), None)

    def find(self, names: Sequence[str]) -> epath.Path:
        """The first of these files that exists; raises UserError if none does."""
        path = self.find_optional(names)
        if path is None:
            raise UserError(f"{self.folder}: no {' or '.join(names)} in this folder of annotations")
        return path

    def read_lines(self, path: epath.Path, fallback: str = "") -> Iterator[tuple[int, str]]:
        """(line number, line) of the lines that are not blank.

        Args:
            fallback: encoding of a file that is not UTF-8; its use is noted.
        """
        try:
            text = read_text(path)
        except UserError as error:
            try:
                text = path.read_bytes().decode(fallback or "ascii")
            except UnicodeDecodeError:
                raise error from None
            reason = str(error).removeprefix(f"{path}: ")
            self.notes.append(f"{path.name}: {reason}; read as {fallback}")
        # Not splitlines(): captions may contain the rarer line separators of Unicode.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, line

    def read_list(self, path: epath.Path) -> list[str]:
        """The ids of a file with one a line; repeated ids are noted."""
        return self.unique_ids(path, self.read_lines(path))

    def read_csv(self, path: epath.Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """(line number, the cells of `columns`) of each row of a CSV file with a header."""
        rows = read_table(path, read_text(path))
        _, header = next(rows)
        for name in columns:
            if name not in header:
                names = short(", ".join(header)) if header else "nothing"
                raise UserError(f"{path}:1: no column {name!r}; found {names}")
        indices = [header.index(name) for name in columns]
        for line, cells in rows:
            yield line, [cells[i] for i in indices]

    def read_json(self, path: epath.Path) -> Any:
        """The value of a JSON file; keys that an object has twice are noted."""
        value, repeated = parse_json(path, read_text(path))
        if repeated:
            what = count(repeated, "key")
            self.notes.append(f"{path.name}: {what} repeated; the last one counts")
        return value

    def unique_ids(self, path: epath.Path, rows: Iterable[tuple[int, str]]) -> list[str]:
        """The ids of rows (line number, id), each once; repeated ids are noted."""
        ids: dict[str, None] = {}
        repeated: dict[str, int] = {}
        for line, text in rows:
            name = identifier(f"{path}:{line}", text)
            if name in ids:
                repeated.setdefault(name, line)
            ids[name] = None
        if repeated:
            what, line = count(list(repeated), "id"), next(iter(repeated.values()))
            self.notes.append(f"{path.name}: {what} repeated (line {line}); merged")
        return list(ids)

    def captions_of_rows(
        self, path: epath.Path, rows: Iterable[tuple[int, Sequence[str]]]
    ) -> Captions:
        """The captions of rows (line number, (id, caption)); repeated ids are noted and merged."""
        rows = list(rows)
        captions: Captions = {n: [] for n in self.unique_ids(path, ((n, c[0]) for n, c in rows))}
        for line, (name, text) in rows:
            captions[name.strip()].append(caption(f"{path}:{line}", text))
        return captions

    def without_empty(self, path: epath.Path, captions: Captions) -> Captions:
        """The videos that have a caption that is not empty; empty captions are noted."""
        empty = [name for name, own in captions.items() for text in own if not text]
        if empty:
            what = f"{len(empty)} empty caption{'s' * (len(empty) > 1)}"
            self.notes.append(f"{path.name}: {what} left out, first of {empty[0]}")
        nonempty = {name: [text for text in own if text] for name, own in captions.items()}
        return {name: own for name, own in nonempty.items() if own}

    def clips(
        self,
        listed: tuple[epath.Path, Sequence[str]],
        described: tuple[epath.Path, Captions],
        video_of: Callable[[str], str],
        *,
        paragraph: bool = False,
    ) -> list[VideoClip]:
        """Clips of the ids of a list file, with the captions of another file.

        Empty captions, and videos without any caption, are left out and noted.

        Args:
            video_of: id -> the official path of the video.
            paragraph: join the captions of a video by spaces.
        """
        (list_file, ids), (caption_file, captions) = listed, described
        listed_captions = {name: captions[name] for name in ids if name in captions}
        usable = self.without_empty(caption_file, listed_captions)
        missing = [name for name in ids if name not in usable]
        self.note_ids(list_file, missing, f"without a caption in {caption_file.name}, left out")
        return [
            VideoClip(name, video_of(name), (" ".join(own),) if paragraph else tuple(own))
            for name, own in usable.items()
        ]

    def note_ids(self, path: epath.Path, ids: Sequence[str], what: str) -> None:
        """Notes how many ids of a file are `what`, if any are."""
        if ids:
            self.notes.append(f"{path.name}: {count(ids, 'id')} {what}")


def read_text(path: epath.Path) -> str:
    """The text of a UTF-8 file."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; an annotation file is needed") from None


def read_table(
    path: epath.Path, text: str, delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row of a CSV text that is not blank, the header first."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        yield 1, header
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}:{reader.line_num}: {len(cells)} cells, the header has {len(header)}; "
                    f"quote a caption that contains {delimiter!r}"
                )
            yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def read_parquet(name: str, data: bytes) -> list[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises:
        UserError: it is damaged, or pyarrow is missing.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{name}: {error}; pip install pyarrow") from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{name}: not readable as Parquet ({error})") from None
    return rows


def parse_json(path: epath.Path, text: str, line: int = 1) -> tuple[Any, list[str]]:
    """(JSON value, keys that an object in it has twice); the text begins at `line` of a file."""
    repeated: list[str] = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            repeated.extend(key for key, times in counts.items() if times > 1)
        return value

    try:
        return json.loads(text, object_pairs_hook=to_dict), repeated
    except json.JSONDecodeError as error:
        where = f"{path}:{line - 1 + error.lineno}:{error.colno}"
        raise UserError(f"{where}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # Python reads no integers of 5,000 digits
        why = "a number is too long" if isinstance(error, ValueError) else "too deeply nested"
        raise UserError(f"{path}:{line}: no readable JSON ({why})") from None


def expect(where: str, value: object, kind: type[T]) -> T:
    """The value, which must be of that type."""
    if not isinstance(value, kind):
        name = TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
        raise UserError(f"{where}: {name}; {TYPE_NAMES[kind]} is needed")
    return value


def member(where: str, value: object, key: str, kind: type[T]) -> T:
    """`value[key]` of a JSON object, which must be of that type."""
    entry = expect(where, value, dict)
    if key not in entry:
        raise UserError(f"{where}: no key {key!r}; found {short(', '.join(entry) or 'nothing')}")
    return expect(f"{where}: {key}", entry[key], kind)


def caption(where: str, value: object) -> str:
    """A caption without surrounding white space."""
    text = expect(where, value, str).strip()
    if UNPRINTABLE.search(text):
        raise UserError(f"{where}: a caption with a NUL or half a character (lone surrogate)")
    return text


def identifier(where: str, value: object) -> str:
    """An id or file name without surrounding white space."""
    name = expect(where, value, str).strip()
    if not name.isprintable() or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise UserError(f"{where}: {short(name)}; the name of a video, without folders, is needed")
    return name


def captions_by_id(path: epath.Path, value: object, key: str = "") -> Captions:
    """The captions of a JSON object {id: list}, each a text or a list of words.

    Args:
        key: of each list in an object {id: {key: list}}.
    """
    captions: Captions = {}
    for own_id, entry in expect(str(path), value, dict).items():
        name = identifier(str(path), own_id)
        where = f"{path}: {name}"
        texts = member(where, entry, key, list) if key else expect(where, entry, list)
        own = captions.setdefault(name, [])
        for text in texts:
            words = text if isinstance(text, list) else [text]
            own.append(" ".join(caption(where, word) for word in words))
    return captions


def captions_of_entries(where: str, entries: list, id_key: str, caption_key: str) -> Captions:
    """The captions of a JSON list of objects with an id and a caption each."""
    captions: Captions = {}
    for i, entry in enumerate(entries):
        place = f"{where}[{i}]"
        name = identifier(place, member(place, entry, id_key, str))
        text = caption(place, member(place, entry, caption_key, str))
        captions.setdefault(name, []).append(text)
    return captions


def count(names: Sequence[str], what: str) -> str:
    """How many names there are, and the first."""
    return f"{len(names)} {what}{'s' * (len(names) > 1)} (first {short(names[0])})"


def short(text: str) -> str:
    """A text for a message: quoted, on one line, at most 60 characters."""
    return f"{text[:60]!r}" + ("..." if len(text) > 60 else "")
