"""One safetensors file from the files of all ranks: no torch, and a block of bytes at a time.

make_whole          the file, from parts that are verified as they are read
store_weights       stores the weights of a checkpoint as such a file
complete_weights    puts them into a checkpoint's local copy
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import xxhash
from filelock import FileLock

from cluster.storage import Store, open_store
from jobs.errors import EnvironmentFault, Problem
from jobs.record import Part
from trainers import watchdog
from trainers.layout import LAYOUT_NAME, WEIGHTS, Layout, parse_layout
from trainers.local_copy import DamagedPart, reads_again
from trainers.tensor_file import Place, header_of, parse_header

_BLOCK_BYTES = 8 * 2**20
_THREADS = 4
_MODEL = "model/"
CONFIG_NAME = "config.json"
_OTHER_BYTES = "its bytes are not those of its record"


def read_layout(checkpoint: Store, parts: Iterable[Part]) -> Layout | None:
    """The layout of a checkpoint, verified by its part; None where the checkpoint is not cut."""
    part = next((part for part in parts if part.name == LAYOUT_NAME), None)
    return None if part is None else parse_layout(_verified(checkpoint, part))


def store_model(checkpoint: Store, parts: Sequence[Part], to: Store, *, scratch: Path) -> int:
    """Puts the `model/` folder of a checkpoint, cut or not, right below `to`; its bytes.

    Every byte is verified. `config.json`, without which no folder is a model's, comes last, and
    goes first where the folder is there already. Raises as `store_weights` does.
    """
    small = {
        part.name.removeprefix(_MODEL): _verified(checkpoint, part)
        for part in parts
        if part.name.startswith(_MODEL) and part.name != WEIGHTS
    }
    if CONFIG_NAME not in small:
        raise _damaged(checkpoint, "manifest.json", f"it names no {_MODEL}{CONFIG_NAME}")
    config = small.pop(CONFIG_NAME)
    to.delete([CONFIG_NAME])
    stored = store_weights(checkpoint, parts, to, WEIGHTS.removeprefix(_MODEL), scratch=scratch)
    num_bytes = stored.bytes
    for name, data in {**small, CONFIG_NAME: config}.items():
        to.write(name, data)
        num_bytes += len(data)
    return num_bytes


def store_weights(
    checkpoint: Store, parts: Sequence[Part], to: Store, key: str, *, scratch: Path
) -> Part:
    """Stores the file `model/model.safetensors` of a checkpoint, cut or not, as `key` of `to`.

    It is put together in the folder `scratch`, without a name, so nothing of it is left after a
    kill. Raises DamagedPart, StorageError, or EnvironmentFault where the disk has no room.
    """
    with (
        _weights_file(checkpoint, parts, scratch) as file,
        ThreadPoolExecutor(1, thread_name_prefix="shoal-upload") as pool,
    ):
        descriptor = file.fileno()
        upload = pool.submit(to.upload, key, Path(f"/dev/fd/{descriptor}"))
        num_bytes = os.fstat(descriptor).st_size
        sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_128()
        for start in range(0, num_bytes, _BLOCK_BYTES):
            block = os.pread(descriptor, _BLOCK_BYTES, start)
            sha256.update(block)
            xxh3.update(block)
        upload.result()
    watchdog.tick()
    return Part(name=key, bytes=num_bytes, sha256=sha256.hexdigest(), xxh3=xxh3.hexdigest())


def _weights_file(checkpoint: Store, parts: Sequence[Part], scratch: Path) -> BinaryIO:
    stored = next((part for part in parts if part.name == WEIGHTS), None)
    layout = read_layout(checkpoint, parts)
    if stored is None and layout is None:
        raise _damaged(checkpoint, "manifest.json", "it names no weights")
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - closed by the caller
        try:
            if stored is not None:
                _pour(checkpoint, file.fileno(), stored, None)
            elif layout is not None:
                make_whole(checkpoint, layout, WEIGHTS, parts, file)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise _no_room(scratch, error) from error
    return file


def complete_weights(folder: Path, parts: Iterable[Part]) -> None:
    """Puts the file of the weights into a checkpoint's local copy, where its ranks had cut them.

    Processes of a node that ask at the same time do it once. Raises as `store_weights` does.
    """
    weights, layout = folder / WEIGHTS, folder / LAYOUT_NAME
    if weights.exists() or not layout.exists():
        return
    with FileLock(f"{folder}.lock"):
        if weights.exists():
            return
        unfinished = folder / "weights.unfinished"
        try:
            with unfinished.open("w+b") as file:
                make_whole(
                    open_store(folder), parse_layout(layout.read_bytes()), WEIGHTS, parts, file
                )
            unfinished.rename(weights)
        except OSError as error:
            raise _no_room(folder, error) from error


def make_whole(
    checkpoint: Store, layout: Layout, whole: str, parts: Iterable[Part], file: BinaryIO
) -> None:
    """Writes the file `whole` of a layout, from those of a checkpoint's parts that have rows of it.

    The same bytes, whatever number of ranks has written the parts. Each is read to its end once and
    compared with its sha256; one that differs is read anew, then DamagedPart is raised. Raises
    OSError where the disk has no room.
    """
    tensors = layout.files[whole]
    header, places = header_of({name: tensor.form for name, tensor in tensors.items()})
    wanted: dict[str, dict[str, Place]] = defaultdict(dict)
    for name, tensor in tensors.items():
        begin = places[name].start
        for piece in layout.slices(whole, name, start=0, stop=tensor.num_rows):
            stop = begin + (piece.stop - piece.start) * tensor.row_bytes
            wanted[piece.file][name] = Place(begin, stop)
            begin = stop
    known = {part.name: part for part in parts}
    missing = sorted(wanted.keys() - known.keys())
    if missing:
        raise _damaged(checkpoint, LAYOUT_NAME, f"it names {missing[0]}, which is no part")
    descriptor = file.fileno()
    _write_at(descriptor, header, 0)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="shoal-consolidate") as pool:
        pour = partial(_pour, checkpoint, descriptor)
        for _ in pool.map(pour, [known[name] for name in wanted], wanted.values()):
            pass


@dataclass(frozen=True)
class _Segment:
    """Bytes [start, stop) of a part, which begin at `target` in the whole file."""

    start: int
    stop: int
    target: int


@reads_again
def _pour(
    checkpoint: Store, descriptor: int, part: Part, wanted: Mapping[str, Place] | None
) -> None:
    """Copies the wanted tensors of a part to their places; or all of it as it is."""
    digest, begun = hashlib.sha256(), bytearray()
    segments = [_Segment(0, part.bytes, 0)] if wanted is None else None
    for start in range(0, part.bytes, _BLOCK_BYTES):
        block: bytes | bytearray = checkpoint.read_range(
            part.name, start=start, end=min(start + _BLOCK_BYTES, part.bytes)
        )
        digest.update(block)
        if segments is None and wanted is not None:
            begun += block
            held = _header(checkpoint, part, begun)
            if held is None:
                continue
            segments = _segments(checkpoint, part, held, wanted)
            block, start = begun, 0
        for segment in segments or ():
            first, stop = max(segment.start, start), min(segment.stop, start + len(block))
            if first < stop:
                data = memoryview(block)[first - start : stop - start]
                _write_at(descriptor, data, segment.target + first - segment.start)
        watchdog.tick()
    if segments is None or digest.hexdigest() != part.sha256:
        raise _damaged(checkpoint, part.name, _OTHER_BYTES)


def _header(checkpoint: Store, part: Part, begun: bytearray) -> dict[str, Place] | None:
    try:
        return parse_header(begun)
    except ValueError as error:
        raise _damaged(checkpoint, part.name, str(error)) from error


def _segments(
    checkpoint: Store, part: Part, held: Mapping[str, Place], wanted: Mapping[str, Place]
) -> list[_Segment]:
    for name, target in wanted.items():
        place = held.get(name)
        if place is None or place.stop - place.start != target.stop - target.start:
            raise _damaged(checkpoint, part.name, f"it does not hold its rows of {name}")
    return [
        _Segment(held[name].start, held[name].stop, target.start) for name, target in wanted.items()
    ]


def _no_room(folder: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(
        Problem(
            f"{folder} cannot hold the weights of the model: {error}",
            "free disk space there, or set SHOAL_CACHE to a folder on a larger disk",
        )
    )


@reads_again
def _verified(checkpoint: Store, part: Part) -> bytes:
    """A small part."""
    data = checkpoint.read(part.name)
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise _damaged(checkpoint, part.name, _OTHER_BYTES)
    return data


def _damaged(checkpoint: Store, name: str, why: str) -> DamagedPart:
    return DamagedPart(Problem(f"{checkpoint.uri}/{name} is damaged: {why}"))


def _write_at(descriptor: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
