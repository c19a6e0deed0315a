"""Which rows of which file make up each tensor of a checkpoint whose tensors are cut. Pure.

    rows_of          the rows of a tensor that a rank holds
    cut_layout       the layout of a checkpoint of so many ranks
    Layout.slices    where any rows of a tensor lie, whatever number of ranks has written them

Needs no torch: a machine without it puts checkpoints together by the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from cluster.storage import StorageError
from jobs.errors import EnvironmentFault, Problem
from jobs.record import Record

LAYOUT_NAME = "shards/layout.json"


def rows_of(num_rows: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """First and end of the rows of a tensor's first dimension that `rank` holds.

    As torch.chunk cuts: equal shares, rounded up; the last ranks may have fewer rows, or none.
    """
    share = -(-num_rows // world_size)
    return min(rank * share, num_rows), min((rank + 1) * share, num_rows)


def shard_name(rank: int, *, world_size: int) -> str:
    """The file of a rank, relative to its checkpoint's folder."""
    return f"shards/rank-{rank:04d}-of-{world_size:04d}.safetensors"


class Piece(Record):
    """Rows [start, stop) of a tensor, which are the whole tensor of the same name in `file`."""

    file: str
    start: int
    stop: int


class CutTensor(Record):
    """A tensor and where its rows lie. A scalar counts as one row."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32."""
    pieces: tuple[Piece, ...]
    """By row, without gaps; files without a row of it are not listed."""

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of a tensor as it lies in a file."""

    file: str
    start: int
    stop: int


class Layout(Record):
    """`model/NAME` and `optimizer/NAME/STATE` of a checkpoint, over the files of its ranks."""

    version: Literal[1] = 1
    world_size: int
    tensors: dict[str, CutTensor]

    def slices(self, name: str, *, start: int, stop: int) -> list[Slice]:
        """What to read, in this order, to have rows [start, stop) of a tensor.

        Raises StorageError where the layout has gaps there: it is damaged.
        """
        found: list[Slice] = []
        reached = start
        for piece in self.tensors[name].pieces:
            end = min(piece.stop, stop)
            if piece.start <= reached < end:
                found.append(Slice(piece.file, reached - piece.start, end - piece.start))
                reached = end
        if reached < stop:
            raise StorageError(
                Problem(f"{LAYOUT_NAME} names no file with row {reached} of the tensor {name}")
            )
        return found

    def to_text(self) -> bytes:
        """The layout as `parse_layout` reads it."""
        return self.model_dump_json().encode()


def parse_layout(text: bytes) -> Layout:
    """A layout from its JSON; EnvironmentFault where it is damaged or of a later version."""
    try:
        return Layout.model_validate_json(text)
    except ValidationError as error:
        raise EnvironmentFault(
            Problem(
                f"{LAYOUT_NAME} is damaged, or of another version than this Shoal reads: "
                f"{error.errors()[0]['msg']}",
                "install the Shoal that wrote the checkpoint",
            )
        ) from error


@dataclass(frozen=True)
class Shape:
    """A tensor as a layout knows it."""

    shape: tuple[int, ...]
    dtype: str
    is_cut: bool
    """Whether each rank has its rows; else rank 0 has all of them."""


def cut_layout(tensors: Mapping[str, Shape], *, world_size: int) -> Layout:
    """The layout of tensors that `world_size` ranks have cut as `rows_of` does."""
    return Layout(
        world_size=world_size,
        tensors={
            name: CutTensor(
                shape=tensor.shape, dtype=tensor.dtype, pieces=_pieces(tensor, world_size)
            )
            for name, tensor in tensors.items()
        },
    )


def _pieces(tensor: Shape, world_size: int) -> tuple[Piece, ...]:
    num_rows = tensor.shape[0] if tensor.shape else 1
    writers = world_size if tensor.is_cut else 1
    shares = [rows_of(num_rows, rank=rank, world_size=writers) for rank in range(writers)]
    return tuple(
        Piece(file=shard_name(rank, world_size=world_size), start=start, stop=stop)
        for rank, (start, stop) in enumerate(shares)
        if start < stop
    )
