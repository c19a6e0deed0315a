"""Layouts of cut checkpoints: any rows are found, whatever number of ranks has written them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import StorageError
from jobs.errors import EnvironmentFault
from trainers.layout import (
    WEIGHTS,
    Cut,
    CutTensor,
    Layout,
    Piece,
    cut_layout,
    parse_layout,
    rows_of,
    shard_name,
)
from trainers.tensor_file import Form

ROWS = st.integers(0, 40)
RANKS = st.integers(1, 9)


def layout_of(name: str, shape: tuple[int, ...], *, is_cut: bool, world_size: int) -> Layout:
    return cut_layout({WEIGHTS: {name: Cut(Form("F32", shape), is_cut)}}, world_size=world_size)


@given(num_rows=st.integers(1, 40), world_size=RANKS)
def test_rows_are_cut_as_torch_cuts_them(num_rows: int, world_size: int) -> None:
    chunks = [c.tolist() for c in torch.arange(num_rows).chunk(world_size)]
    chunks += [[]] * (world_size - len(chunks))
    for rank, chunk in enumerate(chunks):
        start, stop = rows_of(num_rows, rank=rank, world_size=world_size)
        assert list(range(start, stop)) == chunk


@given(num_rows=ROWS, wrote=RANKS, reads=RANKS, is_cut=st.booleans())
def test_ranks_of_another_number_find_exactly_their_rows(
    num_rows: int, wrote: int, reads: int, is_cut: bool
) -> None:
    layout = layout_of("w", (num_rows, 2), is_cut=is_cut, world_size=wrote)
    whole = np.arange(num_rows)
    files = {}
    for rank in range(wrote):
        writers = wrote if is_cut else 1
        start, stop = (
            (0, 0) if rank >= writers else rows_of(num_rows, rank=rank, world_size=writers)
        )
        files[shard_name(WEIGHTS, rank=rank, world_size=wrote)] = whole[start:stop]
    for rank in range(reads):
        start, stop = rows_of(num_rows, rank=rank, world_size=reads)
        slices = layout.slices(WEIGHTS, "w", start=start, stop=stop)
        read = [row for s in slices for row in files[s.file][s.start : s.stop]]
        assert all(s.stop <= len(files[s.file]) for s in slices), "more than the file has"
        assert read == list(range(start, stop))


def test_a_scalar_is_one_row_of_the_first_rank() -> None:
    layout = layout_of("step", (), is_cut=False, world_size=3)
    (found,) = layout.slices(WEIGHTS, "step", start=0, stop=1)
    assert found.file == "shards/model-0000-of-0003.safetensors"


def test_a_layout_survives_its_text() -> None:
    layout = layout_of("w", (5, 2), is_cut=True, world_size=3)
    assert parse_layout(layout.to_text()) == layout


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b'{"version": 2, "world_size": 1, "files": {}}',
        b'{"world_size": 1, "files": {"f": {"t": {"shape": [1], "dtype": "F4", "pieces": []}}}}',
    ],
)
def test_a_damaged_layout_or_one_of_another_version_is_refused(text: bytes) -> None:
    with pytest.raises(EnvironmentFault, match=r"shards/layout\.json"):
        parse_layout(text)


def test_a_gap_is_found_when_its_rows_are_wanted() -> None:
    pieces = (Piece(file="a", start=0, stop=2), Piece(file="b", start=3, stop=5))
    tensor = CutTensor(shape=(5,), dtype="F32", pieces=pieces)
    layout = Layout(world_size=2, files={WEIGHTS: {"w": tensor}})
    assert len(layout.slices(WEIGHTS, "w", start=3, stop=5)) == 1
    with pytest.raises(StorageError, match="row 2 of the tensor w"):
        layout.slices(WEIGHTS, "w", start=0, stop=5)
