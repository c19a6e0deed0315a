"""Store on S3 or a server that speaks its protocol.

Transient faults are retried here: tenacity repeats a request, bodies that are cut and conditional
writes in conflict too, until `Transfer.retry_seconds` have passed. What is still at fault then is
a StoreAway, for those who can wait longer.
"""

from __future__ import annotations

import itertools
import mimetypes
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import tenacity
import xxhash
from botocore.exceptions import ClientError

from cluster.s3_access import (
    DEFAULT_REGION,
    Keys,
    S3Settings,
    make_client,
    make_filesystem,
    make_session,
)
from cluster.s3_errors import (
    S3_ERRORS,
    describe,
    error_code,
    has_expired,
    is_missing,
    is_transient,
    wanted_pause,
)
from cluster.s3_evidence import Digest, Evidence
from cluster.s3_quick import QuickReads
from cluster.s3_transfer import (
    WRITE_TOKEN,
    Line,
    Outgoing,
    PartReader,
    ReadSpan,
    Span,
    TakePieces,
    checksum,
    copy_parts,
    download,
    drop_upload,
    pieces_in_time,
    unfinished_uploads,
    write_parts,
)
from cluster.storage import (
    Head,
    ObjectExists,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StoreAway,
    Unfinished,
    check_key,
    check_prefix,
)
from jobs.errors import Problem

if TYPE_CHECKING:
    import boto3.session
    import pyarrow.fs
    from mypy_boto3_s3.client import S3Client

T = TypeVar("T")

_KEYS_PER_DELETE = 1000
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 5.0


_wait_at_random = tenacity.wait_random_exponential(
    multiplier=_FIRST_WAIT_SECONDS, max=_LONGEST_WAIT_SECONDS
)


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: as long as the server asked for, else longer each time."""
    asked = wanted_pause(state.outcome.exception()) if state.outcome is not None else 0.0
    return max(asked, _wait_at_random(state))


class S3Connection:
    """Client and session of one process, made on first use; pickles as its settings alone."""

    def __init__(self, settings: S3Settings, *, keys: Keys | None = None) -> None:
        self.settings = settings
        self.line = Line(settings.transfer)
        self._quick = QuickReads(settings)
        self._keys = keys
        self._lock = threading.Lock()
        self._made: tuple[int, boto3.session.Session, S3Client] | None = None
        self._region: str | None = settings.region

    def __getstate__(self) -> S3Settings:
        return self.settings

    def __setstate__(self, settings: S3Settings) -> None:
        self.__init__(settings)  # type: ignore[misc]

    @property
    def endpoint(self) -> str:
        """The endpoint as a user knows it."""
        return self.settings.endpoint_url or "AWS S3"

    def client(self) -> S3Client:
        """The client of this process; a fork makes its own, as sockets must not be shared."""
        return self._parts()[1]

    def _parts(self) -> tuple[boto3.session.Session, S3Client]:
        made = self._made
        if made is None or made[0] != os.getpid():
            with self._lock:
                made = self._made
                if made is None or made[0] != os.getpid():
                    session = make_session(self.settings, keys=self._keys)
                    made = (os.getpid(), session, make_client(session, self.settings))
                    self._made = made
        return made[1], made[2]

    def _forget(self, used: tuple[boto3.session.Session, S3Client]) -> None:
        """Makes a new session for the next request, unless another thread has done so."""
        with self._lock:
            if self._made is not None and self._made[2] is used[1]:
                self._made = None

    def attempt(self, action: Callable[[S3Client], T], *, doing: str, uri: str) -> T:
        """What `action` returns; transient faults are retried, the last one is described.

        Credentials that have expired are looked up anew, once: a file or a service may hold newer.
        """
        limit_seconds = self.settings.transfer.retry_seconds

        def is_over(state: tenacity.RetryCallState) -> bool:
            # A first try that took long, of a large object, say, does not forbid a second one.
            took = (state.seconds_since_start or 0.0) if state.attempt_number > 1 else 0.0
            return took + state.upcoming_sleep >= limit_seconds

        retrying = tenacity.Retrying(
            stop=is_over,
            wait=_pause,
            retry=tenacity.retry_if_exception(is_transient),
            reraise=True,
        )
        try:
            used = self._parts()
            try:
                return retrying(lambda: action(self.client()))
            except ClientError as error:
                if not has_expired(error):
                    raise
                self._forget(used)
                return retrying(lambda: action(self.client()))
        except S3_ERRORS as error:
            raise describe(
                error,
                doing=doing,
                uri=uri,
                endpoint=self.endpoint,
                credentials=self._credentials_text(),
            ) from error

    def read_quickly(self, *, bucket: str, key: str, span: Span) -> bytes | None:
        """Bytes [start, end) of the object in one try that costs little; None: read it properly."""
        try:
            session, client = self._parts()
            return self._quick.read(
                session,
                endpoint_url=self.settings.endpoint_url or client.meta.endpoint_url,
                region=self.settings.region or DEFAULT_REGION,
                bucket=bucket,
                key=key,
                span=span,
            )
        except S3_ERRORS:
            return None  # credentials that are not to be found, which the proper read tells

    def _credentials_text(self) -> str:
        """Where the credentials came from; never the credentials."""
        if self.settings.anonymous:
            return "an anonymous request"
        if self.settings.profile is not None:
            return f"the credentials of profile {self.settings.profile}"
        credentials = self._made and self._made[1].get_credentials()
        if not credentials:
            return "the credentials"
        if credentials.method == "env":
            return "the credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return f"the credentials from {credentials.method}"

    def filesystem(self, *, bucket: str) -> pyarrow.fs.S3FileSystem:
        """pyarrow's view of the same endpoint, with the credentials of this moment."""

        def make(client: S3Client) -> pyarrow.fs.S3FileSystem:
            session, _ = self._parts()
            if self._region is None and self.settings.endpoint_url is None:
                # boto3 follows a redirect to the bucket's region, pyarrow does not.
                self._region = client.head_bucket(Bucket=bucket).get("BucketRegion")
            region = self._region or DEFAULT_REGION
            return make_filesystem(session, client, self.settings, region=region)

        return self.attempt(make, doing="open", uri=f"s3://{bucket}")


class S3Store:
    """Store below `s3://bucket/prefix`; see cluster.storage.Store for the contract."""

    part_copy_bytes = 2**28
    """Larger objects are copied in parts of this size, each in the time of a request. At one go S3
    copies 5 GiB at most."""

    def __init__(self, *, bucket: str, prefix: str, connection: S3Connection) -> None:
        self._bucket = bucket
        self._root = f"{prefix}/" if prefix else ""
        self._connection = connection
        self._bucket_is_known = False

    @classmethod
    def open(
        cls, *, bucket: str, prefix: str, settings: S3Settings, keys: Keys | None = None
    ) -> S3Store:
        """The store with connections of its own, made on first use.

        `keys` are those of the embedded store, which no variable holds yet; they are not pickled.
        """
        return cls(bucket=bucket, prefix=prefix, connection=S3Connection(settings, keys=keys))

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    @property
    def uri(self) -> str:
        return f"s3://{self.filesystem_root}"

    @property
    def filesystem_root(self) -> str:
        return f"{self._bucket}/{self._root}".rstrip("/")

    def within(self, prefix: str) -> S3Store:
        folder = check_prefix(prefix).rstrip("/")
        root = (self._root + folder).rstrip("/")
        return S3Store(bucket=self._bucket, prefix=root, connection=self._connection)

    def filesystem(self) -> pyarrow.fs.S3FileSystem:
        return self._connection.filesystem(bucket=self._bucket)

    # ------------------------------------------------------------------------------- reading

    def read(self, key: str) -> bytes:
        return self._get(key, b"".join)

    def read_range(self, key: str, *, start: int, end: int) -> bytes:
        if not 0 <= start <= end:
            raise ValueError(f"[{start}, {end}) is no range of bytes")
        if end == start:
            return b""
        span = start, end
        data = self._connection.read_quickly(bucket=self._bucket, key=self._key(key), span=span)
        if data is not None:
            return data
        data = self._get(key, b"".join, span=span)
        if len(data) != end - start:
            raise _range_error(f"{self.uri}/{key}", (start, end))
        return data

    def _get(
        self,
        key: str,
        take: Callable[[Iterable[bytes]], T],
        *,
        span: Span | None = None,
        etag: str = "",
    ) -> T:
        """What `take` makes of the pieces of the object, or of bytes [start, end) of it; with an
        ETag, of that version alone. It is called again where the read is tried again."""
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Key": self._key(key)}
        if span is not None:
            arguments["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        if etag:
            arguments["IfMatch"] = etag

        evidence = Evidence(partial(self._head_part, key))

        def get(client: S3Client) -> T:
            try:
                answer = client.get_object(**arguments)
            except ClientError as error:
                raise self._reading_error(error, key) or error from error
            pieces = pieces_in_time(answer, transfer=self._connection.settings.transfer)
            return take(pieces if span is not None else evidence.weighed(pieces, answer))

        return self._attempt(get, doing="read", key=key)

    def _head_part(self, key: str) -> dict[str, Any] | None:
        """The head of the first part; None from a store that knows of none."""
        try:
            return self._head_object(key, PartNumber=1)
        except StoreAway:
            raise
        except StorageError:
            return None

    def _reading_error(self, error: ClientError, key: str) -> StorageError | None:
        """The errors of a read that are no fault of the store; None for the others."""
        uri = f"{self.uri}/{key}"
        if is_missing(error):
            return ObjectMissing(key, f"there is no {uri}")
        if error_code(error) == "InvalidRange":
            return _range_error(uri, None)
        if error_code(error) in ("PreconditionFailed", "412"):
            return PreconditionFailed(
                key, Problem(f"{uri} was replaced while it was read", "repeat the command")
            )
        return None

    def head(self, key: str) -> Head | None:
        answer = self._head_object(key)
        if answer is None:
            return None
        return Head(
            key=key,
            num_bytes=answer["ContentLength"],
            etag=answer["ETag"],
            modified_at=answer["LastModified"].timestamp(),
        )

    def _head_object(self, key: str, **arguments: Any) -> dict[str, Any] | None:
        def ask(client: S3Client) -> dict[str, Any]:
            return dict(client.head_object(Bucket=self._bucket, Key=self._key(key), **arguments))

        def head(client: S3Client) -> dict[str, Any] | None:
            try:
                answer = ask(client)
            except ClientError as error:
                if is_missing(error) and self._bucket_is_known:
                    return None
                if is_transient(error):
                    raise
                if self._explain_head(client, key):
                    return None
                answer = ask(client)
            self._bucket_is_known = True
            return answer

        return self._attempt(head, doing="read", key=key)

    def _explain_head(self, client: S3Client, key: str) -> bool:
        """Whether a head was refused because the object is absent; False where it can be read.
        Raises why it cannot.

        The answer to a head has no body, and 404 stands for a missing bucket too: a read of one
        byte tells which.
        """
        try:
            client.get_object(Bucket=self._bucket, Key=self._key(key), Range="bytes=0-0")[
                "Body"
            ].close()
        except ClientError as error:
            if not is_missing(error):
                raise
            self._bucket_is_known = True
            return True
        return False

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[Head]:
        start = {"StartAfter": self._root + check_key(after)} if after is not None else {}
        for page in self._pages(prefix, doing="list", **start):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):
                    yield Head(
                        key=item["Key"].removeprefix(self._root),
                        num_bytes=item["Size"],
                        etag=item["ETag"],
                        modified_at=item["LastModified"].timestamp(),
                    )

    def list_folders(self, prefix: str = "") -> Iterator[str]:
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        for page in self._pages(folder, doing="list", Delimiter="/"):
            for item in page.get("CommonPrefixes", []):
                yield item["Prefix"].removeprefix(self._root + folder).rstrip("/")

    def _pages(self, prefix: str, *, doing: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        arguments |= {"Bucket": self._bucket, "Prefix": self._root + check_prefix(prefix)}
        while True:
            page = self._attempt(
                lambda client: dict(client.list_objects_v2(**arguments)), doing=doing, key=prefix
            )
            self._bucket_is_known = True
            yield page
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def download(self, key: str, path: Path, *, hashed: bool = False) -> str:
        xxh3 = xxhash.xxh3_128()
        if hashed:
            # Whoever knows what it must be needs no other evidence.
            self._download(key, path, lambda _: xxh3)
            return str(xxh3.hexdigest())
        evidence = Evidence(partial(self._head_part, key))
        self._attempt(
            lambda _: self._download(key, path, evidence.digest, check=evidence.weigh),
            doing="read",
            key=key,
        )
        return ""

    def _download(
        self,
        key: str,
        path: Path,
        digest_for: Callable[[dict[str, Any]], Digest],
        *,
        check: Callable[[Digest], None] | None = None,
    ) -> None:
        """`digest_for` is given the object's head; `check` what was fed, before `path` appears."""
        found = self._head_object(key, ChecksumMode="ENABLED")
        if found is None:
            raise ObjectMissing(key, f"there is no {self.uri}/{key}")

        def read_span(span: Span, take: TakePieces) -> None:
            if self._get(key, take, span=span, etag=found["ETag"]) != span[1] - span[0]:
                raise _range_error(f"{self.uri}/{key}", span)

        download(
            read_span,
            path=path,
            num_bytes=found["ContentLength"],
            transfer=self._connection.settings.transfer,
            digest=digest_for(found),
            check=check,
        )

    # ------------------------------------------------------------------------------- writing

    def write(self, key: str, data: bytes | memoryview) -> str:
        view = memoryview(data).cast("B")
        if len(view) > self._connection.settings.transfer.part_bytes:
            return self._write_parts(
                key, num_bytes=len(view), read_part=lambda span: view[span[0] : span[1]]
            )
        return self._put(key, bytes(data))

    def upload(self, key: str, path: Path) -> str:
        with PartReader(path) as reader:
            if reader.num_bytes > self._connection.settings.transfer.part_bytes:
                return self._write_parts(key, num_bytes=reader.num_bytes, read_part=reader.read)
            return self._put(key, reader.read((0, reader.num_bytes)))

    def copy(self, source: str, key: str) -> None:
        found = self._head_object(source)
        if found is None:
            raise ObjectMissing(source, f"there is no {self.uri}/{source}")
        arguments = self._writing_arguments(key)
        held: dict[str, Any] = {
            "CopySource": {"Bucket": self._bucket, "Key": self._key(source)},
            "CopySourceIfMatch": found["ETag"],
        }
        if found["ContentLength"] > self.part_copy_bytes:
            copy_parts(
                lambda action: self._attempt(action, doing="write", key=key),
                source=held,
                arguments=arguments,
                token=uuid.uuid4().hex,
                num_bytes=found["ContentLength"],
                part_bytes=self.part_copy_bytes,
                transfer=self._connection.settings.transfer,
            )
            return

        def copy(client: S3Client) -> None:
            try:
                client.copy_object(ChecksumAlgorithm="CRC32", **held, **arguments)
            except ClientError as error:
                raise self._reading_error(error, source) or error from error

        self._attempt(copy, doing="write", key=key)

    def write_if_absent(self, key: str, data: bytes | memoryview) -> str:
        lost = ObjectExists(key, f"{self.uri}/{key} exists already")
        return self._put_conditionally(key, bytes(data), lost=lost, IfNoneMatch="*")

    def write_if_match(self, key: str, data: bytes | memoryview, *, etag: str) -> str:
        lost = PreconditionFailed(key, f"{self.uri}/{key} was changed by another writer")
        return self._put_conditionally(key, bytes(data), lost=lost, IfMatch=etag)

    def _put_conditionally(
        self, key: str, data: bytes, *, lost: PreconditionFailed, **condition: str
    ) -> str:
        """The ETag if this write won; else raises `lost`.

        Where the server knows no conditions, what is there is looked at before.
        """
        if not self._connection.settings.conditional_writes:
            found = self.head(key)
            if (found.etag if found else None) != condition.get("IfMatch"):
                raise lost
            return self._put(key, data)
        token = uuid.uuid4().hex
        try:
            return self._put(key, data, lost=lost, Metadata={WRITE_TOKEN: token}, **condition)
        except PreconditionFailed:
            there = self._head_object(key)
            if there is not None and there["Metadata"].get(WRITE_TOKEN) == token:
                return str(there["ETag"])
            raise

    def _put(
        self, key: str, data: bytes, *, lost: PreconditionFailed | None = None, **arguments: Any
    ) -> str:
        arguments |= self._writing_arguments(key)
        arguments["ChecksumCRC32"] = checksum(data)
        transfer = self._connection.settings.transfer

        def put(client: S3Client) -> str:
            try:
                return client.put_object(Body=cast(Any, Outgoing(data, transfer)), **arguments)[
                    "ETag"
                ]
            except ClientError as error:
                # AWS answers 404 where an object to be replaced is absent.
                if error_code(error) in ("PreconditionFailed", "412", "NoSuchKey") and lost:
                    raise lost from error
                raise

        etag = self._attempt(put, doing="write", key=key)
        self._bucket_is_known = True
        return etag

    def _write_parts(self, key: str, *, num_bytes: int, read_part: ReadSpan) -> str:
        return write_parts(
            lambda action: self._attempt(action, doing="write", key=key),
            arguments=self._writing_arguments(key),
            token=uuid.uuid4().hex,
            num_bytes=num_bytes,
            read_part=read_part,
            transfer=self._connection.settings.transfer,
            line=self._connection.line,
        )

    def _writing_arguments(self, key: str) -> dict[str, Any]:
        arguments = {"Bucket": self._bucket, "Key": self._key(key)}
        # So that a browser that opens the report's object shows it.
        content_type = mimetypes.guess_type(key)[0]
        if content_type is not None:
            arguments["ContentType"] = content_type
        return arguments | self._connection.settings.encryption

    def delete(self, keys: Iterable[str]) -> None:
        remaining = iter(keys)
        while batch := list(itertools.islice(remaining, _KEYS_PER_DELETE)):
            self._delete_batch([self._key(key) for key in batch])

    def _delete_batch(self, full_keys: Sequence[str]) -> None:
        def delete(client: S3Client) -> None:
            answer = client.delete_objects(
                Bucket=self._bucket,
                Delete={"Objects": [{"Key": key} for key in full_keys], "Quiet": True},
            )
            for error in answer.get("Errors", []):
                # Raised as the request's error is, so that it is retried and told alike.
                details: Any = {"Code": error.get("Code", ""), "Message": error.get("Message", "")}
                raise ClientError({"Error": details}, "DeleteObjects")

        self._attempt(delete, doing="delete", key=full_keys[0].removeprefix(self._root))

    def list_unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        folder = f"{check_prefix(prefix).rstrip('/')}/" if prefix else ""
        found = unfinished_uploads(
            lambda action: self._attempt(action, doing="list unfinished uploads of", key=prefix),
            bucket=self._bucket,
            prefix=self._root + folder,
        )
        return (replace(each, key=each.key.removeprefix(self._root)) for each in found)

    def drop_unfinished(self, unfinished: Iterable[Unfinished]) -> None:
        for each in unfinished:
            drop_upload(
                partial(self._attempt, doing="drop an unfinished upload of", key=each.key),
                bucket=self._bucket,
                key=self._root + each.key,
                upload_id=each.upload_id,
            )

    def create_bucket(self) -> None:
        """Create the store's bucket unless it is there."""

        def create(client: S3Client) -> None:
            try:
                client.create_bucket(Bucket=self._bucket)
            except ClientError as error:
                if error_code(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

        self._attempt(create, doing="create", key="")

    # ------------------------------------------------------------------------------- shared

    def _key(self, key: str) -> str:
        return self._root + check_key(key)

    def _attempt(self, action: Callable[[S3Client], T], *, doing: str, key: str) -> T:
        uri = f"{self.uri}/{key}" if key else self.uri
        return self._connection.attempt(action, doing=doing, uri=uri)


def _range_error(uri: str, span: tuple[int, int] | None) -> StorageError:
    given = f"bytes {span[0]} to {span[1]} were asked for" if span else "the range lies behind it"
    return StorageError(
        Problem(
            f"{uri} is shorter than it should be: {given}",
            "the object was changed or cut off: write it again, or prepare the data again",
        )
    )
