"""A run over an object store: killed, resumed, the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.embedded import EmbeddedStore
from cluster.storage import Store
from jobs.record import RunPaths, State
from jobs.spec import JobSpec
from tests.evidence import final_weights
from tests.faulty_proxy import proxy_to
from tests.ranks import Kill, assignment_of, run_ranks
from tests.scene import Scene
from tests.tiny import tiny_job, tiny_model, tiny_reviews
from trainers.records import read_attempts, read_manifests


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_in_an_object_store_is_killed_and_resumed_to_the_same_bits(
    s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    model = s3_store.within("model")
    for path in tiny_model(tmp_path / "model", hidden=64).iterdir():
        model.upload(path.name, path)
    data = tiny_reviews(f"{s3_store.uri}/data", rows=40, rows_per_group=7, held_out=11)
    runs = s3_store.within("runs")
    spec: JobSpec = tiny_job(
        model.uri,
        {**data, "lanes": 2},
        runs.uri,
        workers={"count": 2, "strategy": strategy},
        checkpoint={"every_steps": 3},
        tracking=["tensorboard"],
    )
    for run_id in ("calm", "killed"):
        monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / run_id))
        if run_id == "killed":
            run_ranks(assignment_of(spec, run_id), world_size=2, kill=Kill("step", 7))
        outcome = run_ranks(
            assignment_of(spec, run_id, generation=1 if run_id == "calm" else 2), world_size=2
        )
        assert outcome is not None
        assert outcome.state is State.SUCCEEDED
    restored = read_attempts(runs, RunPaths("killed"))[-1].restored_step
    assert restored is not None
    assert 0 < restored < 7
    assert final_weights(runs, "killed") == final_weights(runs, "calm")
    assert list(runs.list("killed/tensorboard/"))


def test_a_run_is_kept_in_a_store_that_refuses_conditional_writes(
    object_store: EmbeddedStore, s3_store: Store, scene: Scene
) -> None:
    with proxy_to(object_store.endpoint_url) as poor:
        for header in ("If-Match", "If-None-Match"):
            poor.fail("not implemented", "PUT", times=10**9, header=header)
        at_poor = {"uri": s3_store.uri, "access": {"endpoint_url": poor.url}}
        spec = tiny_job(
            scene.model, scene.data, "", store=at_poor, store_lease="none", train={"epochs": 1}
        )
        assert scene.train(spec).state is State.SUCCEEDED
    assert poor.injected["not implemented"] == 0
    assert [m.step for m in read_manifests(s3_store, RunPaths("run"))] == [5]
