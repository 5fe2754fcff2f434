"""Files of an annotation folder: found by their names, read as text, lists, CSV and JSON."""

import collections
import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from vop_jax.data.annotations.official import count, identifier, short, unique
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
