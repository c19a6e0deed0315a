"""Sources of rows: what `shoal prepare SOURCE` names, opened as a stream of tables.

    open_source(uri, ...)  ->  TableFiles | ImageFolder | HuggingFaceDataset

A source can be read several times and gives the same rows in the same order each time. None is
ever held in memory as a whole.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import xxhash

from cluster.storage import Head, Store, is_s3, local_path, open_store, split_s3_uri, split_uri
from jobs.errors import DataError, Problem
from jobs.spec import StoreAccess

SUFFIXES = {
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "images": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
}
COMPRESSION = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
"""Endings of compressed text files, and what pyarrow calls their codecs."""
_HUB_NAME = re.compile(r"(hf://)?[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HASHED_BYTES = 256 * 2**20
_SAVED_DATASET = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class SourceBatch:
    """Consecutive rows of a source."""

    table: pa.Table
    file: str
    """Where they stand, for messages."""
    first_row: int
    """Number of the first of them in that file, from 1."""


class Source(Protocol):
    """Rows in a fixed order."""

    @property
    def uri(self) -> str:
        """What was read, without secrets."""
        ...

    @property
    def kind(self) -> str: ...

    @property
    def schema(self) -> pa.Schema:
        """All columns, without metadata."""
        ...

    @property
    def identity(self) -> object:
        """JSON values that change when the rows do."""
        ...

    @property
    def files(self) -> Iterator[str]:
        """URIs of the files that are read; none for a dataset of the hub."""
        ...

    @property
    def num_bytes(self) -> int | None:
        """Bytes to be read in one pass; None where that is not known."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes read in the pass that is under way."""
        ...

    def batches(self, columns: Sequence[str]) -> Iterator[SourceBatch]:
        """One pass over the rows, of the named columns; DataError names the file and the row."""
        ...


@dataclass(frozen=True)
class SourceChoice:
    """What of a source is meant, and how it is reached."""

    uri: str
    access: StoreAccess
    text: str = "text"
    """Column that is read as text whatever it looks like."""
    columns: tuple[str, ...] | None = None
    revision: str | None = None
    config: str | None = None
    part: str | None = None
    """Split of a Hugging Face dataset."""

    @property
    def hub_options(self) -> list[str]:
        """Flags given that only a Hugging Face dataset takes."""
        given = {"--revision": self.revision, "--config": self.config, "--source-split": self.part}
        return [flag for flag, value in given.items() if value is not None]


def open_source(choice: SourceChoice) -> Source:
    """The source that is meant; reads a little of it for its columns.

    Raises DataError where there is nothing, or nothing that can be read.
    """
    from trainers.data.hugging_face import HuggingFaceDataset

    uri = choice.uri
    if not is_s3(uri) and not _has_glob(uri):
        path = None if uri.startswith("hf://") else local_path(uri)
        if path is not None and any((path / name).is_file() for name in _SAVED_DATASET):
            return HuggingFaceDataset.from_folder(path, choice)
        named = path is None or (not path.exists() and _may_be_hub_name(choice))
        if named:
            return HuggingFaceDataset.from_hub(uri.removeprefix("hf://"), choice)
    if choice.hub_options:
        raise DataError(
            Problem(
                f"{choice.hub_options[0]} is given, but {uri} is no Hugging Face dataset",
                f"leave {choice.hub_options[0]} out",
            )
        )
    store, heads = find_files(uri, choice.access)
    return _open_files(uri, store, heads, choice)


def _open_files(uri: str, store: Store, heads: Sequence[Head], choice: SourceChoice) -> Source:
    from trainers.data.image_folder import ImageFolder
    from trainers.data.table_files import TableFiles

    kinds = {kind: [h for h in heads if file_kind(h.key) == kind] for kind in SUFFIXES}
    present = [kind for kind, found in kinds.items() if found]
    if not present:
        endings = ", ".join(s for suffixes in SUFFIXES.values() for s in suffixes)
        raise DataError(
            Problem(
                f"{uri} holds no file that can be read" if heads else f"{uri} is empty",
                f"files are known by their endings: {endings}, and those with .gz, .bz2 or .zst",
            )
        )
    if len(present) > 1:
        raise DataError(
            Problem(
                f"{uri} holds files of several kinds: "
                + ", ".join(f"{len(kinds[kind])} {kind}" for kind in present),
                f"name those that are meant, as in: '{uri.rstrip('/')}/**/*"
                f"{SUFFIXES[present[0]][0]}'",
            )
        )
    kind = present[0]
    if kind == "images":
        return ImageFolder(uri=uri, store=store, heads=kinds[kind])
    return TableFiles.open(
        uri=uri,
        kind=kind,
        store=store,
        heads=kinds[kind],
        text=choice.text,
        columns=choice.columns,
    )


def find_files(uri: str, access: StoreAccess) -> tuple[Store, list[Head]]:
    """The store and the files in it that a file, a folder or a pattern names, in order of keys.

    Names that begin with "." or "_" are left out of folders. Raises DataError where there is none.
    """
    if _has_glob(uri):
        plain = re.split(r"[*?\[]", uri, maxsplit=1)[0]
        root = plain[: plain.rfind("/") + 1] or "."
        pattern = _glob_pattern(uri[len(root) :] if root != "." else uri)
        store = open_store(root.rstrip("/") or "/", access)
        heads = [head for head in store.list() if pattern.fullmatch(head.key)]
        if not heads:
            raise DataError(Problem(f"{uri} matches no file", f"see what is in {root}"))
        return store, heads
    if not is_s3(uri) or split_s3_uri(uri)[1]:
        parent, name = split_uri(uri)
        beside = open_store(parent, access)
        head = beside.head(name)
        if head is not None:
            return beside, [head]
    store = open_store(uri, access)
    heads = [head for head in store.list() if not _is_hidden(head.key)]
    if not heads:
        raise _missing(uri)
    return store, heads


def files_identity(store: Store, heads: Sequence[Head]) -> object:
    """JSON values that change with the files.

    On S3 the ETags. Local files of moderate size are known by their contents, because a copy or a
    checkout of the same rows has other times.
    """
    by_content = not is_s3(store.uri) and sum(h.num_bytes for h in heads) <= _HASHED_BYTES
    return [
        [h.key, h.num_bytes, xxhash.xxh3_64_hexdigest(store.read(h.key)) if by_content else h.etag]
        for h in heads
    ]


def file_kind(key: str) -> str | None:
    """csv, jsonl, parquet or images, by the ending; None for any other file."""
    name = key.lower()
    for suffix in COMPRESSION:
        name = name.removesuffix(suffix)
    for kind, suffixes in SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    return None


def _has_glob(uri: str) -> bool:
    return any(sign in uri for sign in "*?[") and not (
        not is_s3(uri) and Path(uri).expanduser().exists()
    )


def _may_be_hub_name(choice: SourceChoice) -> bool:
    if not _HUB_NAME.fullmatch(choice.uri) or file_kind(choice.uri) is not None:
        return False
    return "/" in choice.uri or bool(choice.hub_options)


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """`*` and `?` stay inside a folder, `**/` means any number of folders, `[ab]` a character."""
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", glob)
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meanings.get(token)
            or (token.replace("[!", "[^") if token.startswith("[") else re.escape(token))
            for token in tokens
        )
    )


def _is_hidden(key: str) -> bool:
    return any(part.startswith((".", "_")) for part in key.split("/"))


def _missing(uri: str) -> DataError:
    if is_s3(uri):
        return DataError(Problem(f"{uri}: there is no such object, and nothing below it"))
    path = local_path(uri)
    if path.is_dir():
        return DataError(Problem(f"{uri} is empty", "name a folder that holds files"))
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = (
        f"did you mean {path.parent / near[0]}?"
        if near
        else "name a file, a folder, a pattern, an s3:// URI or hf://OWNER/DATASET"
    )
    return DataError(Problem(f"{uri}: no such file or folder", hint))
