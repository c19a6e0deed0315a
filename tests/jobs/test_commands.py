"""The commands over real run folders: what they print, as text and as JSON, and refuse."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from synthetic import START, running, succeeded
from test_cli import run_main

from cluster.embedded import EmbeddedStore
from cluster.storage import Store
from jobs import situation
from jobs.record import CheckpointName, Failure, Manifest, RunPaths, State
from tests.faulty_proxy import Kind, proxy_to
from tests.killed_writer import kill_writer_of

RUN = "sentiment-a1b2c3"


class Shell:
    """Runs commands against one store and takes what they print."""

    def __init__(self, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
        self.store = store
        self._capsys = capsys

    def run(self, *arguments: str, code: int = 0) -> str:
        """What the command printed to stdout; its errors are in `error`."""
        self._capsys.readouterr()
        ended = run_main(*arguments)
        shown = self._capsys.readouterr()
        self.error = shown.err
        assert ended == code, shown.err
        return shown.out

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code))


@pytest.fixture
def shell(
    local_store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    monkeypatch.setenv("SHOAL_STORE", local_store.uri)
    return Shell(local_store, capsys)


# ------------------------------------------------------------------------------------ list, status


def test_list_shows_each_run_with_state_step_and_metric(shell: Shell) -> None:
    succeeded(shell.store)
    running(shell.store, now=time.time(), run_id="live-000001")
    shell.store.write(RunPaths("broken-1").spec, b"{")
    shell.store.write("notes/readme.txt", b"no run")
    shown = shell.run("list").splitlines()
    assert [line.split()[:3] for line in shown[1:]] == [
        ["broken-1", "UNREADABLE", "-"],
        ["live-000001", "RUNNING", "120/300"],
        [RUN, "SUCCEEDED", "300/300"],
    ]
    runs = {run["run_id"]: run for run in shell.json("list")["runs"]}
    assert runs[RUN]["metric"] == "test/accuracy"
    assert runs["live-000001"]["metric"] == "validation/f1"
    assert runs["broken-1"]["state"] is None


def test_list_of_an_empty_store_is_empty(shell: Shell) -> None:
    assert shell.json("list") == {"runs": []}


def test_status_tells_state_progress_and_where_the_time_went(shell: Shell) -> None:
    running(shell.store, now=time.time())
    shown = shell.run("status", RUN)
    assert shown.startswith(f"{RUN}  RUNNING  training\n")
    assert "step 120 of 300 (40%), epoch 1.20 of 3, about 1m" in shown
    assert "2 workers, from the start" in shown
    assert "compute 47s (66%)" in shown
    assert "start 10s (15%)" in shown
    assert "were lost" not in shown
    assert not any(line.endswith(" ") for line in shown.splitlines())


def test_status_tells_which_time_was_lost(shell: Shell) -> None:
    succeeded(shell.store)
    shown = " ".join(shell.run("status", RUN).split())
    assert "recovery 18s (9%)" in shown
    assert "; 12s of compute were lost: steps that were done again" in shown


def test_status_in_prometheus_format_is_all_of_stdout(shell: Shell) -> None:
    running(shell.store, now=time.time())
    shown = shell.run("status", RUN, "--prometheus")
    assert f'shoal_step{{run="{RUN}"}} 120.0\n' in shown
    assert f'shoal_seconds_total{{purpose="compute",run="{RUN}"}} 46.8\n' in shown
    assert all(
        line.startswith(("# HELP shoal_", "# TYPE shoal_", "shoal_")) for line in shown.splitlines()
    )
    assert shown.endswith("\n")
    shell.run("status", RUN, "--prometheus", "--json", code=2)
    assert "--prometheus with --json has no effect here" in shell.error


def test_status_json_has_the_numbers(shell: Shell) -> None:
    succeeded(shell.store)
    shown = shell.json("status", RUN)
    assert (shown["state"], shown["step"], shown["progress"]) == ("SUCCEEDED", 300, 1.0)
    assert shown["best"]["step"] in shown["checkpoints"]
    assert shown["tested_on"] == "test"
    assert shown["test"]["accuracy"] > shown["before"]["accuracy"]
    assert [a["restored_step"] for a in shown["attempts"]] == [None, 100]
    assert shown["last_evaluation"]["split"] == "validation"


def test_status_of_a_run_whose_driver_is_gone_says_how_to_go_on(shell: Shell) -> None:
    running(shell.store, now=time.time() - 3600)
    shown = shell.run("status", RUN)
    assert "FAILED_INFRA  its driver is gone (process 4242 on node-7" in shown
    assert "hint: shoal resume " in shown
    assert f"/{RUN}\n" in shown
    assert "ended without a word (killed)" in shown


def test_a_run_is_found_by_its_uri_too(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    made = succeeded(shell.store)
    monkeypatch.delenv("SHOAL_STORE")
    uri = f"{shell.store.uri}/{made.run_id}"
    assert shell.json("status", uri)["run_id"] == RUN
    shell.run("status", uri, "--store", "s3://other/runs", code=2)
    assert "--store s3://other/runs has no effect" in shell.error
    assert shell.json("status", RUN, "--store", shell.store.uri)["run_id"] == RUN


def test_commands_work_on_s3(
    s3_store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeded(s3_store)
    monkeypatch.setenv("SHOAL_STORE", s3_store.uri)
    shell = Shell(s3_store, capsys)
    assert shell.json("list")["runs"][0]["uri"] == f"{s3_store.uri}/{RUN}"
    assert shell.json("status", RUN)["state"] == "SUCCEEDED"
    assert len(shell.json("checkpoints", f"{s3_store.uri}/{RUN}", "--verify")["checkpoints"]) == 6
    load = shell.json("report", RUN)["commands"]
    assert load["download"].startswith(f"aws s3 cp --recursive {s3_store.uri}/{RUN}/checkpoints/")
    shell.run("delete", RUN, "--yes")
    assert list(s3_store.list()) == []


@pytest.mark.parametrize("command", ["status", "logs", "watch", "checkpoints", "report", "delete"])
def test_a_run_that_is_not_there_is_the_users_error(shell: Shell, command: str) -> None:
    succeeded(shell.store)
    assert shell.run(command, "sentiment-a1b2c4", code=2) == ""
    assert "did you mean sentiment-a1b2c3?" in shell.error


@pytest.mark.parametrize("run", ["..", ".hidden", ""])
def test_what_cannot_be_a_run_id_is_refused(shell: Shell, run: str) -> None:
    shell.run("status", run, code=2)
    assert shell.error.startswith("error:")
    assert "Traceback" not in shell.error


# -------------------------------------------------------------------------------------------- logs


def test_logs_are_merged_by_time_over_driver_and_ranks(shell: Shell) -> None:
    succeeded(shell.store)
    messages = [line.partition(" ")[2] for line in shell.run("logs", RUN).splitlines()]
    assert [m.split(" ", 1)[1] for m in messages] == [
        "driver  the driver starts",
        "rank 0  rank 0 loads the model",
        "rank 1  rank 1 loads the model",
        "rank 1  warning: a shard was read twice",
        "driver  error: rank 1 died",
    ]


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--rank", "1"], ["rank 1 loads the model", "a shard was read twice"]),
        (["--attempt", "2"], []),
        (["--level", "warning"], ["a shard was read twice", "rank 1 died"]),
        (["--rank", "0", "--level", "debug"], ["rank 0 loads the model", "bucket layout fixed"]),
        (["--since", "2026-09-21T14:13:24+00:00"], ["rank 1 died"]),
        (["--since", "10m"], []),
        (["--follow", "--level", "error"], ["rank 1 died"]),
    ],
)
def test_logs_are_chosen_by_rank_attempt_level_and_time(
    shell: Shell, options: list[str], messages: list[str]
) -> None:
    succeeded(shell.store)
    shown = shell.run("logs", RUN, *options, "--json")
    lines = (
        [json.loads(line) for line in shown.splitlines()]
        if "--follow" in options
        else json.loads(shown)["lines"]
    )
    assert [line["message"] for line in lines] == messages


def test_a_time_that_is_none_says_what_to_write(shell: Shell) -> None:
    shell.run("logs", RUN, "--since", "yesterday", code=2)
    assert "write an age such as 10m" in shell.error


# ------------------------------------------------------------------------------------------- watch


def test_watch_prints_plain_lines_by_time_where_there_is_no_terminal(shell: Shell) -> None:
    succeeded(shell.store)
    assert shell.run("watch", RUN) == ""
    lines = shell.error.splitlines()
    clocks = [line.split()[0] for line in lines[:-1]]
    assert clocks == sorted(clocks)
    assert "validation at step 50: loss 0.4016, accuracy 0.77" in shell.error
    assert "step 300/300 (100%) loss" in shell.error
    assert lines[-1] == f"{RUN}  SUCCEEDED  all epochs are done"


def test_watch_exits_as_the_run_did(shell: Shell) -> None:
    made = running(shell.store, now=START)
    failure = Failure(state=State.FAILED_USER, problems=(("the loss is not finite", None),))
    made.finish(State.FAILED_USER, attempt=1, step=120, time=START, failure=failure)
    shell.run("watch", RUN, code=1)
    assert "FAILED_USER  the loss is not finite" in shell.error


# ------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_marks_best_and_last(shell: Shell) -> None:
    succeeded(shell.store)
    found = shell.json("checkpoints", RUN)["checkpoints"]
    assert [c["step"] for c in found] == [50, 100, 150, 200, 250, 300]
    assert [c["step"] for c in found if c["is_last"]] == [300]
    assert len([c for c in found if c["is_best"]]) == 1
    assert {c["is_whole"] for c in found} == {None}
    assert "best" in shell.run("checkpoints", RUN)


def test_a_checkpoint_in_parts_is_marked_and_the_report_says_how_to_make_its_model(
    shell: Shell,
) -> None:
    made = succeeded(shell.store)
    best = shell.json("status", RUN)["best"]["step"]
    for head in list(shell.store.list(made.paths.checkpoints)):
        if head.key.endswith("/manifest.json") and f"-{best:08d}-" in head.key:
            held = Manifest.model_validate_json(shell.store.read(head.key))
            cut = tuple(p for p in held.parts if p.name != "model/model.safetensors")
            shell.store.write(head.key, held.model_copy(update={"parts": cut}).to_bytes())
    found = shell.json("checkpoints", RUN)["checkpoints"]
    assert [c["step"] for c in found if not c["has_model"]] == [best]
    assert "best, in parts" in shell.run("checkpoints", RUN)
    commands = shell.json("report", RUN)["commands"]
    assert commands["download"] == f"shoal checkpoints {shell.store.uri}/{RUN} --consolidate {best}"
    assert f"{shell.store.uri}/{RUN}/models/step-{best:08d}'" in commands["load"]


def test_verify_finds_changed_short_and_missing_parts(shell: Shell) -> None:
    made = succeeded(shell.store)
    part = "model/model.safetensors"
    data = shell.store.read(made.paths.checkpoint(CheckpointName(50, 1)) + part)
    shell.store.write(made.paths.checkpoint(CheckpointName(50, 1)) + part, b"X" + data[1:])
    shell.store.write(made.paths.checkpoint(CheckpointName(100, 1)) + part, data[:-1])
    shell.store.delete([made.paths.checkpoint(CheckpointName(150, 2)) + part])
    found = shell.json("checkpoints", RUN, "--verify", code=1)["checkpoints"]
    assert {c["step"]: c["faults"] for c in found if not c["is_whole"]} == {
        50: [f"{part} has another sha256"],
        100: [f"{part} has 511 bytes, not 512"],
        150: [f"{part} is missing"],
    }


def damage(store: Store, key: str) -> None:
    """Flips one bit in the middle of an object."""
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 4
    store.write(key, bytes(data))


def test_a_damaged_manifest_is_told_and_fails_verify(shell: Shell) -> None:
    made = succeeded(shell.store)
    key = made.paths.manifest(CheckpointName(300, 2))
    damage(shell.store, key)
    told = f"{shell.store.uri}/{key} is not a readable Manifest"
    shown = shell.json("checkpoints", RUN, "--verify", code=1)
    assert shown["problems"] == [told]
    assert [c["step"] for c in shown["checkpoints"]] == [50, 100, 150, 200, 250]
    shell.run("checkpoints", RUN, "--verify", code=1)
    assert shell.error == f"error: {told}\n"
    shell.run("checkpoints", RUN)
    assert shell.error == f"warning: {told}\n"
    assert shell.json("checkpoints", RUN)["problems"] == [told]
    shell.run("checkpoints", RUN, "--consolidate", "50")
    assert shell.error == f"warning: {told}\n"
    shell.run("status", RUN)
    assert shell.error == f"warning: {told}\n"
    assert shell.json("report", RUN)["problems"] == [told]


def test_a_damaged_record_of_an_attempt_is_told_wherever_it_matters(shell: Shell) -> None:
    made = succeeded(shell.store)
    key = made.paths.attempt(2)
    shell.store.write(key, b"garbage")
    told = f"{shell.store.uri}/{key} is not a readable Attempt"
    assert shell.json("list")["runs"][0]["problems"] == [told]
    shell.run("list")
    assert shell.error == f"warning: {told}\n"
    assert shell.json("status", RUN)["problems"] == [told]
    assert shell.json("checkpoints", RUN, "--verify", code=1)["problems"] == [told]


@pytest.mark.parametrize(("times", "is_whole"), [(2, True), (3, False)])
def test_verify_reads_three_times_what_comes_changed(
    s3_store: Store,
    object_store: EmbeddedStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    is_whole: bool,
) -> None:
    made = succeeded(s3_store)
    with proxy_to(object_store.endpoint_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        monkeypatch.setenv("SHOAL_STORE", s3_store.uri)
        shell = Shell(s3_store, capsys)
        part = made.paths.checkpoint(CheckpointName(50, 1)) + "model/model.safetensors"
        proxy.fail("corrupt answer", "GET", part, times=times)
        code = 0 if is_whole else 1
        found = shell.json("checkpoints", RUN, "--verify", code=code)["checkpoints"]
        assert proxy.injected["corrupt answer"] == times
    assert [c["is_whole"] for c in found] == [is_whole, *[True] * 5]


def test_consolidate_makes_the_plain_model_folder_of_any_checkpoint(
    shell: Shell, tmp_path: Path
) -> None:
    made = succeeded(shell.store)
    found = shell.json("checkpoints", RUN, "--consolidate", "50")
    assert found["uri"] == f"{shell.store.uri}/{RUN}/models/step-00000050"
    model = shell.store.within(f"{RUN}/models/step-00000050")
    checkpoint = shell.store.within(made.paths.checkpoint(CheckpointName(50, 1)) + "model")
    names = {head.key for head in checkpoint.list()}
    assert {head.key for head in model.list()} == names
    assert all(model.read(name) == checkpoint.read(name) for name in names)
    assert shell.run("checkpoints", RUN, "--consolidate", "50").strip() == found["uri"]

    place = str(tmp_path / "model")
    assert shell.run("checkpoints", RUN, "--consolidate", "50", "--to", place).strip() == place
    shell.run("checkpoints", RUN, "--consolidate", "50", "--to", place, code=2)
    assert "holds something already" in shell.error
    shell.run("checkpoints", RUN, "--consolidate", "60", code=2)
    assert "those that it has: 50, 100, 150, 200, 250, 300" in shell.error
    shell.run("checkpoints", RUN, "--to", place, code=2)
    assert "add --consolidate STEP" in shell.error
    shell.run("checkpoints", RUN, "--consolidate", "50", "--verify", code=2)

    checkpoint.write("config.json", b"{")
    shell.run("checkpoints", RUN, "--consolidate", "50", code=3)
    assert "model/config.json is damaged" in shell.error
    assert "--verify" in shell.error


# ------------------------------------------------------------------------------------------ delete


def test_delete_refuses_a_run_that_goes_on(shell: Shell) -> None:
    running(shell.store, now=time.time())
    shell.run("delete", RUN, "--yes", code=2)
    assert "goes on: RUNNING" in shell.error
    assert f"{RUN} --wait" in shell.error
    assert shell.json("list")["runs"]


def test_delete_looks_on_before_it_takes_a_silent_driver_for_gone(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(situation, "LOOK_SECONDS", 0.05)
    made = running(shell.store, now=time.time())
    made.lease(renewed_at=time.time() - 600, ttl_seconds=20)
    renewed = threading.Timer(0.5, made.lease, kwargs={"renewed_at": time.time(), "renewals": 10})
    renewed.start()
    shell.run("delete", RUN, "--yes", code=2)
    renewed.join()
    assert "is gone, or the store was away: it is looked at for 20s" in shell.error
    assert f"{RUN} goes on: RUNNING" in shell.error

    made.lease(renewed_at=time.time() - 600, ttl_seconds=0.2)
    shell.run("delete", RUN, "--yes")
    assert list(shell.store.list()) == []


def test_stop_of_a_silent_run_is_not_refused(shell: Shell) -> None:
    running(shell.store, now=time.time()).lease(renewed_at=time.time() - 600)
    shell.run("stop", RUN)
    assert len(list(shell.store.list(RunPaths(RUN).control))) == 1


def test_delete_asks_and_does_nothing_where_nobody_can_answer(shell: Shell) -> None:
    succeeded(shell.store)
    shell.run("delete", RUN, code=2)
    assert "--yes" in shell.error
    assert shell.json("list")["runs"]


def test_delete_leaves_nothing(shell: Shell) -> None:
    succeeded(shell.store)
    shell.run("delete", RUN, "--yes")
    assert list(shell.store.list()) == []


# ---------------------------------------------------------------------------------------------- gc


def test_gc_removes_what_nobody_can_use_and_nothing_else(shell: Shell) -> None:
    made = succeeded(shell.store)
    shell.store.write(
        made.paths.checkpoint(CheckpointName(260, 2)) + "model/model.safetensors", b"half"
    )
    made.checkpoint(1, 130, time=START)  # attempt 2 went on from step 100
    shell.store.write("left-over/checkpoints/step-00000001/part", b"x")
    shell.store.write("left-over/deleting.json", b"{}")
    shell.store.write("foreign/data.csv", b"not ours")
    alive = running(shell.store, now=time.time(), run_id="live-000001")
    shell.store.write(alive.paths.checkpoint(CheckpointName(110, 1)) + "part", b"being written")

    assert shell.json("gc", "--dry-run")["garbage"] == []  # all of it is younger than a week
    planned = shell.json("gc", "--dry-run", "--older-than", "0s")
    assert [(g["run_id"], g["what"]) for g in planned["garbage"]] == [
        ("left-over", "all"),
        (RUN, "checkpoints/step-00000130-attempt-0001"),
        (RUN, "checkpoints/step-00000260-attempt-0002"),
    ]
    assert not planned["removed"]
    before = len(list(shell.store.list()))
    shown = shell.run("gc", "--older-than", "0s")
    assert "a later attempt went another way" in shown
    assert before - len(list(shell.store.list())) == 7
    assert shell.json("gc", "--older-than", "0s")["garbage"] == []
    assert shell.json("checkpoints", RUN, "--verify")["checkpoints"][-1]["is_whole"]
    assert shell.store.head("foreign/data.csv")


def test_gc_leaves_checkpoints_alone_where_a_record_is_damaged(shell: Shell) -> None:
    made = succeeded(shell.store)
    made.checkpoint(1, 130, time=START)
    shell.store.write(made.paths.attempt(2), b"garbage")
    assert shell.json("gc", "--dry-run", "--older-than", "0s")["garbage"] == []
    assert "attempts/0002.json is not a readable Attempt" in shell.error
    assert "checkpoints are left alone" in shell.error


def test_gc_and_delete_remove_uploads_whose_writer_was_killed(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_STORE", store.uri)
    shell = Shell(store, capsys)
    made = succeeded(store)
    alive = running(store, now=time.time(), run_id="live-000001")
    name = CheckpointName(260, 2)
    for paths in (made.paths, alive.paths, RunPaths("deleted-000001")):
        kill_writer_of(store, paths.checkpoint(name) + "model/model.safetensors")
    kill_writer_of(store, "foreign/backup.tar")
    objects = {head.key for head in store.list()}

    assert shell.json("gc", "--dry-run", "--older-than", "1h")["garbage"] == []
    planned = shell.json("gc", "--dry-run", "--older-than", "0s")
    assert [(g["run_id"], g["what"], g["unfinished_uploads"]) for g in planned["garbage"]] == [
        ("deleted-000001", "uploads", 1),
        (RUN, "uploads", 1),
    ]
    assert len(list(store.list_unfinished())) == 4
    assert "their writers are gone" in shell.run("gc", "--older-than", "0s")
    assert shell.error == "0 B and 2 unfinished uploads were removed\n"
    left = {unfinished.key.partition("/")[0] for unfinished in store.list_unfinished()}
    assert left == {"live-000001", "foreign"}
    assert {head.key for head in store.list()} == objects

    kill_writer_of(store, made.paths.checkpoint(name) + "model/model.safetensors")
    shell.run("delete", RUN, "--yes")
    assert ", 1 unfinished upload\n" in shell.error
    assert list(store.list_unfinished(f"{RUN}/")) == []
    assert len(list(store.list_unfinished())) == 2


@pytest.mark.parametrize("kind", ["denied", "not implemented"])
def test_a_store_that_lists_no_uploads_is_collected_and_deleted_all_the_same(
    s3_store: Store,
    object_store: EmbeddedStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
) -> None:
    succeeded(s3_store)
    with proxy_to(object_store.endpoint_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        monkeypatch.setenv("SHOAL_STORE", s3_store.uri)
        shell = Shell(s3_store, capsys)
        proxy.fail(kind, "GET", "uploads", times=1_000)
        shell.run("gc", "--older-than", "0s")
        assert shell.error.count("warning: cannot list unfinished uploads of ") == 1
        shell.run("delete", RUN, "--yes")
        assert shell.error.count("warning: cannot list unfinished uploads of ") == 1
    assert list(s3_store.list()) == []


def test_gc_refuses_an_age_that_is_none(shell: Shell) -> None:
    shell.run("gc", "--older-than", "week", code=2)
    assert "write for example 30m, 12h or 7d" in shell.error


# --------------------------------------------------------------------------------------------- run


def test_a_job_file_names_the_store_too(
    shell: Shell, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = succeeded(shell.store)
    tree = made.spec.model_dump(mode="json") | {"store": {"uri": shell.store.uri}}
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(tree))  # JSON is YAML
    monkeypatch.delenv("SHOAL_STORE")
    assert shell.json("status", RUN, "--store", str(job))["state"] == "SUCCEEDED"


def test_stop_promises_no_checkpoint_that_may_never_be(shell: Shell) -> None:
    running(shell.store, now=time.time())
    shell.run("stop", RUN)
    assert shell.error == "asked to stop; the run saves what it has trained and ends\n"


def test_stop_of_a_run_that_has_ended_is_refused(shell: Shell) -> None:
    pytest.importorskip("jobs.submit")
    succeeded(shell.store)
    shell.run("stop", RUN, code=2)
    assert "has ended already: SUCCEEDED" in shell.error


def test_evaluate_without_torch_says_what_to_install(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else found(name, *a)
    )
    shell.run("evaluate", RUN, "--data", "s3://lake/new", code=3)
    assert 'pip install "shoal[train]"' in shell.error
