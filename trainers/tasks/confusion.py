"""Metrics of classification from one mergeable state: the confusion matrix and the loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trainers.tasks.task import Evaluation


class ConfusionMetrics:
    """Counts [true, predicted] and the summed loss.

    The state is a float64 vector of C * C + 2 numbers: counts, loss sum, loss weight. Counts below
    2**53 add up exactly, so that every split of the rows over ranks gives the same scores.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        num_labels = len(self._labels)
        self._counts = torch.zeros(num_labels * num_labels, dtype=torch.int64)
        self._loss = torch.zeros(2, dtype=torch.float64)

    def update(
        self,
        *,
        true: torch.Tensor,
        predicted: torch.Tensor,
        loss_sum: torch.Tensor,
        weight_sum: float,
    ) -> None:
        """Counts one batch; `true` and `predicted` are class numbers of shape [n]."""
        cells = true.cpu() * len(self._labels) + predicted.cpu()
        self._counts += torch.bincount(cells, minlength=len(self._counts))
        self._loss[0] += loss_sum.detach().double().cpu()
        self._loss[1] += weight_sum

    def state(self) -> torch.Tensor:
        return torch.cat([self._counts.double(), self._loss])

    def compute(self, state: torch.Tensor) -> Evaluation:
        """Accuracy, macro means and per-class scores as scikit-learn defines them.

        A class that is never predicted, or has no rows, scores 0 (`zero_division=0`) and counts in
        the macro means.
        """
        # Takes a second to load, for which the first step of every attempt would wait.
        from sklearn.metrics import precision_recall_fscore_support

        num_labels = len(self._labels)
        counts = state[:-2].round().long().numpy().reshape(num_labels, num_labels)
        loss_sum, weight_sum = (float(v) for v in state[-2:])
        true, predicted = np.indices(counts.shape)
        precision, recall, f1, support = precision_recall_fscore_support(
            true.ravel(),
            predicted.ravel(),
            sample_weight=counts.ravel(),
            labels=np.arange(num_labels),
            zero_division=0,
        )
        total = int(counts.sum())
        return Evaluation(
            metrics={
                "loss": loss_sum / weight_sum if weight_sum else float("nan"),
                "accuracy": float(np.trace(counts)) / total if total else float("nan"),
                "f1": float(f1.mean()),
                "precision": float(precision.mean()),
                "recall": float(recall.mean()),
            },
            rows=total,
            per_class=[
                {
                    "label": label,
                    "precision": float(precision[c]),
                    "recall": float(recall[c]),
                    "f1": float(f1[c]),
                    "support": int(support[c]),
                }
                for c, label in enumerate(self._labels)
            ],
            confusion=counts.tolist(),
        )
