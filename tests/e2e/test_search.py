"""A study on Ray and S3: its slots and its driver die, it is stopped and extended, and its model is
that of its best trial."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.storage import Store, join_uri
from jobs.record import RunPaths, State
from jobs.runs import RunReader
from jobs.study.events import Asked, Decided, Extended, Lost, Reported
from jobs.study.log import read_events
from jobs.study.trials import Trials
from tests.e2e.commands import is_actor, shoal, tree_of, wait_for, wait_until_none_is_left
from tests.tiny import tiny_model, tiny_reviews, tiny_tree

pytestmark = pytest.mark.timeout(900)

SEARCH: dict[str, Any] = {
    "metric": "validation/loss",
    "space": {
        "optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]},
        "model.dropout": {"uniform": [0.0, 0.4]},
    },
    "algorithm": "tpe",
    "scheduler": {"kind": "asha", "reduction_factor": 2, "first": 0.25},
    "trials": 8,
    "finalists": {"count": 2, "seeds": 1},
}


@pytest.fixture
def scene(tmp_path: Path, s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """job.yaml in a folder; data and runs in the object store."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = tiny_reviews(join_uri(s3_store.uri, "data"), rows=320, rows_per_group=64, held_out=90)
    tree = tiny_tree(
        tiny_model(tmp_path / "model"),
        {**data, "seed": 3},
        join_uri(s3_store.uri, "runs"),
        train={"epochs": 4},
        checkpoint={"every_steps": 20},
        search=SEARCH,
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    yield tmp_path
    wait_until_none_is_left(tmp_path / "cache")


def test_a_study_survives_dead_slots_a_dead_driver_and_a_stop_and_is_extended(
    scene: Path, s3_store: Store
) -> None:
    runs, paths = s3_store.within("runs"), RunPaths("study")
    log = RunReader(runs, "study")

    def reports() -> int:
        return sum(isinstance(event, Reported) for event in log.study_events())

    run = shoal("run", "job.yaml", "--run-id", "study", folder=scene)
    wait_for(lambda: reports() >= 2, run)
    next(p for p in tree_of(run) if is_actor(p, "Slot", "ResourceTrainable")).kill()
    wait_for(lambda: any(isinstance(e, Lost) for e in log.study_events()), run)
    before = reports()
    wait_for(lambda: reports() >= before + 2, run)
    for process in tree_of(run):
        process.kill()
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 3, output

    before = reports()
    run = shoal("resume", join_uri(runs.uri, "study"), folder=scene)
    wait_for(lambda: reports() >= before + 2, run)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 130, output
    result = RunReader(runs, "study").result()
    assert result is not None
    assert result.state is State.STOPPED

    early = [e.trial for e in read_events(runs, paths) if isinstance(e, Asked)]
    narrow = "{optimizer.learning_rate: {loguniform: [2.0e-3, 8.0e-3]}}"
    uri = join_uri(runs.uri, "study")
    run = shoal("extend", uri, "--trials", "10", "--space", narrow, folder=scene)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output

    reader = RunReader(runs, "study")
    result, search = reader.result(), reader.spec().search
    assert result is not None
    assert result.outcome is not None
    assert search is not None
    events = read_events(runs, paths)
    trials = Trials(search, events)
    assert trials.configurations == 10
    assert {t.status for t in trials.by_number.values()} <= {"stopped", "finished"}
    finished = [e.trial for e in events if isinstance(e, Decided) and e.decision == "finish"]
    assert len(finished) == len(set(finished))
    asked = [e.trial for e in events if isinstance(e, Asked)]
    assert asked == list(range(len(asked)))
    # Each trial reported each of its evaluations once, whatever died.
    told = [(e.trial, e.step) for e in events if isinstance(e, Reported)]
    assert len(told) == len(set(told))

    winner = trials.winner()
    assert winner is not None
    assert winner.purpose == "finalist"
    assert result.outcome.trial == winner.number
    assert result.best_checkpoint is not None
    assert result.best_checkpoint.startswith(f"trials/{winner.number:04d}/checkpoints/step-")
    assert result.outcome.test is not None
    assert result.outcome.test["metrics"]["loss"] == pytest.approx(winner.best, abs=0.3)
    assert runs.head(f"study/{result.best_checkpoint}/model/model.safetensors") is not None
    # The metric of each report is what the trial's own folder says.
    own = RunReader(runs, paths.trial(winner.number).run_id)
    losses = [line["metrics"]["loss"] for line in own.metrics() if line["kind"] == "evaluation"]
    assert min(losses) == winner.best

    # What came after the extension is of its space.
    assert [e.trials for e in events if isinstance(e, Extended)] == [10]
    later = [e for e in events if isinstance(e, Asked) and e.purpose == "search"]
    drawn = [list(e.values) for e in later if e.trial not in early]
    assert drawn
    assert all(keys == ["optimizer.learning_rate"] for keys in drawn)
    # Trials that cannot win have no checkpoints any more; the winner's are the study's.
    heads = [head.key for head in runs.list(paths.trials) if "/checkpoints/" in head.key]
    have = {int(key.split("/")[2]) for key in heads}
    assert winner.number in have
    assert have < set(trials.by_number)
