"""Metrics of classification: those of scikit-learn on the rows, however the rows are split."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from trainers.tasks.confusion import ConfusionMetrics
from trainers.tasks.task import Evaluation

LABELS = ("low", "middle", "high")


def state(true: np.ndarray, predicted: np.ndarray, losses: np.ndarray) -> torch.Tensor:
    metrics = ConfusionMetrics(LABELS)
    metrics.update(
        true=torch.from_numpy(true),
        predicted=torch.from_numpy(predicted),
        loss_sum=torch.tensor(losses.sum()),
        weight_sum=float(len(losses)),
    )
    return metrics.state()


def rows(count: int, *, classes: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    true, predicted = rng.integers(0, classes, (2, count))
    return true, predicted, rng.random(count)


def compute(total: torch.Tensor) -> Evaluation:
    return ConfusionMetrics(LABELS).compute(total)


@pytest.mark.parametrize(("count", "classes"), [(200, 3), (7, 3), (40, 2), (1, 3), (5, 1)])
def test_scores_are_those_of_scikit_learn_on_the_rows(count: int, classes: int) -> None:
    true, predicted, losses = rows(count, classes=classes)
    found = compute(state(true, predicted, losses))
    precision, recall, f1, support = precision_recall_fscore_support(
        true, predicted, labels=[0, 1, 2], zero_division=0
    )
    assert found.rows == count
    assert found.metrics == pytest.approx(
        {
            "loss": losses.mean(),
            "accuracy": accuracy_score(true, predicted),
            "f1": f1.mean(),
            "precision": precision.mean(),
            "recall": recall.mean(),
        }
    )
    assert found.confusion == confusion_matrix(true, predicted, labels=[0, 1, 2]).tolist()
    assert [c["label"] for c in found.per_class] == list(LABELS)
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert [c[name] for c in found.per_class] == pytest.approx(values.tolist())
    assert [c["support"] for c in found.per_class] == support.tolist()


@given(st.lists(st.integers(0, 50), max_size=4))
def test_any_split_of_the_rows_gives_the_same_scores(cuts: list[int]) -> None:
    true, predicted, losses = rows(50)
    bounds = [0, *sorted(cuts), 50]
    parts = [state(true[a:b], predicted[a:b], losses[a:b]) for a, b in pairwise(bounds)]
    split, whole = compute(torch.stack(parts).sum(0)), compute(state(true, predicted, losses))
    assert split.confusion == whole.confusion
    assert split.per_class == whole.per_class
    assert split.metrics == pytest.approx(whole.metrics, rel=1e-12)


def test_a_class_that_is_never_predicted_counts_as_zero_in_the_means() -> None:
    two = np.array([0, 1])
    found = compute(state(two, np.array([0, 0]), np.ones(2)))
    assert [c["f1"] for c in found.per_class] == pytest.approx([2 / 3, 0.0, 0.0])
    assert found.metrics["f1"] == pytest.approx(2 / 9)
    assert found.per_class[2]["support"] == 0


def test_a_state_of_many_rows_is_exact() -> None:
    huge = torch.zeros(11, dtype=torch.float64)
    huge[0], huge[4] = 2.0**52 + 1, 1.0
    assert compute(huge).confusion[0][0] == 2**52 + 1
