"""Which files a query is about: those of a folder, those of some dates."""

import dataclasses
import datetime
import posixpath
from typing import Any

from vop_jax.errors import UserError

Date = str | datetime.date | datetime.datetime | float | None

DAY = datetime.timedelta(days=1)
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclasses.dataclass(frozen=True)
class Filter:
    """A condition on rows of `files`, as SQL.

    Attributes:
        sql: "" where there is none, else it begins with AND.
        values: of its question marks.
    """

    sql: str = ""
    values: tuple[Any, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sql)


def make_filter(
    folder: str | None = None,
    since: Date = None,
    until: Date = None,
    path: str = "files.path",
) -> Filter:
    """What restricts a search.

    Args:
        folder: relative to the indexed folder; files in it and below.
        since, until: when files were last changed: seconds since 1970, datetimes, or days as dates
            or "2026-11-25", local time; `until` a day is to its end.
        path: the column that `folder` is about.

    Raises:
        UserError: no date, or a folder outside of the indexed one.
    """
    conditions: list[str] = []
    values: list[Any] = []
    if folder is not None and (prefix := _prefix(folder)):
        # A range, which an index answers: "0" comes after "/".
        conditions.append(f"AND {path} >= ? AND {path} < ?")
        values += [prefix + "/", prefix + "0"]
    if since is not None:
        conditions.append("AND files.mtime >= ?")
        values.append(_nanoseconds("since", since))
    if until is not None:
        conditions.append("AND files.mtime < ?")
        values.append(_nanoseconds("until", until))
    return Filter(" ".join(conditions), tuple(values))


def _prefix(folder: str) -> str:
    """Its path without ./ and trailing /; "" for the indexed folder itself."""
    inside = posixpath.normpath(folder)
    if inside.startswith(("/", "../")) or inside == "..":
        raise UserError(f"folder={folder!r}: must be inside the indexed folder, relative to it")
    # Half a character (a lone surrogate) is in no path that SQLite could hold.
    if "\0" in folder or any("\ud800" <= c <= "\udfff" for c in folder):
        raise UserError(f"folder={folder!r}: not a name of a folder")
    return "" if inside == "." else inside


def _nanoseconds(what: str, given: Any) -> int:
    """Since 1970, as near as int64 comes; of `until` a day its end."""
    try:
        if isinstance(given, str):
            try:
                given = datetime.date.fromisoformat(given)
            except ValueError:
                given = datetime.datetime.fromisoformat(given)
        if isinstance(given, datetime.date) and not isinstance(given, datetime.datetime):
            days = int(what == "until" and given < datetime.date.max)
            given = datetime.datetime.combine(given, datetime.time()) + days * DAY
        nanoseconds = 10**9 * (_seconds(given) if isinstance(given, datetime.datetime) else given)
        return int(max(min(nanoseconds, 2**63 - 1), -(2**63)))
    except (ValueError, OverflowError, TypeError):
        raise UserError(f"{what}={given!r}: must be a date such as 2026-11-25") from None


def _seconds(time: datetime.datetime) -> float:
    try:
        return time.timestamp()
    except (ValueError, OverflowError, OSError):  # in the first or the last year there can be
        return (time.replace(tzinfo=datetime.UTC) - EPOCH).total_seconds()
