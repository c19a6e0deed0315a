"""The run folder of a trial: what is there before it is trained, and after it has ended.

    prepare_trial(store, assignment)    what a leg of it begins with
    record_end(store, assignment, outcome)

torch is loaded for a clone alone.
"""

from __future__ import annotations

import contextlib

from cluster.storage import ObjectExists, Store
from jobs.record import Outcome, RunPaths, State
from trainers.assignment import Assignment
from trainers.finish import build_result, write_result


def prepare_trial(store: Store, assignment: Assignment) -> None:
    """Begins the trial's run folder, with its job and, for a clone, its donor's checkpoint; what is
    there already is left as it is.

    The donor of a clone may go on after that. Raises as `begin_clone`.
    """
    trial, paths = assignment.trial, RunPaths(assignment.run_id)
    assert trial is not None
    with contextlib.suppress(ObjectExists):
        store.write_if_absent(paths.spec, assignment.spec.to_bytes())
    if trial.donor is not None:
        from trainers.clone import begin_clone

        begin_clone(store, paths, assignment, trial, trial.donor)


def record_end(store: Store, assignment: Assignment, outcome: Outcome) -> None:
    """Writes the trial's result, where it has ended for good."""
    if outcome.state.is_final and outcome.state is not State.STOPPED:
        paths = RunPaths(assignment.run_id)
        result = build_result(store, paths, generation=assignment.generation, ended=outcome)
        write_result(store, paths, result)
