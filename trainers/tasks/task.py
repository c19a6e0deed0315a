"""What the loop asks of a task: rows in, a loss and metrics out.

A task knows its columns, its model, its loss and its metrics. It knows nothing about Ray, storage
or Kubernetes, and one file holds all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import transformers
from torch import nn

from jobs.errors import SpecError
from jobs.spec import JobSpec

if TYPE_CHECKING:
    from trainers.data.index import Index
    from trainers.data.items import Items
    from trainers.data.partition import ItemKeys

Batch = dict[str, torch.Tensor]
"""Collated rows on one device. The first dimension of a tensor is the row, but for those that pack
the rows (`trainers.packing`)."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found out, over all rows of the set and all ranks."""

    metrics: dict[str, float]
    """By name without the set: loss, accuracy, f1..."""
    rows: int
    per_class: list[dict[str, Any]] = field(default_factory=list)
    """label, precision, recall, f1 and support of each class."""
    confusion: list[list[int]] = field(default_factory=list)
    """Rows are true classes, columns predicted ones."""

    def to_json(self) -> dict[str, Any]:
        return {
            "metrics": self.metrics,
            "rows": self.rows,
            "per_class": self.per_class,
            "confusion": self.confusion,
        }


class Metrics(Protocol):
    """Mergeable state: update per batch, add over ranks, compute once."""

    def update(self, output: torch.Tensor, batch: Batch) -> None:
        """Counts one batch; `output` is what the task's `forward` gave."""
        ...

    def state(self) -> torch.Tensor:
        """The state as one float64 CPU vector; the group's state is the sum over ranks."""
        ...

    def compute(self, state: torch.Tensor) -> Evaluation:
        """The evaluation from a (summed) state."""
        ...


class Task(Protocol):
    """One kind of fine-tuning. Implementations are listed in `build_task`."""

    columns: tuple[str, ...]
    """Columns of the data set that are read."""

    def with_loss_of(self, spec: JobSpec) -> Task:
        """This task for a job whose `task` may differ in keys that the training loss alone depends
        on."""
        ...

    def augment(self, items: Items, keys: ItemKeys) -> Items:
        """The items as they are trained on, of which each may be changed at random: a function of
        its own key alone. Evaluations have them as they are."""
        ...

    def check_data(self, index: Index) -> None:
        """Raises DataError where a further data set of the job is not stored as the first is."""
        ...

    def build_model(self, folder: Path, *, dropout: float | None, seed: int) -> nn.Module:
        """The pretrained model in `folder` with this task's head, float32, on the CPU.

        New weights of the head are drawn from `seed`, and told to `adapters.remember_new`. Raises
        SpecError where the folder does not hold such a model.
        """
        ...

    def encode(self, rows: pa.Table, first_row: int) -> Items:
        """Items, one for each row; raises DataError that names the first wrong row."""
        ...

    def lengths(self, items: Items) -> npt.NDArray[np.int64]:
        """Cost of each item in tokens; shape [n]."""
        ...

    def weights(self, items: Items) -> npt.NDArray[np.float64]:
        """Weight of each item in the loss; shape [n]."""
        ...

    def collate(self, items: Items) -> Batch:
        """The items as CPU tensors, padded to the longest."""
        ...

    def empty_batch(self, *, rows: int = 1, tokens: int = 2) -> Batch:
        """A batch whose rows weigh nothing, of `tokens` each where rows differ in length: the
        smallest for a rank that has no rows left, larger ones to measure with."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The model's output for a batch."""
        ...

    def loss(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum over the batch's items of weight times the loss that is trained on; a scalar."""
        ...

    def metrics(self) -> Metrics:
        """A fresh, empty state."""
        ...

    def predictions(self, output: torch.Tensor, batch: Batch) -> Mapping[str, Any]:
        """Columns of row predictions: name -> list or array of the batch's length."""
        ...

    def save_extras(self, folder: Path) -> None:
        """Writes what `from_pretrained` needs besides the weights, such as the tokenizer."""
        ...


def build_task(spec: JobSpec, *, model_folder: Path, index: Index) -> Task:
    """The task that the job names, ready for a data set and a model's tokenizer."""
    # The run has its own progress and its own account of what is new in the head.
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if spec.task.kind == "text-classification":
        from trainers.tasks.text_classification import TextClassification

        task = TextClassification(
            spec.task, model_folder=model_folder, index=index, packing=spec.batching.packing
        )
        return task.with_loss_of(spec)
    raise SpecError(f"task.kind is {spec.task.kind}, which no task here carries out")
