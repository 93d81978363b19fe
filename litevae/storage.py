"""Files that appear whole or not at all, local or on S3, and what was read of them last: what the cache is built on.

Paths are strings: local ones, or `s3://bucket/key`. The store, its region and the credentials come from the usual AWS_*
environment variables (AWS_ENDPOINT_URL for a store that is not Amazon's), as they are at each call.

`put_new` is the protocol's core: of several writers of one name exactly one wins, and no reader ever sees a part.

What goes wrong with a store (no such bucket, refused, unreachable) is a UserError, and Unavailable where it is not of
one file alone; a file that is not there is a FileNotFoundError.
"""

import contextlib
import errno
import io
import os
import platform
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import IO, Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from litevae.errors import UserError, redact

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

SILENCE = 60  # seconds without a byte from S3, after which a request is given up, and made again
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MISSING = ("404", "NoSuchKey", "NotFound")
_REFUSED = ("401", "403", "AccessDenied", "AllAccessDisabled", "InvalidObjectState")  # of one file, perhaps
_UNKNOWN = ("ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch")
_TAKEN = ("412", "PreconditionFailed")
_RACE = ("409", "ConditionalRequestConflict")  # Amazon: another conditional write is under way; ask again


class Unavailable(UserError):
    """A store that fails, can't be reached or does not know who asks: that holds for all its files, and may pass."""


def full(error: BaseException) -> bool:
    """Whether that is a full disk; some libraries have it in their message only."""
    return getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL)


def unwritable(path: str, error: Exception) -> UserError:
    """What to tell of a file that can't be written."""
    hint = "; the file system must have hard links" if getattr(error, "errno", None) in _NO_LINKS else ""
    hint = f"; {os.path.dirname(path)} is no folder" if isinstance(error, FileExistsError) else hint
    hint = "; make room there and run again: what is done stays" if full(error) else hint
    return UserError(f"{path} can't be written: {getattr(error, 'strerror', None) or error}{hint}")


def remote(path: str) -> bool:
    """Whether a path lies on S3."""
    return path.startswith("s3://")


def absolute(path: str) -> str:
    """A path that means the same everywhere: absolute, no trailing slash.

    Raises:
        UserError: neither a local path nor s3://.
    """
    if remote(path):
        if not _split(path)[0]:
            raise UserError(f"{path!r} names no bucket; give s3://bucket/folder")
        if redact(path) != path:  # it would be kept with all that is made from it, and shown
            raise UserError(f"{path!r}: no credentials in a path; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        return path.rstrip("/")
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise UserError(f"{path!r}: only local paths and s3:// can be used, not {scheme[0]}")
    return os.path.abspath(path)


def join(folder: str, *parts: str) -> str:
    return "/".join([folder.rstrip("/"), *parts]) if remote(folder) else os.path.join(folder, *parts)


def read(path: str) -> bytes:
    """A whole file. FileNotFoundError where there is none."""
    if remote(path):
        return _get(path)
    with open(path, "rb") as file:
        return file.read()


def read_range(path: str, offset: int, length: int) -> bytes:
    """Bytes offset ... offset + length of a file; fewer where it ends before. FileNotFoundError where there is none."""
    if remote(path):
        return _get(path, offset, length) if length else b""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def size(path: str) -> int | None:
    """Bytes of a file; None where there is none."""
    if not remote(path):
        return os.path.getsize(path) if os.path.isfile(path) else None
    if (head := _head(path)) is None:
        _listing(path, MaxKeys=1)  # a HEAD's 404 does not tell a missing bucket from a missing key; this does
        return None
    return head["ContentLength"]


def put_new(path: str, data: bytes) -> bool:
    """Write a file unless the name is taken. Local folders are made.

    Local: temporary file, fsync, no-replace link. S3: one PUT on condition that there is nothing (If-None-Match), up to
    the 5 GB that a PUT may hold: parts put together afterwards would not be conditional in every store. A store that
    does not know the condition overwrites where two writers come at the same moment.

    Returns:
        False where the name was taken; that file is left as it is.

    Raises:
        UserError: it can't be written: no permission, a full disk, a file system without hard links, a store's refusal.
    """
    if remote(path):
        return _put_new(path, data)
    folder = os.path.dirname(path)
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    _sync(folder)
    return True


def put(path: str, data: bytes) -> None:
    """Write a file, in place of one that may be there: readers see the old one or the new one. Local folders are made.

    Raises:
        UserError: as for `put_new`.
    """
    if remote(path):
        bucket, key = _split(path)
        _call(path, "put_object", Bucket=bucket, Key=key, Body=data)
        return
    with _temporary(path, data) as temporary:
        os.replace(temporary, path)
    _sync(os.path.dirname(path))


def remove(path: str) -> None:
    """Delete a file. No error where there is none."""
    if remote(path):
        bucket, key = _split(path)
        _call(path, "delete_object", Bucket=bucket, Key=key)
        return
    try:
        os.remove(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} can't be deleted: {error.strerror}") from error


def names(folder: str) -> list[str]:
    """Names of the files directly within a folder, sorted; none where there is no such folder. Unfinished and other
    hidden files (a leading dot) are left out."""
    if remote(folder):
        found = [key for key, _ in _keys(folder, Delimiter="/")]
    elif os.path.isdir(folder):
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if entry.is_file()]
    else:
        return []
    return sorted(name for name in found if not name.startswith("."))


def folder_exists(path: str) -> bool:
    """Whether there is such a folder; on S3, where folders are only names, whether there is anything below it."""
    if not remote(path):
        return os.path.isdir(path)
    return bool(_listing(f"{path.rstrip('/')}/", MaxKeys=1).get("Contents"))


def walk(folder: str) -> Iterator[tuple[str, int]]:
    """(key relative to the folder, bytes) of every object below an S3 folder, in order of the keys' UTF-8, a request
    per thousand. The empty objects that stand for folders (a trailing slash) are left out."""
    return ((key, size) for key, size in _keys(folder) if not key.endswith("/"))


def open_binary(path: str, size: int | None = None) -> IO[bytes]:
    """A file to read from anywhere. FileNotFoundError where there is none.

    On S3 a read is one request for just those bytes, none for 0; io.BufferedReader around it makes few of many small
    ones. With `size` (bytes) the file is not looked for before it is read.
    """
    if not remote(path):
        return open(path, "rb")
    if size is None:
        head = _head(path)
        if head is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        size = head["ContentLength"]
    return _Remote(path, size)  # type: ignore[return-value]  # a RawIOBase that reads all it is asked for


def read_footer(path: str, size: int | None = None) -> pq.FileMetaData:
    """Of a Parquet file. FileNotFoundError where there is none; OSError or ArrowException where it is damaged."""
    with _arrow_file(path, size) as file:
        return pq.read_metadata(file)


def read_row_group(
    path: str, footer: pq.FileMetaData, group: int, columns: Sequence[str], size: int | None = None
) -> pa.Table:
    """Some columns of a row group, its pages' checksums verified; from S3 with one request where they lie together.

    Errors as those of `read_footer`.
    """
    found = footer.row_group(group)
    chunks = [found.column(n) for n in range(found.num_columns)]
    spans = [
        (
            min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset),
            chunk.total_compressed_size,
        )
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in columns
    ]
    start, stop = min(start for start, _ in spans), max(start + length for start, length in spans)
    together = (start, stop - start) if stop - start <= 2 * sum(length for _, length in spans) else None
    # In this thread alone: one of Arrow's that calls into Python while the interpreter ends aborts the process.
    with (
        _arrow_file(path, size, together) as file,
        pq.ParquetFile(file, metadata=footer, page_checksum_verification=True, pre_buffer=False) as parquet,
    ):
        return refuse_pickles(parquet.read_row_group(group, columns=list(columns), use_threads=False))


def read_table(data: bytes) -> pa.Table:
    """Of a whole Parquet file, its pages' checksums verified. ArrowException where it is damaged."""
    return refuse_pickles(pq.read_table(pa.BufferReader(data), page_checksum_verification=True))


def refuse_pickles(table: pa.Table) -> pa.Table:
    """The same, if no type in it is defined in Python: to read a value of such a one may be to unpickle it, as of
    Ray's, which is known to Arrow where Ray Data is imported. ArrowInvalid where one is."""
    for field in table.schema:
        if has_pickles(field.type):
            raise pa.ArrowInvalid(f"column {field.name!r} is {field.type}: it may hold pickles, which are not read")
    return table


def has_pickles(kind: pa.DataType) -> bool:
    """Whether it is or contains a type that is defined in Python."""
    if isinstance(kind, pa.ExtensionType):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return has_pickles(kind.storage_type)
    if isinstance(kind, pa.DictionaryType):
        return has_pickles(kind.value_type)
    return any(has_pickles(kind.field(number).type) for number in range(kind.num_fields))


def _arrow_file(path: str, size: int | None, ahead: tuple[int, int] | None = None) -> pa.NativeFile:
    """
    Args:
        ahead: offset and length of what to get with one request from S3.
    """
    if not remote(path):
        return pa.OSFile(path)
    file = open_binary(path, size)
    if ahead is not None:
        file.hold(*ahead)  # type: ignore[attr-defined]
    return pa.PythonFile(file, mode="r")


@contextlib.contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """A hidden file beside `path` that holds the data, on the disk; gone afterwards."""
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _sync(folder: str) -> None:
    """Make the new name itself survive a power cut."""
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_stores: dict[Any, Any] = {}


def _store() -> Any:
    """The process's S3 file system for the environment as it is. Held here: s3fs would hold one per thread and not see
    that the environment has changed. One that a fork inherited is kept but not used: closing it is its parent's affair.
    """
    key = (os.getpid(), *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    if key not in _stores:
        try:
            import s3fs
            from aiobotocore.session import AioSession
        except ImportError as error:
            raise UserError("s3:// paths need s3fs: pip install 'litevae[s3]'") from error
        session = AioSession()
        # nobody asks for dates; parsing them is four fifths of the time that a page of a listing takes
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
        store = s3fs.S3FileSystem(
            session=session,
            config_kwargs={
                "connect_timeout": 5,
                "read_timeout": SILENCE,
                "retries": {"mode": "standard", "total_max_attempts": 4},
                "max_pool_connections": 64,  # of all threads together
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        store.retries = 1  # s3fs' own would multiply botocore's
        _stores.setdefault(key, store)
    return _stores[key]


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.removeprefix("s3://").partition("/")
    return bucket, key


def _call(path: str, method: str, **arguments: Any) -> Any:
    """One S3 request; problems as the module's text says."""
    with _explained(path):
        return _store().call_s3(method, **arguments)


def _get(path: str, offset: int = 0, length: int | None = None) -> bytes:
    bucket, key = _split(path)
    # s3fs' own cat_file asks for the size first, and takes a key with "?versionId=" in it apart
    part = {} if length is None else {"Range": f"bytes={offset}-{offset + length - 1}"}
    with _explained(path):
        store = _store()
        from fsspec.asyn import sync
        from s3fs.core import S3_RETRYABLE_ERRORS

        async def attempt(last: bool) -> bytes | None:
            answer = await store._call_s3("get_object", Bucket=bucket, Key=key, **part)
            try:
                async with answer["Body"] as body:
                    return await body.read()
            except S3_RETRYABLE_ERRORS:  # the connection broke in the midst of the data
                if last:
                    raise
                return None

        try:
            for last in (False, False, True):
                if (data := sync(store.loop, attempt, last)) is not None:
                    return data
            raise AssertionError("the last attempt raises")
        except OSError as error:
            if _code(error) in ("416", "InvalidRange"):  # it begins where the file ends
                return b""
            raise


def _head(path: str) -> Any:
    """What the store knows of an object; None where there is none."""
    bucket, key = _split(path)
    try:
        return _call(path, "head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    except UserError as error:
        if _code(error.__cause__ or error) == "403":  # a HEAD's answer does not say why; this one's does
            _listing(path, MaxKeys=1)
        raise


def _put_new(path: str, data: bytes) -> bool:
    if _head(path) is not None:  # spares the upload, and protects older files where the condition below is ignored
        return False
    bucket, key = _split(path)
    writer = uuid.uuid4().hex
    for wait in (0.1, 0.5, 2.0, None):
        with _explained(path):
            try:
                _store().call_s3(
                    "put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", Metadata={"writer": writer}
                )
                return True
            except OSError as error:
                if _code(error) in _TAKEN:
                    break
                if _code(error) not in _RACE or wait is None:
                    raise
                time.sleep(wait)
    # Taken by another, or by us: where the answer to a first attempt was lost, it is the second one that is refused.
    head = _head(path)
    return head is not None and head["Metadata"].get("writer") == writer


def _listing(path: str, **arguments: Any) -> Any:
    bucket, prefix = _split(path)
    return _call(path, "list_objects_v2", Bucket=bucket, Prefix=prefix, **arguments)


def _keys(folder: str, **arguments: Any) -> Iterator[tuple[str, int]]:
    path = f"{folder.rstrip('/')}/"
    start = len(_split(path)[1])
    while True:
        page = _listing(path, **arguments)
        for item in page.get("Contents", ()):
            if key := item["Key"][start:]:
                yield key, item["Size"]
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def _code(error: BaseException) -> str:
    """S3's name for what went wrong, "" if it was not S3 that said so."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns what s3fs raises into a FileNotFoundError or a UserError."""
    _store()  # without s3fs there is no botocore either
    from botocore import exceptions as botocore
    from s3fs.core import S3_RETRYABLE_ERRORS

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, botocore.BotoCoreError, *S3_RETRYABLE_ERRORS) as error:
        code, bucket = _code(error), _split(path)[0]
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3"
        if code in _MISSING:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        if code == "NoSuchBucket":
            raise UserError(f"{path}: {endpoint} has no bucket {bucket!r}; check it and AWS_ENDPOINT_URL") from error
        if code == "RequestTimeTooSkewed":
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            clock = f"the clock of {platform.node()} ({now}) is not that of {endpoint}"
            raise Unavailable(f"{path}: {clock} ({code}); set it, e.g. by NTP") from error
        if code in (*_REFUSED, *_UNKNOWN):
            reason = (
                f"{endpoint} refuses access ({code}: {error}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the"
            )
            raise (Unavailable if code in _UNKNOWN else UserError)(f"{path}: {reason} bucket's permissions") from error
        if isinstance(error, botocore.NoCredentialsError | botocore.PartialCredentialsError):
            raise Unavailable(f"{path}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        if isinstance(error, botocore.ConnectionError | botocore.HTTPClientError | TimeoutError):
            raise Unavailable(f"{path}: {endpoint} can't be reached ({error}); check AWS_ENDPOINT_URL") from error
        reason = f"{code}: {error}" if code else str(error) or type(error).__name__
        raise Unavailable(f"{path}: {endpoint} fails ({reason}); check AWS_ENDPOINT_URL, or try again later") from error


class _Remote(io.RawIOBase):
    """An S3 object as a file: each read is a request for exactly those bytes."""

    def __init__(self, path: str, size: int):
        self._path, self._size, self._position = path, size, 0
        self._held, self._from = b"", 0

    def hold(self, offset: int, length: int) -> None:
        """Get these bytes at once; reads among them make no requests."""
        self._held, self._from = read_range(self._path, offset, length), offset

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self._path)
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self._size - self._position)
        length = rest if size is None or size < 0 else min(size, rest)
        within = self._position - self._from
        if within >= 0 and within + length <= len(self._held):
            data = self._held[within : within + length]
        else:
            data = read_range(self._path, self._position, length)
        self._position += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


class Recent(Generic[K, T]):
    """The values used last, up to a total size. Safe among threads; pickled without its values.

    Args:
        load: key -> (value, size). One call at a time.
        limit: of the sizes; the newest value is held in any case.
    """

    def __init__(self, load: Callable[[K], tuple[T, int]], limit: int):
        self._load, self._limit = load, limit
        self._start()

    def _start(self) -> None:
        self._held: OrderedDict[K, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: K) -> T:
        with self._lock:
            if key not in self._held:
                self._held[key] = self._load(key)
                while len(self._held) > 1 and sum(size for _, size in self._held.values()) > self._limit:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key][0]

    def __getstate__(self) -> dict[str, Any]:
        return {"_load": self._load, "_limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()
