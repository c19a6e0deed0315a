"""Class weights and weighted sampling: whether the training set has the labels that they need, and
how many rows an epoch has. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from jobs.checks.data_sets import DataSetFacts
from jobs.checks.finding import Finding, ok, problems_of
from jobs.errors import ShoalError
from jobs.spec import JobSpec
from trainers.classes import Balance, class_weights, classes_of_codes, refuse_other_column
from trainers.data.index import Index


def check_weighting(spec: JobSpec, train: DataSetFacts) -> Iterator[Finding]:
    """Whether rows can be weighted as the job says, and what each label then counts."""
    given: dict[str, Balance | None] = {
        "task.class_weights": spec.task.class_weights,
        "data.sampling": spec.data.sampling,
    }
    for part, balance in given.items():
        if balance is None:
            continue
        try:
            if part == "data.sampling" or balance == "balanced":
                refuse_other_column(spec.task.label, train.index)
            weights = class_weights(balance, labels=spec.task.labels, index=train.index)
        except ShoalError as error:
            yield from problems_of(part, error)
            continue
        shown = ", ".join(f"{n} {w:.3g}" for n, w in zip(spec.task.labels, weights, strict=True))
        yield ok(part, f"a row counts: {shown}")


def mean_copies(spec: JobSpec, index: Index) -> list[float] | None:
    """How often a row of each value of the label column is used in an epoch, in the mean; None
    where each is, once, or where nothing is known."""
    if spec.data.sampling is None or index.labels is None:
        return None
    labels = spec.task.labels
    weights = class_weights(spec.data.sampling, labels=labels, index=index)
    of_class = dict(zip(labels, weights.tolist(), strict=True))
    return [of_class.get(meant or "", 1.0) for meant in classes_of_codes(labels, index)]


def epoch_rows(spec: JobSpec, index: Index) -> int:
    """Rows of an epoch: with weighted sampling the mean."""
    copies = mean_copies(spec, index)
    if copies is None or index.labels is None:
        return index.num_rows
    counts = index.labels.values()
    return max(1, round(sum(c * n for c, n in zip(copies, counts, strict=True))))


def most_copies(spec: JobSpec, index: Index) -> int:
    """Copies of one row at most."""
    return max(1, *(math.ceil(copies) for copies in mean_copies(spec, index) or [1.0]))
