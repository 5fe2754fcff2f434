"""Files of buckets and web servers, through fsspec: gs://, s3://, https://.

A file is read in ranges, as far as its reader asks; what failed is tried again. Credentials are
found by the clients of the stores.
"""

import dataclasses
import datetime
import email.utils
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar, cast

from vop_jax.errors import UserError

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "http": "http", "https": "http"}
BLOCK, BLOCKS = 2**20, 16  # bytes read at once; blocks of an open file that stay in memory
WAITS = 1.0, 4.0  # seconds before another try
DATES = ("mtime", "updated", "LastModified", "Last-Modified", "created")  # by store
TAGS = ("md5Hash", "crc32c", "ETag", "etag", "Content-MD5", "Digest")  # best first
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, NotImplementedError)

MISSING = 401, 403, 404, 410  # statuses that another try does not change

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """What a store says of a file without reading it.

    Attributes:
        size: bytes.
        mtime: nanoseconds since 1970; 0 if the store does not say.
        tag: changes with the content.
        is_folder: whether it is one.
    """

    size: int
    mtime: int
    tag: str
    is_folder: bool = False

    @property
    def digest(self) -> str:
        """In place of a hash of the content."""
        return hashlib.sha256(f"{self.tag} {self.size}".encode()).hexdigest()


def file_system(address: str) -> tuple[Any, str]:
    """(file system of fsspec, path in it).

    Raises:
        UserError: its package is missing, or there is no such kind of address.
    """
    import fsspec

    scheme = address.partition("://")[0]
    try:
        system, path = fsspec.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        hint = f"; pip install -e '.[{extra}]'" if extra else ""
        raise UserError(f"{error}{hint}") from None
    except ValueError:
        known = ", ".join(f"{name}://" for name in EXTRAS)
        raise UserError(f"an address ({scheme}://), not a file; allowed are {known}") from None
    return system, path


def describe(address: str) -> RemoteFile:
    """What the store says of a file.

    Raises:
        OSError: it does not exist, or the store fails.
        UserError: as `file_system`.
    """
    system, path = file_system(address)
    return of_listing(address, tried(lambda: system.info(path)))


def of_listing(address: str, info: dict[str, Any]) -> RemoteFile:
    """Of an entry of fsspec's listings."""
    size = info.get("size")
    if info.get("type") == "directory":
        return RemoteFile(0, 0, "", is_folder=True)
    if size is None:
        raise OSError(f"{address}: the server does not say how long the file is")
    changed = next((info[key] for key in DATES if info.get(key)), None)
    tag = next((str(info[key]) for key in TAGS if info.get(key)), f"{address} {changed}")
    return RemoteFile(int(size), _nanoseconds(changed), tag)


def _nanoseconds(date: Any) -> int:
    if isinstance(date, str):
        try:
            date = datetime.datetime.fromisoformat(date)
        except ValueError:
            date = email.utils.parsedate_to_datetime(date)
    if isinstance(date, datetime.datetime):
        date = date.timestamp()
    return int(10**9 * date) if date else 0


def tried(call: Callable[[], Result], waits: Sequence[float] | None = None) -> Result:
    """The result of a request, which is repeated after a failure that may pass.

    Args:
        waits: seconds before each other try; by default `WAITS`.

    Raises:
        OSError: it failed each time; all that clients raise becomes one.
    """
    waits = WAITS if waits is None else waits
    try:
        return call()
    except Exception as error:  # each client has errors of its own
        cause = error.__cause__
        # fsspec calls every failure of a web server a missing file.
        is_of_web = type(cause).__module__.startswith("aiohttp")
        if isinstance(error, FINAL) and not (
            is_of_web and getattr(cause, "status", 0) not in MISSING
        ):
            raise
        if not waits:
            failure = cause if is_of_web else error
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())
            raise OSError(f"the store fails: {reason[:300]}") from None
    time.sleep(waits[0])
    return tried(call, waits[1:])


def open_file(address: str) -> BinaryIO:
    """Opens a file to read parts of it.

    Raises:
        OSError: it does not exist, or the store fails.
        UserError: as `file_system`.
    """
    system, path = file_system(address)
    options = {"block_size": BLOCK, "cache_type": "blockcache"}
    options["cache_options"] = {"maxblocks": BLOCKS}
    return cast(BinaryIO, _File(tried(lambda: system.open(path, "rb", **options))))


class _File:
    """An open file whose reads are repeated after a failure."""

    def __init__(self, file: Any):
        self._file, self._position = file, 0

    def read(self, count: int = -1) -> bytes:
        def part() -> bytes:
            self._file.seek(self._position)
            return cast(bytes, self._file.read(count))

        data: bytes = tried(part)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        start = {0: 0, 1: self._position, 2: self._file.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
