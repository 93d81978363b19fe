"""Atomic reading and writing of files, local or on S3. The cache is built on it.

Paths are strings: local paths, or `s3://bucket/key`. The store, its region and the credentials come from the usual
AWS_* environment variables (AWS_ENDPOINT_URL for a store that is not Amazon's), with their values at each call.

`put_new` is the core of the protocol: if several writers write the same name, exactly one wins, and no reader ever sees
a part of a file.

Problems with a store (no such bucket, refused, unreachable) raise a UserError, and Unavailable if they concern more
than one file. A missing file raises a FileNotFoundError.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import platform
import re
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from litevae.errors import UserError, redact

SILENCE = 60  # seconds without a byte from S3 after which a request is given up and sent again
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MISSING = ("404", "NoSuchKey", "NotFound")
_REFUSED = ("401", "403", "AccessDenied", "AllAccessDisabled", "InvalidObjectState")  # may concern only one file
_UNKNOWN = ("ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch")
_TAKEN = ("412", "PreconditionFailed")
_NO_CONDITIONS = ("501", "NotImplemented")  # of a store that knows no If-Match
_RACE = ("409", "ConditionalRequestConflict")  # from Amazon while another conditional write is under way; retried


class Unavailable(UserError):
    """A store fails, can't be reached or rejects the credentials. This concerns all its files, and may be temporary."""


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error means that the disk is full. Some libraries say it only in their message."""
    return getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL)


def unwritable(path: str, error: Exception) -> UserError:
    """Return the error to raise for a file that can't be written, with a hint on what to do."""
    hint = "; the file system must have hard links" if getattr(error, "errno", None) in _NO_LINKS else ""
    hint = f"; {os.path.dirname(path)} is not a folder" if isinstance(error, FileExistsError) else hint
    hint = "; make room there and run the same command again: finished work is kept" if is_disk_full(error) else hint
    return UserError(f"{path} can't be written: {getattr(error, 'strerror', None) or error}{hint}")


def is_remote(path: str) -> bool:
    """Return whether a path lies on S3."""
    return path.startswith("s3://")


def absolute(path: str) -> str:
    """Return a path as an absolute one without a trailing slash, which means the same in every process.

    Raises:
        UserError: if the path is neither local nor s3://, names no bucket, or contains credentials.
    """
    if is_remote(path):
        if not _split(path)[0]:
            raise UserError(f"{path!r} names no bucket; give s3://bucket/folder")
        if redact(path) != path:  # the path would be stored in all that is made from it, and shown
            raise UserError(
                f"{path!r} contains credentials; leave them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        return path.rstrip("/")
    if scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise UserError(f"{path!r}: only local paths and s3:// can be used, not {scheme[0]}")
    return os.path.abspath(path)


def join(folder: str, *parts: str) -> str:
    """Join a folder, local or on S3, and parts of a path."""
    return "/".join([folder.rstrip("/"), *parts]) if is_remote(folder) else os.path.join(folder, *parts)


def read(path: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if is_remote(path):
        return _get(path)
    with open(path, "rb") as file:
        return file.read()


def read_range(path: str, offset: int, length: int) -> bytes:
    """Read `length` bytes of a file from `offset` on; fewer if the file ends before.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if is_remote(path):
        return _get(path, offset, length) if length else b""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


class Facts(NamedTuple):
    """What a file system or a store tells about a file without reading it.

    Attributes:
        size: bytes.
        version: a number that changes when the file is written again: the time of its last change in ns, or on S3 a
            hash of its ETag.
    """

    size: int
    version: int


def facts(path: str) -> Facts | None:
    """Return the facts of a file; None if there is no such file."""
    if not is_remote(path):
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # ValueError: the path contains NUL
            return None
        return Facts(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
    if (head := _head(path)) is None:
        _listing(path, MaxKeys=1)  # fails if the bucket is missing, which the 404 of a HEAD does not tell
        return None
    return _facts_of(head["ContentLength"], head)


def _facts_of(size: int, answer: dict[str, Any]) -> Facts:
    """Return the facts of an object from an answer of S3."""
    etag = hashlib.blake2b(answer.get("ETag", "").encode(), digest_size=8).digest()
    return Facts(size, int.from_bytes(etag, "big", signed=True))


def size(path: str) -> int | None:
    """Return the size of a file in bytes; None if there is no such file."""
    found = facts(path)
    return found.size if found else None


def put_new(path: str, data: bytes) -> bool:
    """Write a file unless the name is taken. Missing local folders are created.

    A local file is written as a temporary file, synced (fsync), and then linked to its name, which fails if the name
    exists. On S3 the file is written by one conditional PUT (If-None-Match), up to 5 GB, the limit of a PUT. Multipart
    uploads are not used, because they are not conditional in every store. In a store that ignores the condition, one of
    two simultaneous writers overwrites the other.

    Returns:
        Whether the file was written. False means that the name was taken; the existing file is left as it is.

    Raises:
        UserError: if the file can't be written: no permission, a full disk, a file system without hard links, or a
            store that refuses.
    """
    if is_remote(path):
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
    """Write a file, and replace an existing one. Missing local folders are created.

    A reader sees either the whole old file or the whole new one.

    Raises:
        UserError: if the file can't be written; see `put_new`.
    """
    if is_remote(path):
        bucket, key = _split(path)
        _call(path, "put_object", Bucket=bucket, Key=key, Body=data)
        return
    with _temporary(path, data) as temporary:
        os.replace(temporary, path)
    _sync(os.path.dirname(path))


class Content(NamedTuple):
    """What `read_content` has read of a file.

    Attributes:
        data: the content of the file.
        tag: the ETag that the content had on S3; "" on a disk.
    """

    data: bytes
    tag: str


def read_content(path: str) -> Content | None:
    """Read a whole file for `replace`; None if there is no such file."""
    try:
        return Content(*_get_tagged(path)) if is_remote(path) else Content(read(path), "")
    except FileNotFoundError:
        return None


def replace(path: str, data: bytes, before: Content | None) -> bool:
    """Write a file as `put` does, but only if it still is what `read_content` has read.

    On S3 this is one conditional PUT (If-Match). On a disk the folder is locked meanwhile. A store that ignores the
    condition, and a file system that can't lock folders (NFS), leave a moment between the look and the write: read the
    file again afterwards.

    Args:
        path: Path of the file.
        data: The new content.
        before: What `read_content` has returned.

    Returns:
        Whether the file was written by this call. It can be False although it was, if an answer of S3 was lost.

    Raises:
        UserError: if the file can't be written; see `put_new`.
    """
    if before is None:
        return put_new(path, data)
    if is_remote(path):
        return _replace(path, data, before.tag)
    with _locked(os.path.dirname(path)):
        if read_content(path) != before:
            return False
        put(path, data)
        return True


def remove(path: str) -> None:
    """Delete a file. It is no error if there is no such file."""
    if is_remote(path):
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
    """Return the sorted names of the files directly within a folder.

    The list is empty if there is no such folder. Unfinished and other hidden files (with a leading dot) are left out.
    """
    if is_remote(folder):
        found = [key for key, _ in _keys(folder, Delimiter="/")]
    elif os.path.isdir(folder):
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries if entry.is_file()]
    else:
        return []
    return sorted(name for name in found if not name.startswith("."))


def folder_exists(path: str) -> bool:
    """Return whether a folder exists. S3 has no real folders; there it means that something lies below the path."""
    if not is_remote(path):
        return os.path.isdir(path)
    return bool(_listing(f"{path.rstrip('/')}/", MaxKeys=1).get("Contents"))


def walk(folder: str) -> Iterator[tuple[str, Facts]]:
    """Yield (key relative to the folder, facts) of every object below an S3 folder.

    Objects come in the order of the UTF-8 bytes of their keys, with one request per thousand. The empty objects that
    stand for folders (with a trailing slash) are left out.
    """
    return (found for found in _keys(folder) if not found[0].endswith("/"))


def open_binary(path: str, size: int | None = None) -> IO[bytes]:
    """Open a file, local or on S3, for reading at any position.

    On S3, each read is one request for exactly those bytes, and a read of 0 bytes is none. Wrap the file in an
    io.BufferedReader to turn many small reads into a few requests.

    Args:
        path: Path of the file.
        size: Size in bytes, if it is known. On S3 the file is then not looked up before the first read.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not is_remote(path):
        return open(path, "rb")
    if size is None:
        head = _head(path)
        if head is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        size = head["ContentLength"]
    return _Remote(path, size)  # type: ignore[return-value]  # a RawIOBase whose reads are never short


def read_footer(path: str, size: int | None = None) -> pq.FileMetaData:
    """Read the footer of a Parquet file.

    Args:
        path: Path of the file.
        size: Size in bytes, if it is known.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if the file is damaged.
        ArrowException: if the file is damaged.
    """
    with _arrow_file(path, size) as file:
        return pq.read_metadata(file)


def read_row_group(
    path: str, footer: pq.FileMetaData, group: int, columns: Sequence[str], size: int | None = None
) -> pa.Table:
    """Read some columns of a row group, and verify the checksums of its pages.

    From S3 they are read with one request if they lie close together.

    Args:
        path: Path of the Parquet file.
        footer: Footer from `read_footer`.
        group: Number of the row group.
        columns: Names of the columns.
        size: Size of the file in bytes, if it is known.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if the file is damaged.
        ArrowException: if the file is damaged, or a column may hold pickles.
    """
    found = footer.row_group(group)
    chunks = [found.column(n) for n in range(found.num_columns)]
    spans = [
        (
            min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset),
            chunk.total_compressed_size,
        )
        for chunk in chunks
        if any(f"{chunk.path_in_schema}.".startswith(f"{column}.") for column in columns)  # a name may hold dots
    ]
    start, stop = min(start for start, _ in spans), max(start + length for start, length in spans)
    together = (start, stop - start) if stop - start <= 2 * sum(length for _, length in spans) else None
    # Read in this thread only: if a thread of Arrow calls into Python while the interpreter ends, the process aborts.
    with (
        _arrow_file(path, size, together) as file,
        pq.ParquetFile(file, metadata=footer, page_checksum_verification=True, pre_buffer=False) as parquet,
    ):
        return refuse_pickles(parquet.read_row_group(group, columns=list(columns), use_threads=False))


def read_table(data: bytes) -> pa.Table:
    """Read a whole Parquet file from its bytes, and verify the checksums of its pages.

    Raises:
        ArrowException: if the file is damaged, or a column may hold pickles.
    """
    return refuse_pickles(pq.read_table(pa.BufferReader(data), page_checksum_verification=True))


def refuse_pickles(table: pa.Table) -> pa.Table:
    """Return the table unchanged if none of its types is defined in Python.

    Reading a value of such a type may unpickle it. An example are Ray's types, which Arrow knows once Ray Data is
    imported.

    Raises:
        ArrowInvalid: if a column has a type that is defined in Python.
    """
    for field in table.schema:
        if has_pickles(field.type):
            raise pa.ArrowInvalid(f"column {field.name!r} is {field.type}: it may hold pickles, which are not read")
    return table


def has_pickles(kind: pa.DataType) -> bool:
    """Return whether a type is, or contains, a type that is defined in Python."""
    if isinstance(kind, pa.ExtensionType):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return has_pickles(kind.storage_type)
    if isinstance(kind, pa.DictionaryType):
        return has_pickles(kind.value_type)
    return any(has_pickles(kind.field(number).type) for number in range(kind.num_fields))


def _arrow_file(path: str, size: int | None, ahead: tuple[int, int] | None = None) -> pa.NativeFile:
    """Open a file for Arrow.

    Args:
        path: Path of the file.
        size: Size in bytes, if it is known.
        ahead: Offset and length of a part to read from S3 at once, with one request.
    """
    if not is_remote(path):
        return pa.OSFile(path)
    file = open_binary(path, size)
    if ahead is not None:
        file.hold(*ahead)  # type: ignore[attr-defined]
    return pa.PythonFile(file, mode="r")


@contextlib.contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """Write the data to a hidden file in the folder of `path`, and sync it. It is removed at the end of the block."""
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


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Return a context in which nobody else has this lock on a folder, if the file system can lock folders."""
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(folder: str) -> None:
    """Sync a folder to disk, so that a new name in it survives a power cut."""
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_stores: dict[Any, Any] = {}


def _store() -> Any:
    """Return the S3 file system of this process for the current AWS_* environment variables.

    It is kept here because s3fs would keep one per thread and would not notice that the environment has changed. A file
    system that was inherited by a fork is kept but not used, because only the parent process may close it.
    """
    key = (os.getpid(), *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    if key not in _stores:
        try:
            import s3fs
            from aiobotocore.session import AioSession
        except ImportError as error:
            raise UserError("s3:// paths need s3fs: pip install 'litevae[s3]'") from error
        session = AioSession()
        # Dates are not used, and parsing them takes four fifths of the time of a page of a listing.
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
        store = s3fs.S3FileSystem(
            session=session,
            config_kwargs={
                "connect_timeout": 5,
                "read_timeout": SILENCE,
                "retries": {"mode": "standard", "total_max_attempts": 4},
                "max_pool_connections": 64,  # shared by all threads
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        store.retries = 1  # otherwise the retries of s3fs would multiply those of botocore
        _stores.setdefault(key, store)
    return _stores[key]


def _split(path: str) -> tuple[str, str]:
    """Split an s3:// path into bucket and key."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    return bucket, key


def _call(path: str, method: str, **arguments: Any) -> Any:
    """Send one S3 request. The errors are those in the docstring of the module."""
    with _explained(path):
        return _store().call_s3(method, **arguments)


def _get(path: str, offset: int = 0, length: int | None = None) -> bytes:
    """Read an S3 object, or a part of it."""
    return _get_tagged(path, offset, length)[0]


def _get_tagged(path: str, offset: int = 0, length: int | None = None) -> tuple[bytes, str]:
    """Read an S3 object, or a part of it; return its bytes and the ETag of the object."""
    bucket, key = _split(path)
    # The cat_file of s3fs is not used: it asks for the size first, and splits a key that contains "?versionId=".
    part = {} if length is None else {"Range": f"bytes={offset}-{offset + length - 1}"}
    with _explained(path):
        store = _store()
        from fsspec.asyn import sync
        from s3fs.core import S3_RETRYABLE_ERRORS

        async def attempt(last: bool) -> tuple[bytes, str] | None:
            answer = await store._call_s3("get_object", Bucket=bucket, Key=key, **part)
            try:
                async with answer["Body"] as body:
                    return await body.read(), answer.get("ETag", "")
            except S3_RETRYABLE_ERRORS:  # the connection broke while data came
                if last:
                    raise
                return None

        try:
            for last in (False, False, True):
                if (found := sync(store.loop, attempt, last)) is not None:
                    return found
            raise AssertionError("the last attempt raises")
        except OSError as error:
            if _code(error) in ("416", "InvalidRange"):  # the offset is at or after the end of the file
                return b"", ""
            raise


def _head(path: str) -> Any:
    """Return the metadata of an S3 object; None if there is no such object."""
    bucket, key = _split(path)
    try:
        return _call(path, "head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    except UserError as error:
        if _code(error.__cause__ or error) == "403":  # the answer to a HEAD gives no reason; a listing does
            _listing(path, MaxKeys=1)
        raise


def _put_new(path: str, data: bytes) -> bool:
    """Do `put_new` on S3."""
    # This check saves the upload, and protects existing files in stores that ignore the condition below.
    if _head(path) is not None:
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
    # The name is taken, by another writer or by us: if the answer to our first attempt was lost, the store refuses the
    # second one.
    head = _head(path)
    return head is not None and head["Metadata"].get("writer") == writer


def _replace(path: str, data: bytes, tag: str) -> bool:
    """Do `replace` on S3."""
    bucket, key = _split(path)
    # Ceph compares what is sent with the tag as it keeps it, which is without quotes.
    for condition in (tag, tag.strip('"')):
        with _explained(path):
            try:
                _store().call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfMatch=condition)
                return True
            except OSError as error:
                if _code(error) in _NO_CONDITIONS:
                    _store().call_s3("put_object", Bucket=bucket, Key=key, Body=data)
                    return True
                if _code(error) in _RACE:
                    time.sleep(0.1)  # for the other writer to end
                    return False
                if _code(error) not in (*_TAKEN, *_MISSING):
                    raise
        head = _head(path)
        if head is None or head["ETag"] != tag:
            return False
    return False


def _listing(path: str, **arguments: Any) -> Any:
    """Return one page of the listing of all keys that begin with the key of `path`."""
    bucket, prefix = _split(path)
    return _call(path, "list_objects_v2", Bucket=bucket, Prefix=prefix, **arguments)


def _keys(folder: str, **arguments: Any) -> Iterator[tuple[str, Facts]]:
    """Yield (key relative to the folder, facts) of every object below an S3 folder."""
    path = f"{folder.rstrip('/')}/"
    start = len(_split(path)[1])
    while True:
        page = _listing(path, **arguments)
        for item in page.get("Contents", ()):
            if key := item["Key"][start:]:
                yield key, _facts_of(item["Size"], item)
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def _code(error: BaseException) -> str:
    """Return the error code of S3; "" if the error does not come from S3."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn the errors that s3fs raises into a FileNotFoundError or a UserError."""
    _store()  # raises a clear error if s3fs is not installed; without it the next imports fail
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
            raise UserError(
                f"{path}: {endpoint} has no bucket {bucket!r}; check its name and AWS_ENDPOINT_URL"
            ) from error
        if code == "RequestTimeTooSkewed":
            now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            clock = f"the clock of {platform.node()} ({now}) differs from that of {endpoint}"
            raise Unavailable(f"{path}: {clock} ({code}); set it, e.g. with NTP") from error
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
    """An S3 object as a file. Each read is a request for exactly those bytes."""

    def __init__(self, path: str, size: int):
        self._path, self._size, self._position = path, size, 0
        self._held, self._from = b"", 0

    def hold(self, offset: int, length: int) -> None:
        """Read these bytes now, with one request. Later reads within them send no requests."""
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
