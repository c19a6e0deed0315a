"""Large objects between S3 and files or memory: parts and ranges that move in parallel."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from botocore.auth import PAYLOAD_BUFFER
from botocore.exceptions import ClientError, ReadTimeoutError
from isal import isal_zlib

from cluster.folder import write_whole
from cluster.s3_errors import error_code
from cluster.s3_evidence import Digest
from cluster.storage import StorageError, Transfer, Unfinished

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

T = TypeVar("T")
Span = tuple[int, int]
"""Bytes [start, end)."""
ReadSpan = Callable[[Span], bytes | memoryview]
TakePieces = Callable[[Iterable[bytes]], int]
"""Takes the bytes of a span, piece by piece; returns how many there were."""
Attempt = Callable[[Callable[["S3Client"], Any]], Any]
"""Runs an action on the client, with retries and described errors."""

_MAX_PARTS = 10_000
_PAGE_UPLOADS = 1_000
_BLOCK_BYTES = 2**18
_SMALL_BLOCK_BYTES = 2**14
_PARTS_THAT_TELL_BYTES = 2**20
"""Of smaller ones the time is that of the answer."""
_TIMES_SLOWER = 16
"""A line may become so much slower while a large block is sent."""
WRITE_TOKEN = "shoal-write"  # noqa: S105 - the name of a metadata entry
"""Metadata entry with a random value for each write. A write whose answer was lost is sent again
and meets its own object: by this entry it is told from another writer's."""

logger = logging.getLogger(__name__)


def checksum(data: bytes | memoryview) -> str:
    """CRC32 as S3 takes it: big-endian, base64."""
    return base64.b64encode(isal_zlib.crc32(data).to_bytes(4, "big")).decode()


def write_parts(
    attempt: Attempt,
    *,
    arguments: dict[str, Any],
    token: str,
    num_bytes: int,
    read_part: ReadSpan,
    transfer: Transfer,
    line: Line,
) -> str:
    """Write an object in parallel parts, each with its checksum; the object's ETag.

    `arguments` are those of the object: bucket, key, encryption, content type; `token` is a
    random text by which this write is known; `line` is shared by all that is sent to the store.
    """

    def send(span: Span, part: dict[str, Any]) -> dict[str, Any]:
        with _Turn() as turn:
            data = read_part(span)
            crc = checksum(data)

            def upload(client: S3Client) -> str:
                body = Outgoing(data, transfer, block_bytes=line.block_bytes, on_sending=turn.end)
                try:
                    with line.watched(len(data)):
                        return client.upload_part(Body=cast(Any, body), ChecksumCRC32=crc, **part)[
                            "ETag"
                        ]
                finally:
                    # Also where nothing could be sent: what waits to be sent again takes no turn.
                    turn.end()

            return {"ETag": attempt(upload), "ChecksumCRC32": crc}

    spans = part_spans(num_bytes, part_bytes=transfer.part_bytes)
    return _in_parts(attempt, send, spans, arguments=arguments, token=token, transfer=transfer)


def copy_parts(
    attempt: Attempt,
    *,
    source: dict[str, Any],
    arguments: dict[str, Any],
    token: str,
    num_bytes: int,
    part_bytes: int,
    transfer: Transfer,
) -> None:
    """The same from parts of another object of the store, which copies them by itself.

    `source` are the arguments that name the object: CopySource, CopySourceIfMatch.
    """

    def send(span: Span, part: dict[str, Any]) -> dict[str, Any]:
        span_of_source = f"bytes={span[0]}-{span[1] - 1}"
        copied = attempt(
            lambda client: client.upload_part_copy(
                CopySourceRange=span_of_source, **source, **part
            )["CopyPartResult"]
        )
        return {name: copied[name] for name in ("ETag", "ChecksumCRC32") if name in copied}

    spans = part_spans(num_bytes, part_bytes=part_bytes)
    _in_parts(attempt, send, spans, arguments=arguments, token=token, transfer=transfer)


def _in_parts(
    attempt: Attempt,
    send: Callable[[Span, dict[str, Any]], dict[str, Any]],
    spans: list[Span],
    *,
    arguments: dict[str, Any],
    token: str,
    transfer: Transfer,
) -> str:
    """An object from parts that move in parallel; its ETag.

    It appears whole or not at all; after a failure the store is told to drop the parts. `send`
    stores a part by the arguments of the request, and gives what the store says of it.
    """
    place = {name: arguments[name] for name in ("Bucket", "Key")}
    upload_id: str = attempt(
        lambda client: client.create_multipart_upload(
            ChecksumAlgorithm="CRC32", Metadata={WRITE_TOKEN: token}, **arguments
        )["UploadId"]
    )

    def move(numbered: tuple[int, Span]) -> dict[str, Any]:
        number, span = numbered
        stored = send(span, {"UploadId": upload_id, "PartNumber": number, **place})
        if transfer.on_part is not None:
            transfer.on_part()
        return {"PartNumber": number, **stored}

    try:
        parts = _in_parallel(move, enumerate(spans, start=1), num_threads=transfer.num_threads)
        return _complete(attempt, place=place, upload_id=upload_id, parts=parts, token=token)
    except BaseException:
        _abort(attempt, place=place, upload_id=upload_id)
        raise


def _complete(
    attempt: Attempt, *, place: dict[str, Any], upload_id: str, parts: list[Any], token: str
) -> str:
    def complete(client: S3Client) -> str:
        try:
            return client.complete_multipart_upload(
                UploadId=upload_id, MultipartUpload={"Parts": parts}, **place
            )["ETag"]
        except ClientError as error:
            if error_code(error) != "NoSuchUpload":
                raise
            # An earlier request may have completed it, and its answer been lost.
            there = client.head_object(**place)
            if there["Metadata"].get(WRITE_TOKEN) != token:
                raise
            return there["ETag"]

    etag: str = attempt(complete)
    return etag


def _abort(attempt: Attempt, *, place: dict[str, Any], upload_id: str) -> None:
    """Tell the store to drop the parts; what went wrong before matters more than a failure here."""
    try:
        drop_upload(attempt, bucket=place["Bucket"], key=place["Key"], upload_id=upload_id)
    except StorageError as error:
        logger.warning("parts of %s are left in the store: %s", place["Key"], error)


def unfinished_uploads(attempt: Attempt, *, bucket: str, prefix: str) -> Iterator[Unfinished]:
    """Uploads in parts of keys that begin with `prefix`, by their whole keys, page by page."""
    arguments: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxUploads": _PAGE_UPLOADS}
    while True:
        page = attempt(lambda client: dict(client.list_multipart_uploads(**arguments)))
        for upload in page.get("Uploads", []):
            # Some servers do not heed the prefix.
            if upload["Key"].startswith(prefix):
                began_at = upload["Initiated"].timestamp()
                yield Unfinished(upload["Key"], upload["UploadId"], began_at)
        # SeaweedFS sorts by upload id, and gives that marker alone.
        markers = {
            name: page[f"Next{name}"]
            for name in ("KeyMarker", "UploadIdMarker")
            if page.get(f"Next{name}")
        }
        if not page.get("IsTruncated") or not markers or markers.items() <= arguments.items():
            return
        arguments.update(markers)


def drop_upload(attempt: Attempt, *, bucket: str, key: str, upload_id: str) -> None:
    """Tell the store to drop the parts of an upload; one that is gone is no error."""

    def drop(client: S3Client) -> None:
        try:
            client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        except ClientError as error:
            if error_code(error) not in ("NoSuchUpload", "404"):
                raise

    attempt(drop)


def pieces_in_time(answer: GetObjectOutputTypeDef, *, transfer: Transfer) -> Iterator[bytes]:
    """The body of an answer as it arrives; ReadTimeoutError where it comes more slowly than is
    borne.

    The socket's own timeout starts again with each byte: a body may trickle for ever under it.
    """
    body = answer["Body"]
    # Its own reads tell nothing before all they were asked for is there.
    body._raw_stream = _Watched(body._raw_stream, Pace(transfer))  # type: ignore[attr-defined]
    with contextlib.closing(body):
        # The last, empty one makes it check the length, and the checksum where there is one.
        while piece := body.read(_BLOCK_BYTES):
            yield piece


class Pace:
    """Whether the bytes of one object move fast enough, judged by stretches of time."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._began_at = time.monotonic()
        self._num_bytes = 0

    def moved(self, num_bytes: int) -> None:
        """So many more; ReadTimeoutError at the end of a stretch in which too few have moved."""
        self._num_bytes += num_bytes
        now = time.monotonic()
        seconds = now - self._began_at
        if seconds < self._transfer.slow_window_seconds:
            return
        if self._num_bytes < seconds * self._transfer.slow_bytes_per_second:
            trickle = TimeoutError(f"{self._num_bytes} bytes in {seconds:.0f} s")
            raise ReadTimeoutError(endpoint_url="", error=trickle)
        if self._transfer.on_part is not None:
            self._transfer.on_part()
        self._began_at, self._num_bytes = now, 0


class _Watched:
    """A body as it arrives, whose pace is watched."""

    def __init__(self, raw: Any, pace: Pace) -> None:
        self._raw = raw
        self._pace = pace

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def read(self, amt: int) -> bytes:
        """What has arrived, `amt` bytes at most; empty at the end."""
        piece: bytes = self._raw.read1(amt)
        self._pace.moved(len(piece))
        return piece


class _Turn:
    """The time in which a part is read, hashed and signed, which few may do at once.

    Else the parts of a checkpoint would all be hashed in one burst, by more threads than there are
    processors, and whoever trains would stand still meanwhile. What waits for the network takes no
    turn.
    """

    _free = threading.Semaphore(max(1, (os.cpu_count() or 1) // 2))
    """Of all stores of this process."""

    def __init__(self) -> None:
        self._is_held = False

    def __enter__(self) -> _Turn:
        self._free.acquire()
        self._is_held = True
        return self

    def end(self) -> None:
        if self._is_held:
            self._is_held = False
            self._free.release()

    def __exit__(self, *_: object) -> None:
        self.end()


class Line:
    """By what blocks bodies are sent to one store.

    A socket's timeout (`connect_timeout_seconds`) is that of one block, whatever its size: small
    ones let a slow line pass, and end where nobody takes any. But between two blocks a thread gives
    the interpreter's lock away and takes it again, at the cost of whoever trains meanwhile. So the
    blocks are as large as the newest part has shown that the line takes in a small share of the
    timeout, and small again after a failure.
    """

    def __init__(self, transfer: Transfer) -> None:
        self._seconds = transfer.connect_timeout_seconds / _TIMES_SLOWER
        self.block_bytes = _SMALL_BLOCK_BYTES

    @contextlib.contextmanager
    def watched(self, num_bytes: int) -> Iterator[None]:
        """While a part of so many bytes is sent, and until the store has answered."""
        began_at = time.monotonic()
        try:
            yield
        except BaseException:
            self.block_bytes = _SMALL_BLOCK_BYTES
            raise
        if num_bytes >= _PARTS_THAT_TELL_BYTES:
            taken = int(num_bytes / max(1e-6, time.monotonic() - began_at) * self._seconds)
            self.block_bytes = min(max(taken, _SMALL_BLOCK_BYTES), _BLOCK_BYTES)


class Outgoing:
    """The body of a request that writes; its pace is watched while it is sent.

    Nothing is copied, and it is signed by the larger blocks that botocore asks for: to copy holds
    the interpreter's lock.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        transfer: Transfer,
        *,
        block_bytes: int = _SMALL_BLOCK_BYTES,
        on_sending: Callable[[], None] | None = None,
    ) -> None:
        """It is sent by blocks of `block_bytes`, whatever the HTTP client asks for. `on_sending`
        is called for each of them before it goes to the socket."""
        self._data = memoryview(data)
        self._block_bytes = block_bytes
        self._on_sending = on_sending
        self._position = 0
        # A block is asked for once the one before was taken. What does not move is no block.
        self._pace = Pace(dataclasses.replace(transfer, slow_bytes_per_second=0))

    def __len__(self) -> int:
        return len(self._data)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}
        self._position = origins[whence] + offset
        return self._position

    def read(self, size: int | None = -1, /) -> memoryview:
        if size is None or size < 0:
            size = len(self._data)
        elif size < PAYLOAD_BUFFER:
            size = self._block_bytes
            if self._on_sending is not None:
                self._on_sending()
        end = self._position + size
        block = self._data[self._position : end]
        self._position += len(block)
        self._pace.moved(len(block))
        return block


def download(
    read_span: Callable[[Span, TakePieces], None],
    *,
    path: Path,
    num_bytes: int,
    transfer: Transfer,
    digest: Digest,
    check: Callable[[Digest], None] | None = None,
) -> None:
    """The object as a file, by parallel ranges; `digest` is fed with its bytes, in their order.

    `read_span` hands over the pieces of a range, from its start again where it is tried again.
    `path` does not appear where `check` of the digest raises.
    """
    spans = part_spans(num_bytes, part_bytes=transfer.part_bytes)

    def fill(file: IO[bytes]) -> None:
        follower = Follower(file.fileno(), spans, digest)

        def fetch(span: Span) -> None:
            # Piece by piece: what is not held needs no memory that the system must clear first.
            read_span(span, partial(_write_at, file.fileno(), span[0]))
            if transfer.on_part is not None:
                transfer.on_part()
            follower.written(span)

        _in_parallel(fetch, spans, num_threads=transfer.num_threads)
        follower.follow()
        if check is not None:
            check(digest)

    write_whole(path, fill, flush=False)


def _write_at(descriptor: int, position: int, pieces: Iterable[bytes]) -> int:
    """Write the pieces one after the other; how many bytes they had."""
    start = position
    for piece in pieces:
        left = memoryview(piece)
        while left:
            written = os.pwrite(descriptor, left, position)
            left, position = left[written:], position + written
    return position - start


class Follower:
    """Feeds a digest with a file whose spans are written in any order, as far as it is whole.

    By whichever thread has written: the bytes are still in the processor's or the system's cache,
    and the other threads wait for the network.
    """

    def __init__(self, descriptor: int, spans: list[Span], digest: Digest) -> None:
        self._descriptor = descriptor
        self._ahead = deque(spans)
        self._written: set[Span] = set()
        self._digest = digest
        self._following = threading.Lock()
        self._block = memoryview(bytearray(_BLOCK_BYTES))

    def written(self, span: Span) -> None:
        self._written.add(span)
        if self._following.acquire(blocking=False):
            try:
                self.follow()
            finally:
                self._following.release()

    def follow(self) -> None:
        """Up to the first span that is not written; one thread at a time."""
        while self._ahead and self._ahead[0] in self._written:
            position, end = self._ahead.popleft()
            while position < end:
                block = self._block[: end - position]
                count = os.preadv(self._descriptor, [block], position)
                if not count:
                    raise StorageError("a file became shorter while it was written")
                self._digest.update(block[:count])
                position += count


def part_spans(num_bytes: int, *, part_bytes: int) -> list[Span]:
    """Bytes [0, num_bytes) cut into parts of `part_bytes`, or larger where S3's 10,000 parts would
    not do; the last is smaller."""
    step = max(part_bytes, -(-num_bytes // _MAX_PARTS))
    return [(start, min(start + step, num_bytes)) for start in range(0, num_bytes, step)]


class PartReader:
    """A local file from which threads read parts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self.num_bytes = os.fstat(self._file.fileno()).st_size

    def read(self, span: Span) -> bytes:
        """Bytes [start, end); StorageError where the file has become shorter."""
        chunks: list[bytes] = []
        position = span[0]
        while position < span[1]:
            chunk = os.pread(self._file.fileno(), span[1] - position, position)
            if not chunk:
                raise StorageError(f"{self._path} became shorter while it was uploaded")
            chunks.append(chunk)
            position += len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def __enter__(self) -> PartReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _in_parallel(action: Callable[[Any], T], items: Iterable[Any], *, num_threads: int) -> list[T]:
    """The results in order; after the first failure nothing more is started."""
    with ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="shoal-part") as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((f for f in futures if f.done() and f.exception() is not None), None)
            return [f.result() for f in ([failed] if failed else futures)]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
