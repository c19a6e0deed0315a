"""Columns as Arrow types and values: what a data set can hold, sizes of rows, labels, nulls."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from jobs.errors import DataError, Problem

IntArray = npt.NDArray[np.int64]
LabelValue = str | int | bool


def column_facts(schema: pa.Schema) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Name, type and leaf columns of each column; DataError for a type without support."""
    facts = []
    first = 0
    for field in schema:
        paths = leaf_paths(field)
        if paths is None:
            others = [name for name in schema.names if name != field.name]
            raise DataError(
                Problem(
                    f"column {field.name} has the type {field.type}, which a data set cannot hold",
                    f"leave it out: --columns {','.join(others)}" if others else None,
                )
            )
        facts.append((field.name, str(field.type), tuple(range(first, first + len(paths)))))
        first += len(paths)
    return tuple(facts)


def storable(schema: pa.Schema) -> pa.Schema:
    """The schema without metadata, dictionaries and views: what shards are written with."""
    views = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    return pa.schema(
        pa.field(
            field.name,
            field.type.value_type
            if pt.is_dictionary(field.type)
            else views.get(field.type, field.type),
        )
        for field in schema
    )


def leaf_paths(field: pa.Field) -> list[str] | None:
    """Paths of a column's Parquet leaf columns, in order; None for a type without support."""
    return _type_paths(field.type, field.name)


def _type_paths(kind: pa.DataType, path: str) -> list[str] | None:
    if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
        return _type_paths(kind.value_type, f"{path}.list.element")
    if pt.is_map(kind):
        entry = f"{path}.key_value"
        key, item = (
            _type_paths(kind.key_type, f"{entry}.key"),
            _type_paths(kind.item_type, f"{entry}.value"),
        )
        return key + item if key and item else None
    if pt.is_struct(kind) and kind.num_fields:
        parts = [
            _type_paths(kind.field(i).type, f"{path}.{kind.field(i).name}")
            for i in range(kind.num_fields)
        ]
        return None if None in parts else [p for part in parts if part for p in part]
    if pt.is_dictionary(kind):
        return _type_paths(kind.value_type, path)
    plain = (
        pt.is_primitive(kind)
        or pt.is_string(kind)
        or pt.is_large_string(kind)
        or pt.is_binary(kind)
        or pt.is_large_binary(kind)
        or pt.is_fixed_size_binary(kind)
        or pt.is_decimal(kind)
        or pt.is_null(kind)
    )
    return [path] if plain and not pt.is_interval(kind) else None


def check_same_schema(found: pa.Schema, expected: pa.Schema, where: str) -> None:
    """DataError that names the first column in which a file differs from the first file."""
    if found.equals(expected):
        return
    for name in [*expected.names, *found.names]:
        here = found.field(name).type if name in found.names else None
        there = expected.field(name).type if name in expected.names else None
        if here != there:
            raise DataError(
                Problem(
                    f"{where}: column {name} is {here or 'absent'}, but {there or 'absent'} in "
                    "the first file",
                    "prepare files of one schema, or choose columns that agree with --columns",
                )
            )
    if found.names != expected.names:
        raise DataError(
            Problem(
                f"{where}: the columns stand in another order than in the first file",
                "write the set anew: shoal prepare SOURCE --to URI",
            )
        )


def row_bytes(table: pa.Table) -> IntArray:
    """Memory of each row as Arrow, validity apart; shape [n]."""
    total = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        start = 0
        for chunk in column.chunks:
            total[start : start + len(chunk)] += _array_bytes(chunk)
            start += len(chunk)
    return total


def _array_bytes(array: pa.Array) -> IntArray:
    kind = array.type
    if pt.is_null(kind):
        return np.zeros(len(array), np.int64)
    if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_map(kind):
        offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        first, last = int(offsets[0]), int(offsets[-1])
        sums = np.zeros(last - first + 1, np.int64)
        parts = (array.keys, array.items) if pt.is_map(kind) else (array.values,)
        inner = sum(_array_bytes(part.slice(first, last - first)) for part in parts)
        np.cumsum(inner, out=sums[1:])
        sizes_of_lists: IntArray = sums[offsets[1:] - first] - sums[offsets[:-1] - first] + 4
        return sizes_of_lists
    if pt.is_fixed_size_list(kind):
        size = kind.list_size
        values = array.values.slice(array.offset * size, len(array) * size)
        sums_of_lists: IntArray = _array_bytes(values).reshape(len(array), size).sum(axis=1)
        return sums_of_lists
    if pt.is_struct(kind):
        return sum(
            (_array_bytes(array.field(i)) for i in range(kind.num_fields)),
            np.zeros(len(array), np.int64),
        )
    if (
        pt.is_string(kind)
        or pt.is_large_string(kind)
        or pt.is_binary(kind)
        or pt.is_large_binary(kind)
    ):
        lengths = pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False)
        sizes: IntArray = lengths.astype(np.int64) + 4
        return sizes
    return np.full(len(array), max(1, kind.bit_width // 8), np.int64)


def is_text_type(kind: pa.DataType) -> bool:
    return bool(pt.is_string(kind) or pt.is_large_string(kind))


def is_label_type(kind: pa.DataType) -> bool:
    """Whether values of the type can be labels: text, whole numbers, booleans, or all null."""
    if pt.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pt.is_string(kind)
        or pt.is_large_string(kind)
        or pt.is_integer(kind)
        or pt.is_boolean(kind)
        or pt.is_null(kind)
    )


def label_codes(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int32], list[LabelValue]]:
    """Code of each row, -1 for null, and the values that the codes stand for."""
    if pt.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pt.is_null(column.type):
        return np.full(len(column), -1, np.int32), []
    encoded = column.combine_chunks().dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    return codes, encoded.dictionary.to_pylist()


def first_null(column: pa.ChunkedArray) -> int:
    """Number of the first null row, from 0; the column has one."""
    return int(pc.index(column.is_null(), True).as_py())
