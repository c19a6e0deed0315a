"""What a process keeps between trials: used again while it is what would be made anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from cluster.storage import open_store
from jobs.errors import DataError, SpecError
from tests.scene import Scene
from tests.tiny import prepare_rows, review_rows, tiny_tokenizer
from trainers.kept import Kept


def test_an_index_is_read_again_once_it_is_another(scene: Scene) -> None:
    kept, uri = Kept(), str(scene.folder / "set")
    with pytest.raises(DataError, match="has no index"):
        kept.index(open_store(uri))
    prepare_rows(uri, review_rows(8), rows_per_group=4)
    first = kept.index(open_store(uri))
    assert kept.index(open_store(uri)) is first
    shutil.rmtree(uri)
    prepare_rows(uri, review_rows(12), rows_per_group=4)
    assert kept.index(open_store(uri)).num_rows == 12


def test_a_task_is_another_where_labels_data_or_tokenizer_are(scene: Scene) -> None:
    kept, spec = Kept(), scene.job()
    index = kept.index(open_store(scene.data["train"]))
    first = kept.task(spec, model_folder=scene.model, index=index)
    same = scene.job(model={"dropout": 0.5}, optimizer={"learning_rate": 1.0})
    assert kept.task(same, model_folder=scene.model, index=index) is first
    other_labels = scene.job(task={"labels": ["positive", "negative"]})
    assert kept.task(other_labels, model_folder=scene.model, index=index) is not first
    changed = Path(shutil.copytree(scene.model, scene.folder / "changed"))
    first = kept.task(spec, model_folder=scene.model, index=index)
    assert kept.task(spec, model_folder=changed, index=index) is first, "only its place is another"
    tiny_tokenizer(changed, words=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"))
    assert kept.task(spec, model_folder=changed, index=index) is not first


def test_a_task_with_another_loss_has_the_same_tokenizer(scene: Scene) -> None:
    kept = Kept()
    index = kept.index(open_store(scene.data["train"]))
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    batch = {"label": torch.tensor([0, 1]), "weight": torch.ones(2)}
    tasks = []
    for smoothing in (0.0, 0.1, 0.2, 0.3, 0.1):  # more than are kept
        spec = scene.job(task={"label_smoothing": smoothing})
        task = kept.task(spec, model_folder=scene.model, index=index)
        loss = cross_entropy(logits, batch["label"], reduction="sum", label_smoothing=smoothing)
        torch.testing.assert_close(task.loss(logits, batch), loss)
        tasks.append(task)
    assert len({id(task._tokenizer) for task in tasks}) == 1  # type: ignore[attr-defined]


def test_the_tokenizers_of_all_checkpoints_are_one(scene: Scene) -> None:
    """Their configurations differ by the dropout of their trials."""
    kept = Kept()
    index = kept.index(open_store(scene.data["train"]))
    tasks = []
    for run_id, dropout in (("a", 0.1), ("b", 0.3)):
        spec = scene.job(model={"dropout": dropout})
        scene.train(spec, run_id)
        [folder] = (scene.run_folder(run_id) / "checkpoints").glob("step-00000010-*")
        tasks.append(kept.task(spec, model_folder=folder / "model", index=index))
    assert tasks[0] is tasks[1]


def test_a_model_that_was_removed_is_looked_for_again(scene: Scene) -> None:
    kept = Kept()
    model = Path(shutil.copytree(scene.model, scene.folder / "model"))
    spec = scene.job().model_copy(
        update={"model": scene.job().model.model_copy(update={"source": str(model)})}
    )
    assert kept.folder(spec, cache_folder=scene.folder) == model
    moved = model.rename(scene.folder / "moved")
    with pytest.raises(SpecError, match="no such folder"):
        kept.folder(spec, cache_folder=scene.folder)
    moved.rename(model)
    assert kept.folder(spec, cache_folder=scene.folder) == model


def test_stores_are_told_apart_by_place_access_and_transfer(scene: Scene) -> None:
    kept, spec = Kept(), scene.job()
    first = kept.store("s3://bucket/a", spec.store.access)
    assert kept.store("s3://bucket/a", spec.store.access) is first
    other = spec.store.access.model_copy(update={"region": "eu-central-1"})
    assert kept.store("s3://bucket/a", other) is not first
    assert kept.store("s3://bucket/b", spec.store.access) is not first
