"""Clones: they begin with another trial's checkpoint, whenever they are killed, and go on by their
own hyper-parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.storage import ObjectMissing, Store
from jobs.record import CheckpointName, Outcome, RunPaths, State
from jobs.spec import JobSpec
from tests.evidence import final_weights
from tests.scene import Scene
from tests.trainers.test_trial import PLAN, Study, job, trial_of
from trainers.assignment import Assignment, DonorCheckpoint, Verdict
from trainers.clone import begin_clone
from trainers.optim import build_optimizer
from trainers.patience import Patience
from trainers.preparation import prepare
from trainers.records import read_attempts, read_live_manifests, read_manifests
from trainers.session import ProcessSession
from trainers.trial import run_trial

DONOR = "study/trials/0000"
CLONE = "study/trials/0001"
PATHS = RunPaths(CLONE)
FIRST = CheckpointName(4, 1)
STEP = DonorCheckpoint(DONOR, 4)


def clone_of(spec: JobSpec, *, donor: DonorCheckpoint = STEP, generation: int = 1) -> Assignment:
    made = trial_of(spec, CLONE, generation=generation)
    return replace(made, trial=replace(PLAN, donor=donor))


def donor_at_4(scene: Scene, **parts: Any) -> None:
    outcome = run_trial(trial_of(job(scene, **parts), DONOR), Study({4: Verdict.PAUSE}))
    assert outcome.state is State.RECOVERING


def own_values(scene: Scene) -> JobSpec:
    return job(
        scene,
        optimizer={
            "learning_rate": 1e-4, "weight_decay": 0.3, "betas": [0.5, 0.6], "epsilon": 1e-3,
        },
        model={"dropout": 0.4},
        task={"label_smoothing": 0.2},
    )  # fmt: skip


def test_a_clone_with_the_donors_values_ends_as_the_donor_does(scene: Scene) -> None:
    donor_at_4(scene)
    study = Study()
    assert run_trial(clone_of(job(scene)), study).state is State.SUCCEEDED
    assert [report.step for report in study.reports] == [6, 8, 10]
    run_trial(trial_of(job(scene), DONOR), Study())
    assert final_weights(scene.runs, CLONE) == final_weights(scene.runs, DONOR)
    first, second = read_attempts(scene.runs, PATHS)
    assert (first.attempt, first.restored_step) == (1, None)
    assert (second.attempt, second.restored_step) == (2, 4)


def test_a_clone_goes_on_by_its_own_values(scene: Scene) -> None:
    """Of the donor's optimizer its state is taken, and nothing that a job says."""
    donor_at_4(scene, optimizer={"weight_decay": 0.1}, model={"dropout": 0.2})
    spec = own_values(scene)
    run_trial(clone_of(spec), Study({6: Verdict.PAUSE}))
    [restored] = [m for m in read_live_manifests(scene.runs, PATHS) if m.step == 4]
    patience = Patience(limit_seconds=1)
    prepared = prepare(
        ProcessSession(use_gpu=False), spec, scene.runs, PATHS, restored, patience=patience
    )
    model, optimizer = prepared.trainee.model, prepared.trainee.optimizer
    fresh = build_optimizer(model, spec.optimizer)
    values = [
        {name: value for name, value in group.items() if name not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    assert values == [
        {name: value for name, value in group.items() if name not in ("params", "param_names")}
        for group in fresh.param_groups
    ]
    assert [(v["weight_decay"], v["betas"], v["eps"]) for v in values] == [
        (0.3, (0.5, 0.6), 1e-3), (0.0, (0.5, 0.6), 1e-3),
    ]  # fmt: skip
    assert {state["step"].item() for state in optimizer.state.values()} == {4.0}
    assert {m.p for m in model.modules() if type(m).__name__ == "Dropout"} == {0.4}


def test_what_the_donor_found_out_before_is_not_the_clones(scene: Scene) -> None:
    stopping = {"metric": "validation/accuracy", "mode": "min", "patience": 2, "min_delta": 2.0}
    spec = job(scene, train={"early_stopping": stopping})
    donor = Study({4: Verdict.PAUSE})
    run_trial(trial_of(spec, DONOR), donor)
    study = Study()
    outcome = run_trial(clone_of(spec), study)
    # The donor, whose first evaluation is its best, would have stopped at step 6.
    assert [report.step for report in study.reports] == [6, 8]
    assert outcome.best_step == 4
    at_4 = donor.reports[1].value
    assert [r.best for r in study.reports] == [
        max(at_4, *(r.value for r in study.reports[: n + 1])) for n in range(2)
    ]


# ------------------------------------------------------------------------------- killed, refused


class DyingStore:
    """A store in which the process dies before its n-th change."""

    def __init__(self, store: Store, changes: int) -> None:
        self._store, self._left = store, changes

    def __getattr__(self, name: str) -> Any:
        whole = getattr(self._store, name)
        if name not in ("write", "write_if_absent", "copy"):
            return whole

        def change(*args: Any, **keys: Any) -> Any:
            if self._left <= 0:
                raise KeyboardInterrupt
            self._left -= 1
            return whole(*args, **keys)

        return change


def begin(store: Any, assignment: Assignment) -> None:
    assert assignment.trial is not None
    assert assignment.trial.donor is not None
    begin_clone(store, PATHS, assignment, assignment.trial, assignment.trial.donor)


def test_a_clone_that_is_killed_while_it_copies_is_a_whole_one_at_the_next_start(
    scene: Scene,
) -> None:
    donor_at_4(scene)
    survived = 0
    for changes in range(30):
        try:
            begin(DyingStore(scene.runs, changes), clone_of(job(scene)))
        except KeyboardInterrupt:
            survived += 1
            assert read_manifests(scene.runs, PATHS) == [], "it looks whole before it is"
        else:
            break
        if survived % 3 == 0:
            continue  # what was copied stays for the next try
        scene.runs.delete([head.key for head in scene.runs.list(PATHS.run_id + "/")])
    assert survived >= 7
    assert [m.name for m in read_live_manifests(scene.runs, PATHS)] == [FIRST]
    assert run_trial(clone_of(job(scene), generation=2), Study()).state is State.SUCCEEDED


def test_a_clone_copies_once(scene: Scene) -> None:
    donor_at_4(scene)
    spec = job(scene)
    begin(scene.runs, clone_of(spec))
    begin(DyingStore(scene.runs, 0), clone_of(spec))
    run_trial(clone_of(spec), Study({8: Verdict.PAUSE}))
    # As retention does in the end; nor does it need the donor any more.
    scene.runs.delete([head.key for head in scene.runs.list(PATHS.checkpoint(FIRST))])
    begin(DyingStore(scene.runs, 0), clone_of(spec))
    scene.runs.delete([head.key for head in scene.runs.list(DONOR + "/")])
    assert run_trial(clone_of(spec), Study()).state is State.SUCCEEDED


def refused(outcome: Outcome, state: State) -> str:
    assert outcome.state is state
    assert outcome.failure is not None
    return outcome.failure.problems[0][0]


@pytest.mark.parametrize(
    ("parts", "group"),
    [
        ({"data": {"seed": 9}}, "data_order"),
        ({"batching": {"global_batch_size": 4}}, "data_order"),
        ({"task": {"max_tokens": 30}}, "architecture"),
    ],
)
def test_a_clone_of_another_model_or_order_is_refused(
    scene: Scene, parts: dict[str, Any], group: str
) -> None:
    donor_at_4(scene)
    outcome = run_trial(clone_of(job(scene, **parts)), Study())
    assert f"cannot go on from {DONOR}: {group} of its job" in refused(outcome, State.FAILED_SPEC)
    assert list(scene.runs.list(PATHS.attempts)) == []


def test_a_donor_without_that_checkpoint_is_told(scene: Scene) -> None:
    donor_at_4(scene)
    outcome = run_trial(clone_of(job(scene), donor=DonorCheckpoint(DONOR, 3)), Study())
    assert "no such checkpoint any more" in refused(outcome, State.FAILED_INFRA)


@pytest.mark.parametrize("part", ["optimizer.safetensors", "progress.json"])
def test_a_clone_of_a_damaged_checkpoint_does_not_begin_anew(scene: Scene, part: str) -> None:
    donor_at_4(scene)
    [saved] = [m for m in read_manifests(scene.runs, RunPaths(DONOR)) if m.step == 4]
    damaged = scene.runs_folder / RunPaths(DONOR).checkpoint(saved.name) / part
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    outcome = run_trial(clone_of(job(scene)), Study())
    assert refused(outcome, State.FAILED_INFRA)
    assert all(m.step == 4 for m in read_manifests(scene.runs, PATHS))


def test_a_donor_whose_parts_vanish_meanwhile_leaves_no_clone(scene: Scene) -> None:
    donor_at_4(scene)
    [saved] = [m for m in read_manifests(scene.runs, RunPaths(DONOR)) if m.step == 4]
    scene.runs.delete([RunPaths(DONOR).checkpoint(saved.name) + "optimizer.safetensors"])
    with pytest.raises(ObjectMissing):
        begin(scene.runs, clone_of(job(scene)))
    assert read_manifests(scene.runs, PATHS) == []


def test_a_clone_begins_in_an_object_store(scene: Scene, s3_store: Store) -> None:
    spec = job(scene).model_copy(
        update={"store": job(scene).store.model_copy(update={"uri": s3_store.uri})}
    )
    run_trial(trial_of(spec, DONOR), Study({4: Verdict.PAUSE}))
    assert run_trial(clone_of(spec), Study()).state is State.SUCCEEDED
    run_trial(trial_of(spec, DONOR), Study())
    assert final_weights(s3_store, CLONE) == final_weights(s3_store, DONOR)
