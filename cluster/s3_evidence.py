"""Whether all the bytes of an object came as the store holds them, told by its own checksum.

S3 gives one with an object that was written with one, and botocore checks it, but only where a
whole object that was written at one go is read at one go. Ranges and objects written in parts are
checked here (https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from botocore.exceptions import FlexibleChecksumError
from isal import isal_zlib


class Digest(Protocol):
    """As those of hashlib."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = isal_zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


def _md5() -> Digest:
    return hashlib.md5(usedforsecurity=False)


def _sha1() -> Digest:
    return hashlib.sha1(usedforsecurity=False)


_ALGORITHMS: dict[str, Callable[[], Digest]] = {
    "ChecksumCRC32": _Crc32,
    "ChecksumSHA256": hashlib.sha256,
    "ChecksumSHA1": _sha1,
}
"""Those of S3 that need no package of their own."""
_OTHERWISE = ("ServerSideEncryption", "SSE", "Checksum")
"""Beginnings of what an answer holds where the ETag may be another than the MD5: encryption, and
checksums of other algorithms, which some buckets have instead."""
_MD5 = re.compile(r'"?([0-9a-f]{32})(-\d+)?"?')


class _OfParts:
    """The digest of the digests of parts, all of one size but the last."""

    def __init__(self, algorithm: Callable[[], Digest], part_bytes: int) -> None:
        self._algorithm, self._part_bytes = algorithm, part_bytes
        self._all = algorithm()
        self._part = algorithm()
        self._left = part_bytes

    def update(self, data: bytes | memoryview, /) -> None:
        rest = memoryview(data)
        while rest:
            piece = rest[: self._left]
            self._part.update(piece)
            self._left -= len(piece)
            rest = rest[len(piece) :]
            if not self._left:
                self._end_part()

    def digest(self) -> bytes:
        if self._left < self._part_bytes:
            self._end_part()
        return self._all.digest()

    def _end_part(self) -> None:
        self._all.update(self._part.digest())
        self._part, self._left = self._algorithm(), self._part_bytes


class Evidence:
    """Of one object, over all tries to read it.

    Where the store names no checksum, the ETag is the MD5, but not of all that is encrypted. Where
    it may not be, or has not the form, the same bytes twice are taken for right.
    """

    def __init__(self, head_part: Callable[[], Mapping[str, Any] | None]) -> None:
        """`head_part` asks for the head of part 1; None where the store has no such thing."""
        self._head_part = head_part
        self._expected: bytes | None = None
        self._is_certain = False
        self._seen: bytes | None = None

    def digest(self, answer: Mapping[str, Any]) -> Digest:
        """What is to be fed with all bytes of the object, of which `answer` is a head or a get."""
        for name, algorithm in _ALGORITHMS.items():
            text, _, num_parts = str(answer.get(name) or "").partition("-")
            if text and (found := self._digest(algorithm, num_parts, answer)):
                self._expected, self._is_certain = base64.b64decode(text), True
                return found
        self._expected, self._is_certain = None, False
        etag = _MD5.fullmatch(answer.get("ETag", ""))
        if etag and (found := self._digest(_md5, (etag[2] or "").removeprefix("-"), answer)):
            self._expected = bytes.fromhex(etag[1])
            self._is_certain = not any(name.startswith(_OTHERWISE) for name in answer)
            return found
        return _md5()

    def _digest(
        self, algorithm: Callable[[], Digest], num_parts: str, answer: Mapping[str, Any]
    ) -> Digest | None:
        """None where the parts are not known."""
        if not num_parts:
            return algorithm()
        part = self._head_part() if num_parts.isdigit() else None
        part_bytes = part["ContentLength"] if part else 0
        if not part_bytes or -(-answer["ContentLength"] // part_bytes) != int(num_parts):
            return None
        return _OfParts(algorithm, part_bytes)

    def weigh(self, digest: Digest) -> None:
        """FlexibleChecksumError unless the bytes that it was fed with are those of the object."""
        found = digest.digest()
        if found == self._expected or (not self._is_certain and found == self._seen):
            return
        self._seen = found
        raise FlexibleChecksumError(error_msg="the bytes are not those of the store's checksum")

    def weighed(self, pieces: Iterable[bytes], answer: Mapping[str, Any]) -> Iterator[bytes]:
        """The pieces of the whole object, weighed at their end."""
        digest = self.digest(answer)
        for piece in pieces:
            digest.update(piece)
            yield piece
        self.weigh(digest)
