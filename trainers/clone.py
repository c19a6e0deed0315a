"""The beginning of a clone: a checkpoint of another trial, as the run's own first attempt.

The ordinary way to go on from a checkpoint then finds it. It is copied by the store, and its
manifest comes last: whoever is killed before is followed by one that begins anew.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import xxhash

from cluster.storage import ObjectExists, Store
from jobs.errors import EnvironmentFault, Problem, SpecError
from jobs.record import Attempt, CheckpointName, Manifest, Outcome, Part, RunPaths, State
from jobs.spec import JobSpec
from trainers import watchdog
from trainers.assignment import Assignment, DonorCheckpoint, TrialPlan
from trainers.checkpoint import PROGRESS, part_of, progress_file
from trainers.controls import last_attempt
from trainers.local_copy import DamagedPart, reads_again
from trainers.loop import Progress
from trainers.records import read_live_manifests
from trainers.restore import parse_progress

_ATTEMPT = 1
_COPIES_AT_ONCE = 4
_MUST_BE_EQUAL = ("architecture", "data_order")


def begin_clone(
    store: Store, paths: RunPaths, assignment: Assignment, trial: TrialPlan, donor: DonorCheckpoint
) -> None:
    """Gives a run that has not begun the donor's checkpoint; may be called at every start.

    Weights, optimizer and place in the order of rows are the donor's. What its evaluations before
    that checkpoint have found is not: the clone has no checkpoint of them. Raises SpecError where
    the job's model or order of rows is another than the donor's, EnvironmentFault where the
    checkpoint is gone.
    """
    name = CheckpointName(donor.step, _ATTEMPT)
    if last_attempt(store, paths) > _ATTEMPT or store.head(paths.manifest(name)) is not None:
        return
    donor_paths = RunPaths(donor.run_id)
    live = read_live_manifests(store, donor_paths)
    saved = next((manifest for manifest in live if manifest.step == donor.step), None)
    if saved is None:
        raise EnvironmentFault(
            Problem(
                f"{paths.run_id} is to go on from step {donor.step} of {donor.run_id}, which has "
                "no such checkpoint any more",
                "keep more of them with checkpoint.keep_last",
            )
        )
    _refuse_other_job(assignment.spec, saved, paths, donor)
    watchdog.tick("copies the donor's checkpoint")
    source, target = donor_paths.checkpoint(saved.name), paths.checkpoint(name)

    def copy(part: Part) -> None:
        store.copy(source + part.name, target + part.name)
        watchdog.tick()

    copied = [part for part in saved.parts if part.name != PROGRESS]
    with ThreadPoolExecutor(_COPIES_AT_ONCE, thread_name_prefix="shoal-copy") as pool:
        list(pool.map(copy, copied))
    progress = _own_progress(_progress_of(store, source, saved), assignment.spec, trial, saved)
    text = progress_file(progress, before=None)
    store.write(target + PROGRESS, text)
    manifest = saved.model_copy(
        update={
            "attempt": _ATTEMPT,
            "generation": assignment.generation,
            "parent_step": None,
            "created_at": time.time(),
            "parts": tuple(sorted([*copied, part_of(PROGRESS, text)], key=lambda part: part.name)),
            "digests": assignment.spec.digests(),
            "best_step": progress.best_step,
            "is_last_step": False,
        }
    )
    attempt = Attempt(
        attempt=_ATTEMPT,
        generation=assignment.generation,
        world_size=1,
        restored_step=None,
        started_at=time.time(),
    )
    outcome = Outcome(attempt=_ATTEMPT, state=State.RECOVERING, step=donor.step)
    with contextlib.suppress(ObjectExists):  # from a start that was killed here
        store.write_if_absent(paths.attempt(_ATTEMPT), attempt.to_bytes())
    store.write(paths.outcome(_ATTEMPT), outcome.to_bytes())
    with contextlib.suppress(ObjectExists):  # from a driver that this one has superseded just now
        store.write_if_absent(paths.manifest(name), manifest.to_bytes())


def _refuse_other_job(
    spec: JobSpec, saved: Manifest, paths: RunPaths, donor: DonorCheckpoint
) -> None:
    own = spec.digests()
    differing = [group for group in _MUST_BE_EQUAL if saved.digests.get(group) != own[group]]
    if differing:
        raise SpecError(
            Problem(
                f"{paths.run_id} cannot go on from {donor.run_id}: {' and '.join(differing)} of "
                "its job are others",
                "search no key of task but task.label_smoothing, nor model.source, model.revision, "
                "data.train, data.seed or batching.global_batch_size where trials are cloned",
            )
        )


@reads_again
def _progress_of(store: Store, folder: str, saved: Manifest) -> Progress:
    text = store.read(folder + PROGRESS)
    part = next(part for part in saved.parts if part.name == PROGRESS)
    if xxhash.xxh3_128_hexdigest(text) != part.xxh3:
        raise DamagedPart(Problem(f"{store.uri}/{folder}{PROGRESS} is damaged"))
    return parse_progress(text)[0]


def _own_progress(progress: Progress, spec: JobSpec, trial: TrialPlan, saved: Manifest) -> Progress:
    """The donor's progress with its last evaluation alone, if it is one of this step."""
    metric, _, _ = spec.best
    best_value = saved.evaluation.get(metric)
    return replace(
        progress,
        best_step=None if best_value is None else saved.step,
        best_value=best_value,
        best_score=saved.evaluation.get(trial.metric),
        bad_evaluations=0,
        # How far the learning rate was lowered stays: it is lowered from the clone's own.
        plateau_value=None,
        plateau_evaluations=0,
        finished=False,
    )
