"""The contract of a task, run on every task, and what is particular to text classification.

A new task adds a `Case` to CASES.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cluster.storage import open_store
from jobs.errors import DataError, SpecError
from jobs.spec import JobSpec
from tests.scene import Scene
from tests.tiny import LABELS, MAX_TOKENS, VOCABULARY, prepare_rows, review_rows, tiny_tokenizer
from trainers.agreement import Decision
from trainers.buffers import KeptBuffers
from trainers.data.cache import NodeCache
from trainers.data.index import open_index
from trainers.data.items import Items, Ragged
from trainers.data.stream import RankBatch, RankStream
from trainers.evaluation import measure
from trainers.loop import Plan, Trainee, train_step
from trainers.microbatch import Cutting, cut_microbatches
from trainers.optim import build_optimizer
from trainers.records import read_attempts
from trainers.stragglers import Stopwatch
from trainers.tasks.task import Batch, Evaluation, Task, build_task

CPU = torch.device("cpu")
ROWS = 11


@dataclass(frozen=True)
class Case:
    """One kind of task: its part of the job, and rows that a model can learn by heart."""

    kind: str
    task: dict[str, Any]
    rows: Callable[[int], list[dict[str, Any]]]
    score: str
    """A metric that is 1 where everything is learned."""


CASES = [
    Case(
        "text-classification",
        {"kind": "text-classification", "labels": list(LABELS), "max_tokens": MAX_TOKENS},
        review_rows,
        "accuracy",
    ),
]


@dataclass(frozen=True)
class Subject:
    """A task over a data set of 11 rows in row groups of 3, as a rank has it."""

    case: Case
    scene: Scene
    spec: JobSpec
    task: Task

    @property
    def rows(self) -> pa.Table:
        """The columns that the task asks for."""
        files = sorted(Path(self.spec.data.train).glob("shard-*.parquet"))
        return pa.concat_tables(pq.read_table(f, columns=list(self.task.columns)) for f in files)

    @property
    def items(self) -> Items:
        return self.task.encode(self.rows, 0)

    def model(self, *, dropout: float | None = 0.0) -> nn.Module:
        return self.task.build_model(self.scene.model, dropout=dropout, seed=0)

    def batches(self, items: Items, *, max_tokens: int = 10_000) -> list[Batch]:
        cuts = cut_microbatches(
            self.task.lengths(items), Cutting(max_tokens=max_tokens, launch_tokens=max_tokens)
        )
        return [self.task.collate(items.take(cut)) for cut in cuts]

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.task.loss(self.task.forward(model, batch), batch)


def subject_of(case: Case, scene: Scene, **keys: Any) -> Subject:
    uri = prepare_rows(str(scene.folder / "rows"), case.rows(ROWS), rows_per_group=3)
    data = {"train": uri, "validation": uri, "test": None}
    spec = scene.job(task=case.task, data=data, **keys)
    index = open_index(open_store(uri))
    return Subject(case, scene, spec, build_task(spec, model_folder=scene.model, index=index))


@pytest.fixture(params=CASES, ids=lambda case: case.kind)
def subject(request: pytest.FixtureRequest, scene: Scene) -> Subject:
    return subject_of(request.param, scene, optimizer={"max_grad_norm": None})


def as_lists(items: Items) -> dict[str, list[Any]]:
    """Each column as one Python value an item."""
    found = {}
    for name, column in items.columns.items():
        if isinstance(column, Ragged):
            found[name] = [column.slice(n, n + 1).values.tolist() for n in range(len(column))]
        else:
            found[name] = np.asarray(column).tolist()
    return found


# ------------------------------------------------------------------------- contract of a task


def test_each_row_is_an_item_with_a_length_and_a_weight(subject: Subject) -> None:
    items = subject.items
    assert len(items) == ROWS
    lengths, weights = subject.task.lengths(items), subject.task.weights(items)
    assert lengths.shape == weights.shape == (ROWS,)
    assert lengths.dtype == np.int64
    assert (lengths > 0).all()
    assert (weights > 0).all()


def test_rows_are_encoded_alike_however_they_are_cut(subject: Subject) -> None:
    rows = subject.rows
    parts = [subject.task.encode(rows.slice(a, 4), a) for a in range(0, ROWS, 4)]
    assert as_lists(Items.concat(parts)) == as_lists(subject.items)


def test_collate_keeps_the_order_and_every_row(subject: Subject) -> None:
    order = np.random.default_rng(0).permutation(ROWS)
    whole = subject.task.collate(subject.items)
    mixed = subject.task.collate(subject.items.take(order))
    assert whole.keys() == mixed.keys()
    for name, tensor in whole.items():
        assert len(tensor) == ROWS
        assert torch.equal(mixed[name], tensor[torch.from_numpy(order)])


def test_no_items_collate_to_an_empty_batch(subject: Subject) -> None:
    none = subject.items.take(np.empty(0, np.int64))
    assert len(subject.task.lengths(none)) == len(subject.task.weights(none)) == 0
    assert all(len(tensor) == 0 for tensor in subject.task.collate(none).values())


def test_the_loss_is_a_finite_sum_over_the_rows(subject: Subject) -> None:
    model = subject.model()
    [whole] = subject.batches(subject.items)
    loss = subject.loss(model, whole)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert subject.task.forward(model, whole).shape[0] == ROWS
    singles = subject.batches(subject.items, max_tokens=1)
    assert len(singles) == ROWS
    torch.testing.assert_close(sum(subject.loss(model, b) for b in singles), loss)


def test_an_empty_batch_weighs_nothing(subject: Subject) -> None:
    model = subject.model()
    loss = subject.loss(model, subject.task.empty_batch())
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in model.parameters())


def test_a_model_learns_eight_rows_by_heart(subject: Subject) -> None:
    eight = subject.items.slice(0, 8)
    model = subject.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    [batch] = subject.batches(eight)
    for _ in range(40):
        optimizer.zero_grad()
        subject.loss(model, batch).backward()
        optimizer.step()
    metrics = subject.task.metrics()
    metrics.update(subject.task.forward(model.eval(), batch), batch)
    assert metrics.compute(metrics.state()).metrics[subject.case.score] == 1.0


def test_a_saved_model_and_its_extras_load_to_the_same(subject: Subject, tmp_path: Path) -> None:
    model = subject.model().eval()
    model.save_pretrained(tmp_path / "saved")
    subject.task.save_extras(tmp_path / "saved")
    index = open_index(open_store(subject.spec.data.train))
    task = build_task(subject.spec, model_folder=tmp_path / "saved", index=index)
    loaded = task.build_model(tmp_path / "saved", dropout=0.0, seed=99).eval()
    items = task.encode(subject.rows, 0)
    assert as_lists(items) == as_lists(subject.items)
    [batch] = subject.batches(items)
    assert torch.equal(task.forward(loaded, batch), subject.task.forward(model, batch))


def test_the_new_head_is_drawn_from_the_seed(subject: Subject) -> None:
    [batch] = subject.batches(subject.items)
    folder = subject.scene.model
    models = [subject.task.build_model(folder, dropout=0.0, seed=seed) for seed in (1, 1, 2)]
    outputs = [subject.task.forward(model, batch) for model in models]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_dropout_of_the_job_is_that_of_the_model(subject: Subject) -> None:
    [batch] = subject.batches(subject.items)
    for dropout, differs in ((0.0, False), (0.5, True)):
        model = subject.model(dropout=dropout).train()
        first, second = (subject.task.forward(model, batch) for _ in range(2))
        assert torch.equal(first, second) is not differs


def evaluation(subject: Subject, model: nn.Module, world_size: int) -> Evaluation:
    """What `world_size` ranks find, one after the other."""
    store = open_store(subject.spec.data.train)
    index = open_index(store)
    states = []
    for rank in range(world_size):
        metrics = subject.task.metrics()
        with RankStream(
            store=store,
            index=index,
            columns=subject.task.columns,
            encode=subject.task.encode,
            rank=rank,
            world_size=world_size,
            seed=0,
            lanes=world_size,
            window=1,
            cache=NodeCache(subject.scene.folder / "rows-cache", limit_bytes=2**20),
        ) as stream:
            measure(
                model, subject.task, stream.sequential(batch_rows=4), metrics,
                device=CPU, dtype=torch.float32, cutting=Cutting(48, 16),
            )  # fmt: skip
        states.append(metrics.state())
    return subject.task.metrics().compute(torch.stack(states).sum(0))


def test_evaluation_over_uneven_ranks_is_that_of_one_process(subject: Subject) -> None:
    model = subject.model().train()
    alone = evaluation(subject, model, 1)
    assert alone.rows == ROWS
    for world_size in (2, 3, 5, ROWS + 2):
        found = evaluation(subject, model, world_size)
        assert found.rows == ROWS
        assert (found.confusion, found.per_class) == (alone.confusion, alone.per_class)
        assert found.metrics == pytest.approx(alone.metrics, rel=1e-6)
    assert model.training, "a model goes on as it was"


def gradients(subject: Subject, model: nn.Module, *, ranks: int, max_tokens: int) -> Any:
    """(loss, mean of the ranks' gradients) of one step on all rows, as DDP makes it."""
    items = subject.items
    shares = [items.take(np.arange(rank, ROWS, ranks)) for rank in range(ranks)]
    cut = [subject.batches(share, max_tokens=max_tokens) for share in shares]
    decision = Decision(
        weight=float(subject.task.weights(items).sum()),
        num_microbatches=max(len(batches) for batches in cut),
        stop=False,
        save=False,
        yields=False,
        failed=False,
    )
    loss, total = 0.0, None
    for rank, (share, batches) in enumerate(zip(shares, cut, strict=True)):
        own = copy.deepcopy(model).train()
        trainee = Trainee(
            subject.task, own, build_optimizer(own, subject.spec.optimizer), CPU, torch.float32
        )
        facts = train_step(
            subject.spec,
            Plan(num_rows=ROWS, global_batch_size=ROWS, epochs=1),
            trainee,
            RankBatch(0, 0, ROWS, np.arange(len(share)), share),
            batches,
            decision,
            computed_tokens=0,
            step=0,
            buffers=KeptBuffers(own),
            agreement=SimpleNamespace(rank=rank, world_size=ranks),
            stopwatch=Stopwatch(own, CPU),
        )
        loss += float(facts.loss_sum)
        found = torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None])
        total = found / ranks if total is None else total + found / ranks
    return loss, total


def test_a_global_batch_has_one_gradient_however_it_is_cut(subject: Subject) -> None:
    model = subject.model(dropout=0.0)
    loss, gradient = gradients(subject, model, ranks=1, max_tokens=10_000)
    assert float(gradient.norm()) > 0
    for ranks, max_tokens in ((1, 40), (1, 1), (2, 10_000), (3, 40), (4, 1), (ROWS + 2, 48)):
        other_loss, other = gradients(subject, model, ranks=ranks, max_tokens=max_tokens)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_predictions_have_one_entry_a_row(subject: Subject) -> None:
    [batch] = subject.batches(subject.items)
    columns = subject.task.predictions(subject.task.forward(subject.model(), batch), batch)
    assert {len(values) for values in columns.values()} == {ROWS}
    assert pa.table(dict(columns)).num_rows == ROWS


# ------------------------------------------------------------------------ text classification


@pytest.fixture
def texts(scene: Scene) -> Subject:
    return subject_of(CASES[0], scene)


@pytest.fixture
def smoothed(scene: Scene) -> Subject:
    case = replace(CASES[0], task=CASES[0].task | {"label_smoothing": 0.3})
    return subject_of(case, scene, optimizer={"max_grad_norm": None})


def test_labels_are_smoothed_in_the_loss_that_is_trained_on(smoothed: Subject) -> None:
    [batch] = smoothed.batches(smoothed.items)
    logits = smoothed.task.forward(smoothed.model(), batch)
    target = 0.7 * nn.functional.one_hot(batch["label"], len(LABELS)) + 0.3 / len(LABELS)
    loss = smoothed.task.loss(logits, batch)
    torch.testing.assert_close(loss, -(target * logits.log_softmax(dim=-1)).sum())
    torch.testing.assert_close(
        loss,
        nn.functional.cross_entropy(logits, batch["label"], reduction="sum", label_smoothing=0.3),
    )
    # What is measured is comparable with jobs that smooth otherwise.
    metrics = smoothed.task.metrics()
    metrics.update(logits, batch)
    plain = nn.functional.cross_entropy(logits, batch["label"]).item()
    assert metrics.compute(metrics.state()).metrics["loss"] == pytest.approx(plain, rel=1e-6)


def test_classes_weigh_in_the_loss_that_is_trained_on(scene: Scene) -> None:
    case = replace(CASES[0], task=CASES[0].task | {"class_weights": {LABELS[1]: 3.0}})
    weighted = subject_of(case, scene)
    [batch] = weighted.batches(weighted.items)
    logits = weighted.task.forward(weighted.model(), batch)
    theirs = torch.ones(len(LABELS))
    theirs[1] = 3.0
    mean = weighted.task.loss(logits, batch) / float(weighted.task.weights(weighted.items).sum())
    torch.testing.assert_close(
        mean, nn.functional.cross_entropy(logits, batch["label"], weight=theirs)
    )
    metrics = weighted.task.metrics()
    metrics.update(logits, batch)
    plain = nn.functional.cross_entropy(logits, batch["label"]).item()
    assert metrics.compute(metrics.state()).metrics["loss"] == pytest.approx(plain, rel=1e-6)


def test_without_smoothing_the_loss_has_the_bits_of_the_plain_one(texts: Subject) -> None:
    [batch] = texts.batches(texts.items)
    batch["weight"][3] = 0.0
    logits = texts.task.forward(texts.model(), batch)
    losses = nn.functional.cross_entropy(logits, batch["label"], reduction="none")
    assert torch.equal(texts.task.loss(logits, batch), (losses * batch["weight"]).sum())


def test_smoothed_labels_have_one_gradient_however_rows_are_cut_or_packed(
    smoothed: Subject,
) -> None:
    model = smoothed.model()
    loss, gradient = gradients(smoothed, model, ranks=1, max_tokens=10_000)
    for ranks, max_tokens in ((1, 40), (1, 1), (3, 40), (ROWS + 2, 48)):
        other_loss, other = gradients(smoothed, model, ranks=ranks, max_tokens=max_tokens)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)
    index = open_index(open_store(smoothed.spec.data.train))
    batching = smoothed.spec.batching.model_copy(update={"packing": True})
    spec = smoothed.spec.model_copy(update={"batching": batching})
    task = build_task(spec, model_folder=smoothed.scene.model, index=index)
    packed = replace(smoothed, spec=spec, task=task)
    packed_loss, other = gradients(packed, packed.model(), ranks=1, max_tokens=10_000)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def classes(subject: Subject, labels: Sequence[str], column: pa.Array) -> list[int]:
    """Class numbers that the column's values mean to a task with these labels."""
    spec = subject.scene.job(task={"labels": list(labels)}, data={"train": subject.spec.data.train})
    index = open_index(open_store(spec.data.train))
    task = build_task(spec, model_folder=subject.scene.model, index=index)
    rows = pa.table({"text": ["word1"] * len(column), "label": column})
    return as_lists(task.encode(rows, 100))["label"]


@pytest.mark.parametrize(
    ("labels", "column", "expected"),
    [
        (("no", "yes"), pa.array(["yes", "no"]), [1, 0]),
        (("no", "yes"), pa.array(["yes", "no"]).dictionary_encode(), [1, 0]),
        (("no", "yes"), pa.array([1, 0]), [1, 0]),
        (("no", "yes"), pa.array([1, 0], pa.uint8()), [1, 0]),
        (("1", "0"), pa.array([1, 0]), [0, 1]),
        (("2", "3", "4"), pa.array([2, 4]), [0, 2]),
        (("-1", "5"), pa.array([-1, 5]), [0, 1]),
        (("2", "3", "4"), pa.array(["2", "4"]), [0, 2]),
        (("false", "true"), pa.array([True, False]), [1, 0]),
    ],
)
def test_a_label_is_its_name_or_its_position(
    texts: Subject, labels: Sequence[str], column: pa.Array, expected: list[int]
) -> None:
    assert classes(texts, labels, column) == expected


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        (pa.array(["no", "perhaps"]), "'perhaps'"),
        (pa.array(["no", None]), "None"),
        (pa.array([0, 2]), "2"),
        (pa.array([0, -1]), "-1"),
        (pa.array([0, None]), "None"),
    ],
)
def test_a_label_that_means_no_class_names_its_row(
    texts: Subject, column: pa.Array, shown: str
) -> None:
    with pytest.raises(DataError) as raised:
        classes(texts, ("no", "yes"), column)
    assert str(raised.value) == (
        f"row 101: the label column label holds {shown}, which is none of no, yes"
    )


def test_texts_are_cut_at_max_tokens_and_may_be_empty(texts: Subject) -> None:
    rows = pa.table({"text": ["word1 " * 99, "", "word2"], "label": ["negative"] * 3})
    items = texts.task.encode(rows, 0)
    assert texts.task.lengths(items).tolist() == [MAX_TOKENS, 2, 3]
    batch = texts.task.collate(items)
    assert batch["input_ids"].shape == (3, MAX_TOKENS)
    assert batch["attention_mask"].sum(1).tolist() == [MAX_TOKENS, 2, 3]
    assert (batch["input_ids"][1, 2:] == 0).all()


def test_tokens_of_the_data_set_are_those_of_its_texts(texts: Subject, scene: Scene) -> None:
    uri = prepare_rows(
        str(scene.folder / "tokens"), review_rows(ROWS), rows_per_group=3,
        tokenizer=str(scene.model), max_tokens=MAX_TOKENS,
    )  # fmt: skip
    tokenized = Subject(CASES[0], scene, scene.job(data={"train": uri}), texts.task)
    task = build_task(tokenized.spec, model_folder=scene.model, index=open_index(open_store(uri)))
    own = Subject(CASES[0], scene, tokenized.spec, task)
    assert "text" not in task.columns
    assert as_lists(own.items) == as_lists(texts.items)
    with pytest.raises(DataError, match=f"cut at {MAX_TOKENS} tokens, but task.max_tokens is 16"):
        build_task(
            scene.job(task={"max_tokens": 16}, data={"train": uri}),
            model_folder=scene.model,
            index=open_index(open_store(uri)),
        )
    other = tiny_tokenizer(scene.folder / "other", words=VOCABULARY[::-1])
    with pytest.raises(DataError, match="the model's tokenizer is another one"):
        build_task(tokenized.spec, model_folder=other, index=open_index(open_store(uri)))


def test_a_run_on_tokens_goes_on_from_its_checkpoint(scene: Scene) -> None:
    uri = prepare_rows(
        str(scene.folder / "tokens"), review_rows(ROWS), rows_per_group=3,
        tokenizer=str(scene.model), max_tokens=MAX_TOKENS,
    )  # fmt: skip
    data = {"train": uri, "validation": uri, "test": None}
    assert scene.train(scene.job(data=data, train={"epochs": 1})).state == "SUCCEEDED"
    again = scene.train(scene.job(data=data, train={"epochs": 2}), generation=2)
    assert (again.state, again.step) == ("SUCCEEDED", 4)
    assert read_attempts(scene.runs, scene.paths())[-1].restored_step == 2


def test_a_held_out_set_that_is_stored_otherwise_is_refused(scene: Scene) -> None:
    uri = prepare_rows(
        str(scene.folder / "tokens"), review_rows(ROWS), rows_per_group=3,
        tokenizer=str(scene.model), max_tokens=MAX_TOKENS,
    )  # fmt: skip
    outcome = scene.train(scene.job(data={"validation": uri}))
    assert outcome.state == "FAILED_USER"
    assert outcome.failure is not None
    assert "a data set of the job holds tokens" in outcome.failure.problems[0][0]


def test_more_tokens_than_the_model_reads_are_refused(scene: Scene) -> None:
    spec = scene.job(task={"max_tokens": 65})
    with pytest.raises(SpecError, match="max_tokens is 65, but this model reads at most 64"):
        scene.trainee(spec)


def test_a_tokenizer_without_padding_is_refused(scene: Scene) -> None:
    folder = tiny_tokenizer(scene.folder / "unpadded")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    index = open_index(open_store(scene.data["train"]))
    with pytest.raises(SpecError, match="no padding token"):
        build_task(scene.job(), model_folder=folder, index=index)


def test_a_checkpoint_with_another_head_is_refused(scene: Scene) -> None:
    folder = scene.folder / "three"
    three = AutoModelForSequenceClassification.from_pretrained(scene.model, num_labels=3)
    three.save_pretrained(folder)
    AutoTokenizer.from_pretrained(scene.model).save_pretrained(folder)
    with pytest.raises(SpecError, match="holds no model for text-classification"):
        scene.trainee(scene.job()).task.build_model(folder, dropout=None, seed=0)
