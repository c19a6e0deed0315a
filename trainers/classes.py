"""Which class a value of the label column means, and how much each class counts. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from jobs.errors import DataError, Problem, SpecError
from trainers.data.index import Index

_INTEGER_TYPES = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))

Balance = Literal["balanced"] | Mapping[str, float]
"""As the job file has it: all classes alike, or a number for some of them and 1 for the others."""


def is_integer_type(kind: str) -> bool:
    """Whether a column of this type, as Arrow writes it, holds whole numbers."""
    return kind.startswith(_INTEGER_TYPES)


def class_of(label: str, *, labels: Sequence[str], are_positions: bool) -> str | None:
    """The class that a value of the label column means; None: none of them."""
    if not are_positions:
        return label if label in labels else None
    return labels[int(label)] if 0 <= int(label) < len(labels) else None


def are_positions(kind: str, labels: Sequence[str]) -> bool:
    """Whether a column of this type holds positions in `labels` rather than the labels.

    Whole numbers are positions, unless a label is a whole number itself.
    """
    has_number = any(label.removeprefix("-").isdigit() for label in labels)
    return is_integer_type(kind) and not has_number


def class_weights(
    balance: Balance, *, labels: Sequence[str], index: Index
) -> npt.NDArray[np.float64]:
    """The number of each class; shape [labels].

    `balanced`: all rows / (classes * rows of the class), as scikit-learn has it; a class without
    rows has 1. Raises DataError where a data set cannot be balanced, as it has no labels.
    """
    if balance != "balanced":
        assert not isinstance(balance, str)
        return np.array([balance.get(label, 1.0) for label in labels])
    rows = dict.fromkeys(labels, 0)
    for meant, count in zip(classes_of_codes(labels, index), _counts(index), strict=True):
        if meant is not None:
            rows[meant] += count
    counts = np.array(list(rows.values()), dtype=np.float64)
    share = counts.sum() / np.count_nonzero(counts)
    weights: npt.NDArray[np.float64] = np.ones_like(counts)
    np.divide(share, counts, out=weights, where=counts > 0)
    return weights


def classes_of_codes(labels: Sequence[str], index: Index) -> list[str | None]:
    """The class that each code of the index's labels means; None for a value that is no class."""
    kinds = {column.name: column.type for column in index.schema}
    positions = are_positions(kinds.get(index.label_column or "", ""), labels)
    values = require_labels(index)
    return [class_of(value, labels=labels, are_positions=positions) for value in values]


def _counts(index: Index) -> list[int]:
    return list(require_labels(index).values())


def require_labels(index: Index) -> Mapping[str, int]:
    """Rows of each value of the label column; DataError where the index knows of none."""
    if index.labels is None:
        raise DataError(
            Problem(
                "task.class_weights or data.sampling is given, but the index of data.train says "
                "nothing of labels",
                "prepare it again with --label naming the column",
            )
        )
    return index.labels


def refuse_other_column(column: str, index: Index) -> None:
    """SpecError where the index counts the labels of another column than the task's."""
    if index.label_column not in (None, column):
        raise SpecError(
            Problem(
                f"task.label is {column}, but the index of data.train counts the labels of "
                f"{index.label_column}, by which rows would be weighted",
                f"prepare it again with --label {column}",
            )
        )
