"""Weighted sampling: how often rows are used, in one order for all numbers of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.storage import open_store
from jobs.errors import DataError, SpecError
from tests.tiny import prepare_rows
from trainers.classes import class_weights
from trainers.data.cache import NodeCache
from trainers.data.index import Index, open_index
from trainers.data.items import Items
from trainers.data.partition import row_words
from trainers.data.stream import RankStream
from trainers.data.weighting import Copies

ROWS = 90
RARE = [row for row in range(ROWS) if row % 9 == 0]
LANES, WINDOW, BATCH = 6, 2, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 rows in row groups of 7, of which each ninth is spam."""
    place = tmp_path_factory.mktemp("weighting")
    rows = [
        {"text": f"text {row}", "label": "spam" if row in RARE else "ham", "row": row}
        for row in range(ROWS)
    ]
    prepare_rows(str(place / "data"), rows, rows_per_group=7)
    return place


@pytest.fixture(scope="module")
def index(folder: Path) -> Index:
    return open_index(open_store(folder / "data"))


def copies_of(folder: Path, index: Index, *, spam: float, ham: float, seed: int = 3) -> Copies:
    codes = {"spam": spam, "ham": ham}
    means = np.array([codes[label] for label in index.labels or ()])
    return Copies(open_store(folder / "data"), index, mean_copies=means, seed=seed)


def encode(rows: pa.Table, first_row: int) -> Items:
    numbers = rows.column("row").to_numpy()
    assert numbers.tolist() == list(range(first_row, first_row + len(numbers)))
    return Items({"number": numbers})


def batches(
    folder: Path, index: Index, copies: Copies, *, world_size: int, next_item: int = 0
) -> Iterator[list[int]]:
    """The rows of each global batch of the first epoch, in the order of their positions."""
    cache = NodeCache(folder / "cache", limit_bytes=2**20)
    streams = [
        RankStream(
            store=open_store(folder / "data"),
            index=index,
            columns=["row"],
            encode=encode,
            rank=rank,
            world_size=world_size,
            seed=3,
            lanes=LANES,
            window=WINDOW,
            cache=cache,
            copies=copies,
        )
        for rank in range(world_size)
    ]
    begun = [s.batches(epoch=0, next_item=next_item, global_batch_size=BATCH) for s in streams]
    for parts in zip(*begun, strict=True):
        size = parts[0].next_item - parts[0].first_item
        rows = [0] * size
        for part in parts:
            assert part.items.columns["number"].tolist() == part.rows.tolist()
        offset = parts[0].first_item
        for rank, part in enumerate(parts):
            first = (rank - offset) % world_size
            rows[first::world_size] = part.rows.tolist()
        yield rows
    for stream in streams:
        stream.close()


def test_rows_are_used_as_often_as_was_drawn_whatever_the_number_of_ranks(
    folder: Path, index: Index
) -> None:
    copies = copies_of(folder, index, spam=3.5, ham=0.4)
    one = list(batches(folder, index, copies, world_size=1))
    used = Counter(row for batch in one for row in batch)
    assert sum(used.values()) == copies.num_items(0)
    assert all(used[row] in (3, 4) for row in RARE)
    assert all(used[row] in (0, 1) for row in range(ROWS) if row not in RARE)
    assert 0 < sum(used[row] for row in range(ROWS) if row not in RARE) < 80
    drawn = Counter(
        {
            index.first_row(group) + int(row): int(count)
            for group in range(index.num_groups)
            for row, count in zip(
                *np.unique(copies.rows_of(0, group), return_counts=True), strict=True
            )
        }
    )
    assert used == drawn
    for world_size in (2, 3, 4):
        assert list(batches(folder, index, copies, world_size=world_size)) == one


@pytest.mark.parametrize("world_size", [1, 4])
def test_an_epoch_goes_on_from_any_position(folder: Path, index: Index, world_size: int) -> None:
    copies = copies_of(folder, index, spam=2.5, ham=1.0)
    whole = [row for batch in batches(folder, index, copies, world_size=1) for row in batch]
    later = copies_of(folder, index, spam=2.5, ham=1.0)
    rest = batches(folder, index, later, world_size=world_size, next_item=32)
    assert [row for batch in rest for row in batch] == whole[32:]


def test_other_epochs_and_seeds_use_other_rows(folder: Path, index: Index) -> None:
    def drawn(epoch: int, seed: int) -> list[list[int]]:
        copies = copies_of(folder, index, spam=0.5, ham=0.5, seed=seed)
        return [copies.rows_of(epoch, group).tolist() for group in range(index.num_groups)]

    assert drawn(0, 3) == drawn(0, 3)
    assert drawn(0, 3) != drawn(1, 3)
    assert drawn(0, 3) != drawn(0, 4)


def test_rows_that_are_all_used_once_have_their_usual_order(folder: Path, index: Index) -> None:
    copies = copies_of(folder, index, spam=1.0, ham=1.0)
    assert copies.group_items(5).tolist() == index.group_rows.tolist()
    assert copies.most == 1


def test_the_word_of_a_row_is_the_same_whichever_rows_are_asked_for() -> None:
    whole = row_words(seed=1, epoch=2, first_row=0, count=50)
    assert len(set(whole.tolist())) == 50
    for first in (0, 1, 3, 4, 7, 30):
        part = row_words(seed=1, epoch=2, first_row=first, count=11)
        assert part.tolist() == whole[first : first + 11].tolist()


def test_a_digest_tells_weights_apart(folder: Path, index: Index) -> None:
    one, same, other = (copies_of(folder, index, spam=w, ham=1.0).digest for w in (2, 2, 3))
    assert one == same != other


def test_balanced_classes_weigh_alike(index: Index) -> None:
    weights = class_weights("balanced", labels=("spam", "ham"), index=index)
    assert weights.tolist() == [ROWS / (2 * len(RARE)), ROWS / (2 * (ROWS - len(RARE)))]
    given = class_weights({"spam": 4.0}, labels=("spam", "ham"), index=index)
    assert given.tolist() == [4.0, 1.0]


def test_a_set_without_labels_cannot_be_balanced(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"text {row}"} for row in range(5)]
    prepare_rows(str(tmp_path / "data"), rows, rows_per_group=7)
    index = open_index(open_store(tmp_path / "data"))
    with pytest.raises(DataError, match="says nothing of labels"):
        class_weights("balanced", labels=("spam", "ham"), index=index)


def test_labels_of_another_column_do_not_count(index: Index) -> None:
    from trainers.classes import refuse_other_column

    refuse_other_column("label", index)
    with pytest.raises(SpecError, match="counts the labels of label"):
        refuse_other_column("topic", index)
