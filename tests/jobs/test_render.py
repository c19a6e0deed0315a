"""`shoal render`, and what run, submit, resume and check do with a job for KubeRay."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from test_cli import run_main

from cluster.storage import Store, open_store
from jobs.checks.finding import Finding, Verdict
from jobs.checks.kuberay import check_kuberay, look_at_kubernetes
from jobs.checks.machine import DiskNeed, check_workers
from jobs.parse import load_spec
from jobs.record import Manifest, Part, Result, RunPaths, State, StreamPosition
from jobs.runs import RunReader
from jobs.schema import job_schema
from jobs.spec import JobSpec
from jobs.submit import request_stop

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "k8s" / "examples"
RENDERED = sorted(EXAMPLES.glob("*-rayjob.yaml"))
IMAGE = "registry.example.com/shoal:0.1.0"
KUBERAY = {"kind": "kuberay", "image": IMAGE}


class Shell:
    """Runs commands and takes what they print; jobs are files in one folder."""

    def __init__(self, folder: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.store = store
        self._capsys = capsys

    def run(self, *arguments: str, code: int = 0) -> str:
        """What the command printed to stdout; the rest is in `error`."""
        self._capsys.readouterr()
        ended = run_main(*arguments)
        shown = self._capsys.readouterr()
        self.error = shown.err
        assert ended == code, shown.err
        return shown.out

    def job(self, name: str = "job.yaml", **changes: Any) -> str:
        """Path of a job file."""
        tree: dict[str, Any] = {
            "name": "sentiment",
            "task": {"labels": ["negative", "positive"]},
            "model": {"source": "s3://models/minilm"},
            "data": {"train": "s3://lake/reviews/train"},
            "workers": {"count": 2, "memory_gib": 8},
            "store": self.store,
            "cluster": KUBERAY,
        }
        path = self.folder / name
        path.write_text(yaml.safe_dump(tree | changes))
        return str(path)

    def spec(self, **changes: Any) -> JobSpec:
        return load_spec(Path(self.job(**changes)))


@pytest.fixture
def shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    """For commands that reach no store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHOAL_STORE", raising=False)
    return Shell(tmp_path, "s3://shoal/runs", capsys)


@pytest.fixture
def s3_shell(shell: Shell, s3_store: Store) -> Shell:
    """Its runs are kept in a real object store."""
    shell.store = s3_store.uri
    return shell


# ---------------------------------------------------------------------------------- of a job file


def rayjob_of(shown: str) -> dict[str, Any]:
    """The RayJob that was printed; budgets follow it."""
    rayjob, *budgets = yaml.safe_load_all(shown)
    assert {b["kind"] for b in budgets} == {"PodDisruptionBudget"}
    found: dict[str, Any] = rayjob
    return found


def environment_of(rayjob: dict[str, Any]) -> dict[str, str]:
    """Variables of the driver."""
    (head,) = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    return {variable["name"]: variable["value"] for variable in head["env"]}


def test_render_prints_a_job_as_a_rayjob_with_its_budgets(shell: Shell) -> None:
    shown = shell.run("render", shell.job())
    rayjob = rayjob_of(shown)
    assert list(rayjob) == ["apiVersion", "kind", "metadata", "spec"]
    assert rayjob["metadata"]["name"] == "sentiment"
    assert rayjob["spec"]["entrypoint"] == "python -m jobs.run s3://shoal/runs/sentiment"
    assert "shoal submit" in shell.error
    assert shown == shell.run("render", "job.yaml")
    listed = json.loads(shell.run("render", "job.yaml", "--json"))
    assert listed.pop("items") == list(yaml.safe_load_all(shown))
    assert listed == {"apiVersion": "v1", "kind": "List"}  # as kubectl takes several objects


def test_render_takes_changes_and_the_id_of_the_run(shell: Shell) -> None:
    shown = shell.run(
        "render", shell.job(), "--set", "cluster.queue=team-a", "--run-id", "sentiment-1"
    )
    metadata = rayjob_of(shown)["metadata"]
    assert metadata["name"] == "sentiment-1"
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    shell.run("render", "job.yaml", "--run-id", "Sentiment_1", code=2)
    assert "--run-id Sentiment_1 is not allowed" in shell.error


@pytest.mark.parametrize("rendered", RENDERED, ids=lambda path: path.stem)
def test_each_example_is_rendered_to_the_very_file(shell: Shell, rendered: Path) -> None:
    job = rendered.with_name(rendered.name.replace("-rayjob", ""))
    assert shell.run("render", str(job)) == rendered.read_text()


def test_each_example_is_rendered() -> None:
    jobs = set(EXAMPLES.glob("*.yaml")) - set(RENDERED)
    assert {path.with_name(f"{path.stem}-rayjob.yaml") for path in jobs} == set(RENDERED)
    assert len(jobs) >= 4


@pytest.mark.parametrize("rendered", RENDERED, ids=lambda path: path.stem)
def test_each_example_is_right_for_editors(rendered: Path) -> None:
    spec = load_spec(rendered.with_name(rendered.name.replace("-rayjob", "")))
    jsonschema.validate(json.loads(spec.model_dump_json(exclude_unset=True)), job_schema())


def test_render_of_a_local_job_says_what_to_type(shell: Shell) -> None:
    shell.run("render", shell.job(cluster={"kind": "local"}), code=2)
    assert "error: cluster.kind is local, so there is no RayJob to render" in shell.error
    shown = shell.run("render", "job.yaml", "--set", f"cluster={{kind: kuberay, image: '{IMAGE}'}}")
    assert rayjob_of(shown)["kind"] == "RayJob"


def test_an_option_without_effect_is_refused(shell: Shell) -> None:
    shell.run("render", shell.job(), "--store", "s3://b/runs", code=2)
    assert "--store is an option of a run, without effect on" in shell.error
    shell.run("render", "s3://b/runs/a-1", "--set", "name=b", "--run-id", "b", code=2)
    assert "--set is an option of a job file" in shell.error
    assert "--run-id is an option of a job file" in shell.error


LOCAL_PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": {"train": "reviews/train"}}, "data.train is reviews/train, a path of"),
    "store": ({"store": "runs"}, "store is runs, a path of"),
    "model": ({"model": {"source": "./minilm"}}, "model.source is ./minilm, a path of"),
    "home": ({"model": {"source": "~/minilm"}}, "model.source is ~/minilm, a path of"),
}


@pytest.mark.parametrize(("changes", "message"), LOCAL_PLACES.values(), ids=LOCAL_PLACES)
@pytest.mark.parametrize(
    "command", [("render",), ("submit", "--skip-check", "--record-only")], ids=lambda c: c[0]
)
def test_paths_of_this_machine_are_refused(
    shell: Shell, command: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    assert shell.run(*command, shell.job(**changes), code=2) == ""
    assert f"error: {message}" in shell.error
    assert "s3://" in shell.error.partition("hint:")[2]


def test_a_model_that_is_a_folder_here_is_no_name_of_the_hub(shell: Shell) -> None:
    source = "team/minilm"
    job = shell.job(model={"source": source, "revision": "abc"})
    assert shell.run("render", job)
    (shell.folder / source).mkdir(parents=True)
    shell.run("render", job, code=2)
    assert "model.source is team/minilm, a path of this machine" in shell.error


# ------------------------------------------------------------------------------ run, submit, resume


def test_run_says_to_submit(shell: Shell) -> None:
    shell.run("run", shell.job(), code=2)
    assert "cluster.kind is kuberay, but shoal run trains on this machine" in shell.error
    assert "hint: run: shoal submit JOB.yaml" in shell.error


RECORD = ("--skip-check", "--record-only", "--run-id", "sentiment-1")


def test_submit_can_only_record_the_run_and_says_what_starts_it(s3_shell: Shell) -> None:
    shown = s3_shell.run("submit", s3_shell.job(), *RECORD)
    uri = f"{s3_shell.store}/sentiment-1"
    assert shown == f"{uri}\n"
    assert s3_shell.error == (f"recorded; start it with: shoal render {uri} | kubectl apply -f -\n")
    recorded = RunReader(open_store(s3_shell.store), "sentiment-1").spec()
    assert recorded == load_spec(s3_shell.folder / "job.yaml")
    rayjob = rayjob_of(s3_shell.run("render", uri))
    assert rayjob["metadata"]["name"] == "sentiment-1"
    assert rayjob["spec"]["entrypoint"] == f"python -m jobs.run {uri}"
    assert s3_shell.error == ""
    # The same job under the same id is the same run; another one is refused.
    assert s3_shell.run("submit", "job.yaml", *RECORD) == shown
    s3_shell.run("submit", s3_shell.job("b.yaml", workers={"count": 3}), *RECORD, code=2)
    assert "exists" in s3_shell.error


def test_the_command_finds_a_store_that_the_job_describes(
    s3_shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    job = s3_shell.job(store={"uri": s3_shell.store, "access": {"endpoint_url": endpoint}})
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    document = json.loads(s3_shell.run("submit", job, *RECORD, "--json"))
    command = document["start_command"]
    assert command == f"shoal render {document['uri']} --store {job} | kubectl apply -f -"
    rayjob = rayjob_of(s3_shell.run(*command.partition(" |")[0].split()[1:]))
    assert endpoint in environment_of(rayjob)["SHOAL_STORE_ACCESS"]


def test_a_local_run_has_no_rayjob_until_it_is_moved(
    s3_shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = s3_shell.spec(cluster={"kind": "local"})
    store = open_store(s3_shell.store)
    store.write(RunPaths("sentiment-1").spec, local.to_bytes())
    uri = f"{s3_shell.store}/sentiment-1"
    s3_shell.run("render", uri, code=2)
    assert f"the run {uri} was submitted with cluster.kind local" in s3_shell.error
    monkeypatch.setattr("jobs.submit.start_driver", _no_driver)
    cluster = f"cluster={{kind: kuberay, image: '{IMAGE}'}}"
    resumed = s3_shell.run(
        "resume", "sentiment-1", "--store", s3_shell.store, "--set", cluster, "--record-only"
    )
    assert resumed == f"{uri}\n"
    assert f"shoal render {uri} | kubectl replace --force -f -" in s3_shell.error
    assert rayjob_of(s3_shell.run("render", uri))["kind"] == "RayJob"


def test_a_stopped_run_that_is_rendered_again_does_not_hear_the_old_request(
    s3_shell: Shell,
) -> None:
    s3_shell.run("submit", s3_shell.job(), *RECORD)
    store, uri = open_store(s3_shell.store), f"{s3_shell.store}/sentiment-1"
    request_stop(store, "sentiment-1", by="test")
    assert "SHOAL_PAST" not in s3_shell.run("render", uri)
    ended = Result(
        run_id="sentiment-1",
        state=State.STOPPED,
        generation=1,
        step=5,
        finished_at=time.time(),
    )
    store.write(RunPaths("sentiment-1").result, ended.to_bytes())
    told = environment_of(rayjob_of(s3_shell.run("render", uri)))
    assert (told["SHOAL_PAST_CONTROLS"], told["SHOAL_PAST_GENERATION"]) == ("1", "1")


def manifest_of(*, step: int, size: int) -> Manifest:
    """A checkpoint of so many bytes, as far as its manifest tells."""
    return Manifest(
        step=step,
        attempt=1,
        generation=1,
        parent_step=None,
        created_at=time.time(),
        parts=(Part(name="state.safetensors", bytes=size, sha256="", xxh3=""),),
        digests={},
        stream=StreamPosition(
            order_version=1,
            index_digest="",
            lanes=1,
            window=1,
            seed=0,
            global_batch_size=1,
            epoch=0,
            next_item=0,
        ),
    )


def test_a_run_that_starts_again_has_time_to_save_what_it_has_saved(s3_shell: Shell) -> None:
    store, uri = open_store(s3_shell.store), f"{s3_shell.store}/sentiment-1"
    store.write(RunPaths("sentiment-1").spec, s3_shell.spec().to_bytes())
    drain = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    first = environment_of(rayjob_of(s3_shell.run("render", uri)))[drain]
    paths = RunPaths("sentiment-1")
    saved = manifest_of(step=200, size=20 * 2**30)
    store.write(paths.manifest(saved.name), saved.to_bytes())
    ended = Result(
        run_id="sentiment-1", state=State.STOPPED, generation=1, step=200, finished_at=time.time()
    )
    store.write(paths.result, ended.to_bytes())
    again = environment_of(rayjob_of(s3_shell.run("render", uri)))[drain]
    assert int(again) > 20 * 1024 / 50 > int(first)


def test_a_run_in_a_folder_cannot_move_to_kubernetes(shell: Shell, local_store: Store) -> None:
    local = shell.spec(cluster={"kind": "local"}, store=local_store.uri)
    local_store.write(RunPaths("sentiment-1").spec, local.to_bytes())
    run = f"{local_store.uri}/sentiment-1"
    shell.run("resume", run, "--set", f"cluster={{kind: kuberay, image: '{IMAGE}'}}", code=2)
    assert f"store is {local_store.uri}, a path of this machine" in shell.error
    # Nothing was recorded.
    assert RunReader(local_store, "sentiment-1").spec() == local


def _no_driver(*arguments: object, **options: object) -> None:
    raise AssertionError("a driver was started on this machine")


# ------------------------------------------------------------------------------------------- check


def findings(spec: JobSpec, **need: int) -> list[Finding]:
    whole = {"rows_bytes": 0, "checkpoint_bytes": 0, "model_bytes": 0} | need
    look = look_at_kubernetes(spec, context=None, asks=False)
    return list(check_kuberay(spec, DiskNeed(**whole), look))


def test_check_says_what_nobody_can_tell_from_here(shell: Shell) -> None:
    (found,) = findings(shell.spec())
    assert found.verdict is Verdict.NOT_CHECKED
    assert found.message.startswith(f"whether pods can pull {IMAGE} from ")


def test_check_does_not_compare_the_workers_with_this_machine(shell: Shell) -> None:
    assert not list(check_workers(shell.spec(workers={"count": 4096, "memory_gib": 8}), None))


def test_check_tells_of_local_paths_too(shell: Shell) -> None:
    problems = [
        f.message
        for f in findings(shell.spec(data={"train": "reviews"}, store="runs"))
        if f.verdict is Verdict.PROBLEM
    ]
    assert [message.partition(" is ")[0] for message in problems] == ["data.train", "store"]


def test_check_warns_of_what_pods_do_not_have(shell: Shell) -> None:
    access = {"uri": "s3://shoal/runs", "access": {"profile": "me"}}
    found = findings(shell.spec(workers={"count": 2}, store=access))
    warnings = [f.message for f in found if f.verdict is Verdict.WARNING]
    assert len(warnings) == 2
    assert warnings[0].startswith("store.access.profile is me")
    assert warnings[1].startswith("workers.memory_gib is not given")


def test_check_refuses_a_model_for_which_the_pods_have_no_disk(shell: Shell) -> None:
    spec = shell.spec(data={"train": "s3://lake/train", "cache_gib": 2})
    found = [f for f in findings(spec, checkpoint_bytes=3 * 2**30) if f.exit_code]
    assert [(f.part, f.hint) for f in found] == [
        ("data.cache_gib", "set data.cache_gib to 3 or more")
    ]
    assert not [f for f in findings(spec, checkpoint_bytes=2**30) if f.exit_code]


def test_the_whole_check_looks_at_the_stores_but_not_at_this_machine(
    s3_shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*, count_gpus: bool) -> None:
        raise AssertionError("this machine was looked at")

    monkeypatch.setattr("jobs.preflight.look_at_machine", look)
    job = s3_shell.job(
        data={"train": f"{s3_shell.store}/train"}, model={"source": f"{s3_shell.store}/model"}
    )
    checks = json.loads(s3_shell.run("check", job, "--json", code=2))["checks"]
    verdicts = {(check["part"], check["verdict"]) for check in checks}
    assert ("cluster", "not checked") in verdicts
    assert ("store", "ok") in verdicts
    assert "workers" not in {part for part, _ in verdicts}
