"""CSV, JSON Lines and Parquet files as one stream of tables with one schema."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pyarrow.types as pt

from cluster.storage import Head, Store, is_s3, join_uri, open_store
from jobs.errors import DataError, EnvironmentFault, Problem
from trainers.data.columns import check_same_schema, storable
from trainers.data.sources import COMPRESSION, SourceBatch, files_identity
from trainers.data.store_file import StoreFile

_BLOCK_BYTES = 8 * 2**20
"""Text parsed at a time; the types of columns are told from the first block."""
_PARQUET_ROWS = 2048


class TableFiles:
    """Files of one kind, in order of their names; the first one decides the columns' types."""

    def __init__(
        self,
        *,
        uri: str,
        kind: str,
        store: Store,
        heads: Sequence[Head],
        schema: pa.Schema,
        columns: tuple[str, ...] | None,
    ) -> None:
        self.uri, self.kind, self.schema = uri, kind, schema
        self._store, self._heads, self._columns = store, heads, columns
        self._files_done = 0
        self._file: StoreFile | None = None

    @classmethod
    def open(
        cls,
        *,
        uri: str,
        kind: str,
        store: Store,
        heads: Sequence[Head],
        text: str,
        columns: tuple[str, ...] | None,
    ) -> TableFiles:
        """Read the columns of the first file; `text` is read as text whatever it looks like.

        With `columns`, fields of JSON Lines that are not among them are passed over.
        """
        first = heads[0]
        where = join_uri(store.uri, first.key)
        try:
            with _reading(where, kind):
                schema = _first_schema(kind, StoreFile(store, first), first.key, text)
        except _BrokenRow as broken:
            raise _broken_json(
                store, first, where, fields={}, strict=False, reason=str(broken)
            ) from broken
        twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
        if twice:
            raise DataError(
                Problem(f"{where}: the column {twice[0]} stands twice", "rename one of them")
            )
        return cls(uri=uri, kind=kind, store=store, heads=heads, schema=schema, columns=columns)

    @property
    def identity(self) -> object:
        return files_identity(self._store, self._heads)

    @property
    def files(self) -> Iterator[str]:
        return (join_uri(self._store.uri, head.key) for head in self._heads)

    @property
    def num_bytes(self) -> int:
        return sum(head.num_bytes for head in self._heads)

    @property
    def bytes_read(self) -> int:
        return self._files_done + (self._file.tell() if self._file is not None else 0)

    def batches(self, columns: Sequence[str]) -> Iterator[SourceBatch]:
        self._files_done = 0
        wanted = pa.schema([self.schema.field(name) for name in columns])
        for head in self._heads:
            where = join_uri(self._store.uri, head.key)
            with _verified(self._store, head) as store:
                self._file = StoreFile(store, head)
                row = 1
                try:
                    with _reading(where, self.kind):
                        for table in self._tables(self._file, head.key, wanted):
                            yield SourceBatch(table=table, file=where, first_row=row)
                            row += table.num_rows
                except _BrokenRow as broken:
                    raise _broken_json(
                        store,
                        head,
                        where,
                        fields={field.name: field.type for field in self.schema},
                        strict=self._columns is None,
                        reason=str(broken),
                    ) from broken
            self._files_done += head.num_bytes
            self._file = None

    def _tables(self, file: StoreFile, key: str, wanted: pa.Schema) -> Iterator[pa.Table]:
        if self.kind == "parquet":
            reader = pq.ParquetFile(pa.PythonFile(file, mode="r"))
            found = pa.schema([f for f in storable(reader.schema_arrow) if f.name in wanted.names])
            order = [name for name in wanted.names if name in found.names]
            ordered = pa.schema([found.field(name) for name in order])
            check_same_schema(ordered, wanted, join_uri(self._store.uri, key))
            for batch in reader.iter_batches(_PARQUET_ROWS, columns=wanted.names):
                table = pa.table(batch).select(wanted.names)
                table.validate(full=True)
                yield table.cast(wanted)
        elif self.kind == "csv":
            reader = _csv_reader(file, key, types={f.name: f.type for f in self.schema})
            if reader.schema.names != self.schema.names:
                check_same_schema(reader.schema, self.schema, join_uri(self._store.uri, key))
            for batch in reader:
                yield pa.table(batch).select(wanted.names)
        else:
            strict = self._columns is None and len(wanted) == len(self.schema)
            reader = _json_reader(file, key, schema=wanted, strict=strict)
            for batch in reader:
                table = pa.table(batch)
                table.validate(full=True)
                yield table


class _BrokenRow(Exception):  # noqa: N818 - never leaves this module
    """A row of a JSON Lines file; pyarrow counts them by blocks, so it must be looked for."""


@contextlib.contextmanager
def _verified(store: Store, head: Head) -> Iterator[Store]:
    """A store with this file all of whose bytes are those that S3 holds.

    An object has one checksum, which says nothing of a range: so there a copy on this machine.
    """
    if not is_s3(store.uri):
        yield store
        return
    with tempfile.TemporaryDirectory(prefix="shoal-source-") as folder:
        free = shutil.disk_usage(folder).free
        if free < head.num_bytes:
            raise EnvironmentFault(
                Problem(
                    f"{tempfile.gettempdir()} has {free} bytes free, but "
                    f"{join_uri(store.uri, head.key)} has {head.num_bytes}",
                    "free disk space there, or set TMPDIR to a folder on a larger disk",
                )
            )
        store.download(head.key, Path(folder, head.key))
        yield open_store(folder)


@contextlib.contextmanager
def _reading(where: str, kind: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise _file_error(where, kind, f"it is not UTF-8 ({error})") from error
    except (pa.ArrowException, OSError) as error:
        if kind == "jsonl":
            raise _BrokenRow(str(error)) from error
        raise _file_error(where, kind, str(error)) from error


def _first_schema(kind: str, file: StoreFile, key: str, text: str) -> pa.Schema:
    if kind == "parquet":
        return storable(pq.ParquetFile(pa.PythonFile(file, mode="r")).schema_arrow)
    if kind == "csv":
        return _csv_reader(file, key, types={text: pa.string()}).schema
    found = _json_reader(file, key, schema=None, strict=False).schema
    # JSON has no time stamps: what looks like one is text, and the next row may not look so.
    return pa.schema([(f.name, pa.string() if pt.is_temporal(f.type) else f.type) for f in found])


def _csv_reader(file: StoreFile, key: str, *, types: dict[str, pa.DataType]) -> Any:
    tabs = re.search(r"\.tsv(\.\w+)?$", key.lower()) is not None
    return pyarrow.csv.open_csv(
        _decompressed(file, key),
        # One thread: only then do messages tell the row.
        read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter="\t" if tabs else ",", newlines_in_values=True
        ),
        # An empty field is null, "" is an empty text, and NA is a text.
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=types,
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=False,
        ),
    )


def _json_reader(file: StoreFile, key: str, *, schema: pa.Schema | None, strict: bool) -> Any:
    unexpected = "infer" if schema is None else "error" if strict else "ignore"
    return pyarrow.json.open_json(
        _decompressed(file, key),
        read_options=pyarrow.json.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=pyarrow.json.ParseOptions(
            explicit_schema=schema, unexpected_field_behavior=unexpected
        ),
    )


def _decompressed(file: StoreFile, key: str) -> Any:
    raw = pa.PythonFile(file, mode="r")
    for suffix, codec in COMPRESSION.items():
        if key.lower().endswith(suffix):
            return pa.CompressedInputStream(raw, codec)
    return raw


def _broken_json(
    store: Store,
    head: Head,
    where: str,
    *,
    fields: dict[str, pa.DataType],
    strict: bool,
    reason: str,
) -> DataError:
    """The first row that is no object, or none with these fields, where `fields` has any."""
    row = 0
    with contextlib.closing(_decompressed(StoreFile(store, head), head.key)) as stream:
        for line in _lines(stream):
            if not line.strip():
                continue
            row += 1
            try:
                values = json.loads(line)
            except ValueError as error:
                return _row_error(where, row, str(error), "write one JSON object in each line")
            problem = _misfit(values, fields, strict=strict)
            if problem:
                return _row_error(where, row, *problem)
    return _file_error(where, "jsonl", reason)


def _lines(stream: Any) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(_BLOCK_BYTES):
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    yield rest


def _misfit(values: Any, fields: dict[str, pa.DataType], *, strict: bool) -> tuple[str, str] | None:
    if not isinstance(values, dict):
        return "it is no JSON object", 'write one object such as {"text": ...} in each line'
    for name, value in values.items():
        if name in fields:
            try:
                pa.array([value], type=fields[name])
            except (pa.ArrowException, OverflowError, TypeError, ValueError):
                return (
                    f"{name} is {json.dumps(value)[:60]}, but {fields[name]} in the first rows of "
                    "the first file",
                    f"give {name} one type",
                )
        elif strict:
            return (
                f"the field {name} is not in the first rows of the first file",
                f"choose the fields that are meant: --columns {','.join(fields)}",
            )
    return None


def _row_error(where: str, row: int, reason: str, hint: str) -> DataError:
    return DataError(Problem(f"{where}: row {row}: {reason}", hint))


def _file_error(where: str, kind: str, reason: str) -> DataError:
    reason = reason.removeprefix("CSV parse error: ").removeprefix("JSON parse error: ")
    reason = re.sub(r"\bRow #(\d+)", r"row \1 (the header is row 1)", reason)
    if re.match(r"Empty (CSV|JSON)", reason):
        return DataError(Problem(f"{where} is empty", "name a file that holds rows"))
    hints = {
        "csv": "correct the row; texts with commas, quotes or line ends stand in double quotes",
        "jsonl": "write one JSON object in each line",
        "parquet": "write the file again, or leave it out",
    }
    return DataError(Problem(f"{where} is no whole {kind} file: {reason}", hints[kind]))
