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
from jobs.record import MODEL_WEIGHTS, Record
from trainers.tensor_file import ITEM_BYTES, Form

WEIGHTS = MODEL_WEIGHTS
OPTIMIZER = "optimizer.safetensors"
"""The files of a checkpoint that is not cut, by which a layout sorts its tensors."""
SHARDS = "shards/"
LAYOUT_NAME = f"{SHARDS}layout.json"


def rows_of(num_rows: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """First and end of the rows of a tensor's first dimension that `rank` holds.

    As torch.chunk cuts: equal shares, rounded up; the last ranks may have fewer rows, or none.
    """
    share = -(-num_rows // world_size)
    return min(rank * share, num_rows), min((rank + 1) * share, num_rows)


def shard_name(whole: str, *, rank: int, world_size: int) -> str:
    """A rank's file of what would be the file `whole`, relative to its checkpoint's folder."""
    return f"{shard_stem(whole)}{rank:04d}-of-{world_size:04d}.safetensors"


def shard_stem(whole: str) -> str:
    """How the names of all ranks' files begin of what would be the file `whole`."""
    return f"{SHARDS}{whole.rpartition('/')[2].removesuffix('.safetensors')}-"


def parts_name(*, rank: int, world_size: int) -> str:
    """Where a rank tells which parts it has stored, relative to its checkpoint's folder."""
    return f"{SHARDS}parts-{rank:04d}-of-{world_size:04d}.json"


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
        return num_rows(self.shape)

    @property
    def form(self) -> Form:
        return Form(self.dtype, self.shape)

    @property
    def row_bytes(self) -> int:
        return self.form.num_bytes // max(1, self.num_rows)


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of a tensor as it lies in a file."""

    file: str
    start: int
    stop: int


class Layout(Record):
    """The tensors of each file that the checkpoint would have if it were not cut."""

    version: Literal[1] = 1
    world_size: int
    files: dict[str, dict[str, CutTensor]]

    def slices(self, whole: str, name: str, *, start: int, stop: int) -> list[Slice]:
        """What to read, in this order, to have rows [start, stop) of a tensor of the file `whole`.

        Raises StorageError where the layout has gaps there: it is damaged.
        """
        found: list[Slice] = []
        reached = start
        for piece in self.files[whole][name].pieces:
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
        layout = Layout.model_validate_json(text)
        unknown = {t.dtype for f in layout.files.values() for t in f.values()} - set(ITEM_BYTES)
        if unknown:
            raise ValueError(f"it has tensors of {', '.join(sorted(unknown))}")
    except ValueError as error:
        shown = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise EnvironmentFault(
            Problem(
                f"{LAYOUT_NAME} is damaged, or of another version than this Shoal reads: {shown}",
                "install the Shoal that wrote the checkpoint",
            )
        ) from error
    return layout


def num_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor of that shape; a scalar counts as one."""
    return shape[0] if shape else 1


@dataclass(frozen=True)
class Cut:
    """A tensor and whether each rank has its rows; else rank 0 has all of them."""

    form: Form
    is_cut: bool


def cut_layout(files: Mapping[str, Mapping[str, Cut]], *, world_size: int) -> Layout:
    """The layout of tensors, by file, that `world_size` ranks have cut as `rows_of` does."""
    return Layout(
        world_size=world_size,
        files={
            whole: {
                name: CutTensor(
                    shape=tensor.form.shape,
                    dtype=tensor.form.dtype,
                    pieces=_pieces(whole, tensor, world_size),
                )
                for name, tensor in tensors.items()
            }
            for whole, tensors in files.items()
        },
    )


def _pieces(whole: str, tensor: Cut, world_size: int) -> tuple[Piece, ...]:
    writers = world_size if tensor.is_cut else 1
    rows = num_rows(tensor.form.shape)
    shares = [rows_of(rows, rank=rank, world_size=writers) for rank in range(writers)]
    return tuple(
        Piece(file=shard_name(whole, rank=rank, world_size=world_size), start=start, stop=stop)
        for rank, (start, stop) in enumerate(shares)
        if start < stop
    )
