"""Starting runs: what is refused before anything is written, and how requests are numbered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from synthetic import running, succeeded

from cluster.process import identify
from cluster.storage import Store, open_store, split_uri
from jobs import submit
from jobs.errors import SpecError
from jobs.retention import delete_run
from jobs.runs import RunReader
from jobs.submit import request_stop, resume_run, submit_job

CHANGE = ("workers.count=1",)


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs for which a driver would have been started; each records the changes, as the real one
    does."""
    uris: list[str] = []

    def start(uri: str, *, overrides: Sequence[str] = (), **_: Any) -> None:
        uris.append(uri)
        parent, run_id = split_uri(uri)
        submit.record_changes(open_store(parent), run_id, overrides)

    monkeypatch.setattr(submit, "start_driver", start)
    monkeypatch.setattr(submit, "require_place", lambda *_, **__: None)
    return uris


def my_process() -> dict[str, Any]:
    me = identify()
    return {"host": me.host, "boot": me.boot, "pid": me.pid, "started": me.started}


@pytest.mark.parametrize(
    ("holder", "silent_seconds"),
    [({}, 1.0), (my_process(), 1.0), (my_process(), 30.0)],
    ids=["elsewhere, heard of", "here", "here, slow to renew"],
)
def test_a_run_whose_driver_lives_is_not_resumed_and_nothing_is_recorded(
    local_store: Store, started: list[str], holder: dict[str, Any], silent_seconds: float
) -> None:
    made = running(local_store, now=time.time())
    made.lease(renewed_at=time.time() - silent_seconds, **holder)
    before = [head.key for head in local_store.list()]
    with pytest.raises(SpecError) as caught:
        resume_run(local_store, made.run_id, overrides=CHANGE, foreground=False)
    uri = RunReader(local_store, made.run_id).uri
    (problem,) = caught.value.problems
    pid, host = holder.get("pid", 4242), holder.get("host", "node-7")
    assert f"{uri} is driven by process {pid} on {host}" in problem.message
    assert f"shoal stop {uri} --wait" in str(problem.hint)
    assert f"shoal watch {uri}" in str(problem.hint)
    assert f"end it on {host}: kill -9 {pid}" in str(problem.hint)
    assert [head.key for head in local_store.list()] == before
    assert started == []


@pytest.mark.parametrize(
    ("holder", "silent_seconds"),
    [
        (my_process() | {"pid": 2**22 + 1}, 1.0),
        (my_process(), 1000.0),
        ({}, 20.0),
        ({"released": True}, 1.0),
    ],
    ids=["dead here", "expired long ago", "elsewhere, silent", "given back"],
)
def test_a_run_whose_driver_may_be_gone_is_resumed(
    local_store: Store, started: list[str], holder: dict[str, Any], silent_seconds: float
) -> None:
    made = running(local_store, now=time.time())
    made.lease(renewed_at=time.time() - silent_seconds, **holder)
    resume_run(local_store, made.run_id, overrides=CHANGE, foreground=False)
    reader = RunReader(local_store, made.run_id)
    assert started == [reader.uri]
    assert reader.spec().workers.count == 1


def test_no_run_takes_the_name_of_one_that_is_being_deleted(
    local_store: Store, started: list[str]
) -> None:
    made = succeeded(local_store)
    delete_run(local_store, made.run_id, tell=pytest.fail)
    local_store.write(made.paths.deleting, b"{}")  # as where the deletion was cut off at its end
    spec = made.spec.model_copy(
        update={"store": made.spec.store.model_copy(update={"uri": local_store.uri})}
    )
    with pytest.raises(SpecError, match="is being deleted"):
        submit_job(spec, run_id=made.run_id, foreground=False)
    assert [head.key for head in local_store.list()] == [made.paths.deleting]
    local_store.delete([made.paths.deleting])
    submit_job(spec, run_id=made.run_id, foreground=False)
    assert len(started) == 1


def test_requests_and_changes_are_numbered_in_their_order(local_store: Store) -> None:
    made = succeeded(local_store)
    for epochs in (4, 5):
        resume_run(local_store, made.run_id, overrides=[f"train.epochs={epochs}"], foreground=False)
        request_stop(local_store, made.run_id, by="test")
    assert RunReader(local_store, made.run_id).spec().train.epochs == 5
    paths = made.paths
    expected = [make(n) for make in (paths.amendment, paths.control_request) for n in (1, 2)]
    keys = [h.key for f in (paths.amendments, paths.control) for h in local_store.list(f)]
    assert keys == expected
