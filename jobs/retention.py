"""Deleting runs, and what nobody can use any more.

A deletion that is cut off never leaves what looks whole: a mark comes first, then the objects that
commit something (result, manifests) go, then what they named, then the job, and the mark last: what
is left always bears the mark, and no new run takes the name while old objects are there.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from cluster.storage import Head, StorageError, Store, Unfinished
from jobs.errors import Problem, SpecError
from jobs.onlooker import Onlooker
from jobs.record import CheckpointName, RunPaths, State
from jobs.runs import RunReader
from jobs.situation import await_certainty, read_situation

Tell = Callable[[str], object]
"""Takes a sentence for the user."""

_CHECKPOINT_KEY = re.compile(r"[^/]+/(trials/\d+/)?checkpoints/step-\d{8,}-attempt-\d{4,}/")
_TRIAL_CHECKPOINT = re.compile(r"[^/]+/(trials/\d+)/checkpoints/")
PENDING_GRACE_SECONDS = 120.0
"""A run that has no driver yet may get one for so long after its submission."""


def refuse_running(reader: RunReader, *, wait: Callable[[str], None]) -> None:
    """Raises SpecError if a driver works on the run, or is about to.

    `wait` is told of a wait for the lease of a driver that has long been silent.
    """
    head = reader.store.head(reader.paths.spec)
    if head is None:
        return
    [situation] = await_certainty([reader], wait=wait)
    if situation.is_over:
        return
    age_seconds = time.time() - head.modified_at
    if situation.state is State.PENDING and age_seconds > PENDING_GRACE_SECONDS:
        return
    raise SpecError(
        Problem(
            f"{reader.uri} goes on: {situation.state}",
            f"stop it first: shoal stop {reader.uri} --wait",
        )
    )


def delete_run(store: Store, run_id: str, *, tell: Tell) -> None:
    """Delete all objects of a run, and its uploads; to be repeated if it was cut off.

    `tell` hears of what could not be removed without making the deletion fail.
    """
    paths = RunPaths(run_id)
    store.write(paths.deleting, b"{}")
    keys = [head.key for head in store.list(f"{run_id}/")]
    commits = [key for key in keys if key.endswith(("/result.json", "/manifest.json"))]
    store.delete(commits)
    store.delete(key for key in keys if key not in {*commits, paths.spec, paths.deleting})
    _drop(store, find_unfinished(store, f"{run_id}/", tell=tell), tell=tell)
    # Not in one batch, of which a store may do any part: a job without the mark looks like a run.
    store.delete([paths.spec])
    store.delete([paths.deleting])


def find_unfinished(store: Store, prefix: str = "", *, tell: Tell) -> list[Unfinished]:
    """Writes that have not ended; empty, and told, where the store does not say which there are."""
    try:
        return [*store.list_unfinished(prefix)]
    except StorageError as error:
        tell(f"{error}; what killed writers have left there stays")
        return []


def _drop(store: Store, unfinished: Iterable[Unfinished], *, tell: Tell) -> None:
    try:
        store.drop_unfinished(unfinished)
    except StorageError as error:
        tell(str(error))


def describe_unfinished(num_unfinished: int) -> str:
    """`1 unfinished upload`."""
    return f"{num_unfinished} unfinished upload" + "s" * (num_unfinished != 1)


@dataclass(frozen=True)
class Garbage:
    """Objects of one run, or uploads that never became objects, that nobody can use."""

    run_id: str
    why: str
    what: str
    heads: tuple[Head, ...]
    is_whole_run: bool = False
    unfinished: tuple[Unfinished, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(head.num_bytes for head in self.heads)

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "what": self.what,
            "why": self.why,
            "objects": len(self.heads),
            "unfinished_uploads": len(self.unfinished),
            "bytes": self.num_bytes,
        }


def find_garbage(
    store: Store, *, older_than_seconds: float, now: float, tell: Tell
) -> Iterator[Garbage]:
    """What nobody can use in a store of runs; nothing younger than the bound, nothing of a run
    that goes on, and nothing of a folder that is neither a run nor marked by a deletion.

    Drivers that are silent are looked at, all at the same time and for as long as a lease lives at
    most, before anything of their runs counts. `tell` hears of that, and of what could not be
    looked through.
    """
    newest = now - older_than_seconds
    silent: list[tuple[RunReader, list[Garbage]]] = []
    unfinished = defaultdict[str, list[Unfinished]](list)
    for each in find_unfinished(store, tell=tell):
        if each.last_sign_at < newest:
            unfinished[each.key.partition("/")[0]].append(each)
    # A run may have been deleted without them.
    of_lost_runs = {run_id for run_id, left in unfinished.items() if _of_checkpoints(left)}
    for run_id in sorted({*store.list_folders(), *of_lost_runs}):
        heads = list(store.list(f"{run_id}/"))
        keys = {head.key for head in heads}
        paths = RunPaths(run_id)
        left = unfinished[run_id]
        if paths.deleting in keys:
            if max(head.modified_at for head in heads) < newest:
                yield Garbage(run_id, "a deletion was cut off", "all", tuple(heads), True)
        elif paths.spec in keys:
            reader = RunReader(store, run_id)
            situation = read_situation(reader, now=now, onlooker=Onlooker())
            if situation.is_over or situation.is_doubtful:
                garbage = [
                    *_garbage_of_run(reader, heads, newest=newest, tell=tell),
                    *_garbage_of_trials(reader, heads, newest=newest, tell=tell),
                    *_garbage_of_writers(run_id, left),
                ]
                if situation.is_over:
                    yield from garbage
                elif garbage:
                    silent.append((reader, garbage))
        elif run_id in of_lost_runs:
            yield from _garbage_of_writers(run_id, _of_checkpoints(left))
    situations = await_certainty([reader for reader, _ in silent], wait=tell)
    for situation, (_, garbage) in zip(situations, silent, strict=True):
        if situation.is_over:
            yield from garbage


def _of_checkpoints(unfinished: Iterable[Unfinished]) -> list[Unfinished]:
    """Those that, by their keys, were to become parts of checkpoints."""
    return [each for each in unfinished if _CHECKPOINT_KEY.match(each.key)]


def _garbage_of_writers(run_id: str, left: Sequence[Unfinished]) -> Iterator[Garbage]:
    if left:
        yield Garbage(run_id, "their writers are gone", "uploads", (), unfinished=tuple(left))


def _garbage_of_trials(
    study: RunReader, heads: Sequence[Head], *, newest: float, tell: Tell
) -> Iterator[Garbage]:
    """What a study's trials have, each looked through as a run."""
    result = study.result()
    pinned = {result.best_checkpoint, result.last_checkpoint} if result else set()
    by_trial = defaultdict[str, list[Head]](list)
    for head in heads:
        if (of_trial := _TRIAL_CHECKPOINT.match(head.key)) is not None:
            by_trial[of_trial[1]].append(head)
    for trial, own in by_trial.items():
        reader = RunReader(study.store, f"{study.run_id}/{trial}")
        for garbage in _garbage_of_run(reader, own, newest=newest, tell=tell):
            what = f"{trial}/{garbage.what}"
            if what not in pinned:
                yield replace(garbage, run_id=study.run_id, what=what)


def _garbage_of_run(
    reader: RunReader, heads: Sequence[Head], *, newest: float, tell: Tell
) -> Iterator[Garbage]:
    attempts = {attempt.attempt for attempt in reader.attempts()}
    manifests = {manifest.name for manifest in reader.manifests()}
    live = {manifest.name for manifest in reader.live_manifests()}
    result = reader.result()
    pinned = {result.best_checkpoint, result.last_checkpoint} if result else set()
    if reader.problems:
        # With a record missing, a checkpoint may look superseded that is not.
        tell(f"{'; '.join(reader.problems)}: the run's checkpoints are left alone")
        return
    for name, folder_heads in _checkpoint_folders(reader.paths, heads):
        what = f"checkpoints/{name.folder}"
        if what in pinned or max(head.modified_at for head in folder_heads) >= newest:
            continue
        if name not in manifests:
            yield Garbage(reader.run_id, "has no manifest", what, folder_heads)
        elif name not in live and name.attempt in attempts:
            yield Garbage(reader.run_id, "a later attempt went another way", what, folder_heads)


def _checkpoint_folders(
    paths: RunPaths, heads: Iterable[Head]
) -> Iterator[tuple[CheckpointName, tuple[Head, ...]]]:
    """(which, objects) of each folder of a checkpoint."""
    own = [head for head in heads if head.key.startswith(paths.checkpoints)]
    for folder, members in groupby(
        own, key=lambda h: h.key.removeprefix(paths.checkpoints).split("/")[0]
    ):
        name = CheckpointName.parse(folder)
        if name is not None:
            yield name, tuple(members)


def collect(store: Store, garbage: Garbage, *, tell: Tell) -> None:
    """Delete it, what commits the rest first; `tell` as in `delete_run`."""
    if garbage.is_whole_run:
        delete_run(store, garbage.run_id, tell=tell)
        return
    _drop(store, garbage.unfinished, tell=tell)
    keys = [head.key for head in garbage.heads]
    store.delete(key for key in keys if key.endswith("/manifest.json"))
    store.delete(keys)
