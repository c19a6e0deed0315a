"""A tracker that hangs, fails or is slow costs its run nothing but a warning."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from cluster.storage import Store
from jobs.record import RunPaths, Source
from tests.ranks import assignment_of
from tests.scene import Scene
from trainers import telemetry as telemetry_module
from trainers import worker
from trainers.assignment import Assignment, DonorCheckpoint, TrialPlan
from trainers.telemetry import Telemetry
from trainers.tracking import feeds
from trainers.tracking.feeds import Feed, close_all
from trainers.tracking.tracker import Ended, Parameters, Point, Told, TrackedRun

PARAMETERS = Parameters({"optimizer": {"learning_rate": 0.1}})
ENDING = Ended("SUCCEEDED", 0, 4)


@dataclass
class Heard:
    """A tracker that keeps what it is told, and refuses as often as it is to."""

    told: list[Told] = field(default_factory=list)
    refusals: int = 0
    poison: float | None = None
    """A value that is never taken."""
    is_closed: bool = False

    def _hear(self, told: Sequence[Told]) -> None:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("nobody is there")
        self.told += told

    def describe(self, parameters: Parameters) -> None:
        self._hear([parameters])

    def log(self, points: Sequence[Point]) -> None:
        if any(self.poison in point.values.values() for point in points):
            raise ValueError("bad value")
        self._hear(points)

    def end(self, ended: Ended) -> None:
        self._hear([ended])

    def close(self) -> None:
        self.is_closed = True


class Hangs:
    """A tracker whose every call waits until the test ends."""

    def __init__(self, until: threading.Event) -> None:
        until.wait(60)

    def describe(self, parameters: Parameters) -> None: ...

    def log(self, points: Sequence[Point]) -> None: ...

    def end(self, ended: Ended) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "END_SECONDS", 5.0)
    monkeypatch.setattr(feeds, "_away", set())


def point(step: int, value: float = 0.5) -> Point:
    return Point(step, 1.0, {"train/loss": value})


def test_a_tracker_is_told_everything_in_order() -> None:
    heard, warnings = Heard(), list[str]()
    feed = Feed("X", lambda: heard, warn=warnings.append)
    told = [PARAMETERS, *(point(step) for step in range(250)), ENDING]
    for each in told:
        feed.put(each)
    feed.close()
    assert heard.told == told
    assert heard.is_closed
    assert warnings == []


def test_what_was_refused_is_told_again_and_the_refusal_is_said_once() -> None:
    heard, warnings = Heard(refusals=2), list[str]()
    feed = Feed("X", lambda: heard, warn=warnings.append, turn_seconds=0.01)
    for step in range(5):
        feed.put(point(step))
    deadline = threading.Event()
    while len(heard.told) < 5:
        assert not deadline.wait(0.02)
    feed.close()
    assert heard.told == [point(step) for step in range(5)]
    [warning] = warnings
    assert warning == (
        "X takes nothing at present: ConnectionError: nobody is there. The run goes on without it"
    )


def test_what_is_refused_again_and_again_is_given_up_and_counted() -> None:
    heard, warnings = Heard(poison=666.0), list[str]()
    feed = Feed("X", lambda: heard, warn=warnings.append, turn_seconds=0.001)
    feed.put(point(0, 666.0))
    feed.put(PARAMETERS)
    while not heard.told:
        threading.Event().wait(0.02)
    feed.close()
    assert heard.told == [PARAMETERS]
    assert warnings[1:] == ["X lacks 1 entries that it did not take"]


def test_the_oldest_goes_where_too_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "MOST_WAITING", 3)
    opened, heard, warnings = threading.Event(), Heard(), list[str]()

    def open_late() -> Heard:
        opened.wait(30)
        return heard

    feed = Feed("X", open_late, warn=warnings.append)
    for step in range(5):
        feed.put(point(step))
    opened.set()
    feed.close()
    assert heard.told == [point(2), point(3), point(4)]
    assert warnings == ["X lacks 2 entries that it did not take"]


def test_a_package_that_is_missing_is_said_and_no_more_is_tried() -> None:
    warnings = list[str]()

    def absent() -> Heard:
        raise ModuleNotFoundError("No module named 'x'")

    feed = Feed("X", absent, warn=warnings.append)
    feed.put(PARAMETERS)
    feed.close()
    assert warnings == [
        "X is not told of this run: No module named 'x'. The run goes on without it"
    ]


def test_a_tracker_that_hangs_is_waited_for_once_in_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeds, "END_SECONDS", 0.05)
    ends, warnings = threading.Event(), list[str]()
    try:
        first = Feed("X", lambda: Hangs(ends), warn=warnings.append)
        close_all([first])
        assert feeds._away == {"X"}
        assert "has not taken everything within 0.05 s" in warnings[0]
        monkeypatch.setattr(feeds, "END_SECONDS", 1e9)
        close_all([Feed("X", lambda: Hangs(ends), warn=warnings.append)])
        assert len(warnings) == 2
    finally:
        ends.set()
    monkeypatch.setattr(feeds, "AWAY_SECONDS", 30.0)
    Feed("X", Heard, warn=warnings.append).close()
    assert feeds._away == set()


def test_a_run_whose_tracker_hangs_ends_as_ever_and_says_so(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "END_SECONDS", 0.2)
    ends = threading.Event()

    def hanging(assignment: Assignment, store: Store, *, attempt: int, warn: feeds.Warn) -> object:
        return [Feed("X", lambda: Hangs(ends), warn=warn)]

    monkeypatch.setattr(worker, "start_feeds", hanging)
    try:
        outcome = scene.train(scene.job())
    finally:
        ends.set()
    assert (outcome.state.value, outcome.step) == ("SUCCEEDED", 10)
    events = [path.read_text() for path in scene.run_folder().glob("events/**/*.jsonl")]
    assert sum(text.count("X has not taken everything") for text in events) == 1


def test_metrics_go_to_trackers_by_the_names_of_their_lines(local_store: Store) -> None:
    heard = Heard()
    with Telemetry(local_store, RunPaths("run"), Source(2, 0)) as telemetry:
        telemetry.with_trackers([Feed("X", lambda: heard, warn=telemetry.warn)])
        telemetry.metrics({"kind": "train", "step": 1, "loss": 0.5, "seconds": {"start": 1.0}})
        telemetry.metrics({"kind": "skipped", "step": 2, "norm": "inf"})
        telemetry.metrics(
            {"kind": "evaluation", "split": "validation", "step": 3, "metrics": {"f1": 0.25}}
        )
    points = [each for each in heard.told if isinstance(each, Point)]
    assert [(p.step, p.values) for p in points] == [
        (1, {"train/loss": 0.5}),
        (3, {"validation/f1": 0.25}),
    ]


def test_secrets_of_trackers_are_in_no_line() -> None:
    assert {"WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"} <= set(
        telemetry_module._SECRETS
    )


def test_a_trial_is_tracked_below_its_study_and_a_clone_names_its_donor(scene: Scene) -> None:
    plain = TrackedRun.of(assignment_of(scene.job(), "run"))
    assert plain.labels == {
        "run_id": "run", "uri": f"{scene.runs_folder}/run", "job": "tiny", "kind": "run",
    }  # fmt: skip
    donor = DonorCheckpoint("study/trials/0003", 40)
    plan = TrialPlan("study", "validation/loss", "min", donor=donor)
    clone = TrackedRun.of(Assignment(scene.job(), "study/trials/0007", 1, 0, trial=plan))
    assert clone.study is not None
    assert clone.study.uri == f"{scene.runs_folder}/study"
    assert clone.labels == {
        "run_id": "study/trials/0007", "uri": f"{scene.runs_folder}/study/trials/0007",
        "job": "tiny", "kind": "trial", "study": "study", "donor": "study/trials/0003 at step 40",
    }  # fmt: skip
