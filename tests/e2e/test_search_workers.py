"""Studies on Ray whose trials have several workers, and whose cluster grows."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.storage import Store, join_uri
from jobs.record import RunPaths
from jobs.runs import RunReader
from jobs.study.events import Lost, Started
from jobs.study.log import read_events
from jobs.study.trials import Trials
from tests.e2e.commands import is_actor, shoal, tree_of, wait_for, wait_until_none_is_left
from tests.faulty_proxy import proxy_to
from tests.ranks import assignment_of, run_ranks
from tests.raylets import raylets
from tests.tiny import tiny_model, tiny_reviews, tiny_tree

pytestmark = pytest.mark.timeout(900)

SEARCH: dict[str, Any] = {
    "metric": "validation/loss",
    "space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}},
    "algorithm": "random",
    "baseline": False,
    "finalists": None,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of the command; nothing of what it has started is left at the end."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield tmp_path
    # But for what ranks were forked from, which stays for others.
    own = {process.pid for process in psutil.Process().children(recursive=True)}
    wait_until_none_is_left(tmp_path / "cache", but=own)


def write_job(
    folder: Path, store: Store, *, search: dict[str, Any], rows: int = 320, **parts: Any
) -> None:
    data = tiny_reviews(join_uri(store.uri, "data"), rows=rows, rows_per_group=64, held_out=90)
    del data["test"]
    runs = join_uri(store.uri, "runs")
    model = tiny_model(folder / "model")
    tree = tiny_tree(model, {**data, "seed": 3}, runs, search={**SEARCH, **search}, **parts)
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))


def messages(reader: RunReader) -> list[str]:
    return [str(event["message"]) for event in reader.events()]


def evaluations(runs: Store, run_id: str) -> dict[int, dict[str, float]]:
    lines = RunReader(runs, run_id).metrics()
    return {line["step"]: line["metrics"] for line in lines if line["kind"] == "evaluation"}


def test_trials_with_two_workers_survive_one_and_are_trained_as_they_would_be_alone(
    folder: Path, s3_store: Store
) -> None:
    halving = {"kind": "asha", "reduction_factor": 2, "first": 0.5}
    write_job(
        folder,
        s3_store,
        search={"trials": 2, "scheduler": halving},
        train={"epochs": 2},
        workers={"count": 2},
    )
    runs, paths = s3_store.within("runs"), RunPaths("study")
    run = shoal("run", "job.yaml", "--run-id", "study", folder=folder)
    # The attempt is recorded before the model is read: there is all of the training ahead.
    wait_for(lambda: runs.head(paths.trial(0).attempt(1)) is not None, run)
    next(p for p in tree_of(run) if is_actor(p, "RayTrainWorker")).kill()
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output

    events = read_events(runs, paths)
    search = RunReader(runs, "study").spec().search
    assert search is not None
    trials = Trials(search, events)
    assert len(trials) == 2
    assert {trial.status for trial in trials.by_number.values()} <= {"stopped", "finished"}
    # The trial's own retries were not needed.
    assert not any(isinstance(event, Lost) for event in events)
    assert runs.head(paths.trial(0).attempt(2)) is not None
    told = [text for text in messages(RunReader(runs, "study")) if text.startswith("trial 0: ")]
    assert len(told) == 1, told
    assert told[0].endswith("the workers are started again from the last checkpoint")

    for trial in trials.by_number.values():
        own = paths.trial(trial.number).run_id
        found = evaluations(runs, own)
        assert len(found) == round(2 * trial.fraction)
        alone = f"alone-{trial.number}"
        run_ranks(assignment_of(RunReader(runs, own).spec(), alone), world_size=2)
        calm = evaluations(runs, alone)
        assert found == {step: calm[step] for step in found}


def test_a_cluster_that_grows_gets_more_slots(
    folder: Path, s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(
        folder,
        s3_store,
        search={"trials": 4, "scheduler": None, "max_concurrent": 3},
        train={"epochs": 100, "log_every_steps": 100},
        checkpoint={"every_steps": 5},
    )
    reader = RunReader(s3_store.within("runs"), "study")

    def slots() -> set[str]:
        return {event.slot for event in reader.study_events() if isinstance(event, Started)}

    with proxy_to(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy:
        # Trials that mostly wait for the store take as long, and leave the others the cores.
        proxy.fail("late", "PUT", "checkpoints/", times=10**9)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        with raylets(cpus=1) as cluster:
            run = shoal("run", "job.yaml", "--run-id", "study", folder=folder)
            one, two = "1 of 3 slots: room for 1", "2 of 3 slots: room for 2"
            wait_for(lambda: any(one in text for text in messages(reader)), run)
            assert len(slots()) == 1
            cluster.add(cpus=1)
            wait_for(lambda: len(slots()) == 2, run)
            wait_for(lambda: any(two in text for text in messages(reader)), run)
            run.send_signal(signal.SIGINT)
            output, _ = run.communicate(timeout=300)
            assert run.returncode == 130, output
