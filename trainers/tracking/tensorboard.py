"""TensorBoard: an event file of each attempt in the run folder."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tensorboardX import SummaryWriter

from cluster.storage import StorageError, Store
from trainers.tracking.tracker import Ended, Parameters, Point


class TensorBoard:
    """A Tracker. The file is written locally, and uploaded as a whole each time."""

    def __init__(self, store: Store, prefix: str) -> None:
        """`prefix` is the file's folder in the store, with a slash at its end."""
        self._store = store
        self._prefix = prefix
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-tensorboard-")
        self._writer = SummaryWriter(self._folder.name, flush_secs=3600)

    def describe(self, parameters: Parameters) -> None:
        """Nothing: spec.json is beside the file."""

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step, point.time)
        self._upload()

    def end(self, ended: Ended) -> None:
        """Nothing: result.json is beside the file."""

    def close(self) -> None:
        self._upload()
        with contextlib.suppress(OSError):  # said by _upload
            self._writer.close()
        self._folder.cleanup()

    def _upload(self) -> None:
        """What cannot be uploaded now is part of the next upload."""
        try:
            self._writer.flush()
            for path in Path(self._folder.name).iterdir():
                self._store.upload(self._prefix + path.name, path)
        except (StorageError, OSError) as error:
            sys.stderr.write(f"shoal: TensorBoard's file is not written: {error}\n")
