"""What a process keeps of one trial for the next: what does not depend on a trial's values.

Stores with their connections, the indexes of the data sets, the place of the pretrained model, and
the task with its tokenizer. Weights are not kept: to read them again from files that the system
has in its memory takes no longer than to copy them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import xxhash

from cluster.storage import Store, Transfer, open_store
from jobs.spec import JobSpec, StoreAccess
from trainers.data.index import INDEX_KEY, Index, open_index
from trainers.pretrained import pretrained_folder
from trainers.tasks.task import Task, build_task

Made = TypeVar("Made")

_MOST_STORES = 8
_MOST_INDEXES = 4
_MOST_FOLDERS = 2
_MOST_TASKS = 2
"""One with the tokenizer of the pretrained model, one with that of checkpoints."""


class Kept:
    """Each is told by all that it is made from. Of one thread at a time."""

    def __init__(self) -> None:
        self._stores = _Newest[Store](_MOST_STORES)
        self._indexes = _Newest[Index](_MOST_INDEXES)
        self._folders = _Newest[Path](_MOST_FOLDERS)
        self._tasks = _Newest[Task](_MOST_TASKS)

    def store(
        self, uri: str, access: StoreAccess | None = None, *, transfer: Transfer | None = None
    ) -> Store:
        """As `open_store`."""
        key = uri, access, transfer
        return self._stores.get(key, lambda: open_store(uri, access, transfer=transfer))

    def index(self, store: Store) -> Index:
        """As `open_index`; an index that was written anew is read anew."""
        head = store.head(INDEX_KEY)
        if head is None:
            return open_index(store)  # which says so
        return self._indexes.get((store.uri, head.etag), lambda: open_index(store))

    def folder(self, spec: JobSpec, *, cache_folder: Path) -> Path:
        """As `pretrained_folder`; what is at a name is looked for once, unless it is removed."""
        key = spec.model.source, spec.model.revision, spec.store.uri, cache_folder
        found = self._folders.get(key, lambda: pretrained_folder(spec, cache_folder=cache_folder))
        return found if found.is_dir() else pretrained_folder(spec, cache_folder=cache_folder)

    def task(self, spec: JobSpec, *, model_folder: Path, index: Index) -> Task:
        """As `build_task`; a loss that is another one needs no other tokenizer."""
        plain = spec.task.model_copy(
            update={"label_smoothing": 0.0, "class_weights": None, "augment": None}
        )
        key = plain, spec.batching.packing, index.digest, _tokenizer_of(model_folder)
        task = self._tasks.get(
            key, lambda: build_task(spec, model_folder=model_folder, index=index)
        )
        return task.with_loss_of(spec)


class _Newest(Generic[Made]):
    """The most recently used of what was made, by its key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = OrderedDict[object, Made]()

    def get(self, key: object, make: Callable[[], Made]) -> Made:
        if key not in self._held:
            self._held[key] = make()
            if len(self._held) > self._most:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


def _tokenizer_of(folder: Path) -> str:
    """Digest of what decides a folder's tokenizer: the same in all checkpoints of a study."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".jinja"):
            content = path.read_bytes()
            if path.name == "config.json":  # which also holds a trial's own dropout
                content = str(json.loads(content).get("model_type")).encode()
            digest.update(f"{path.name} {len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()
