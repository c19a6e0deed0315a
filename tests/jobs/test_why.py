"""What explains a run: recorded situations, what is like them, and runs of this machine."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import SyntheticRun, make_spec
from synthetic_study import running_study

from cluster.rayjob_status import seen_in
from cluster.storage import Store, open_store
from jobs.parse import apply_overrides, check_resume_overrides, parse_spec
from jobs.rayjobs import with_rayjob
from jobs.record import Failure, Result, RunPaths, State
from jobs.runs import RunReader
from jobs.status import RunStatus, read_status
from jobs.study.trials import Trials
from jobs.why.evidence import ClusterEvidence, Evidence, Printed
from jobs.why.explain import RULES, Explanations, explain
from jobs.why.gather import gather
from jobs.why.redaction import redacted
from jobs.why.scheduling import KINDS as SCHEDULING_KINDS
from jobs.why.scheduling import why_unschedulable
from tests.kubernetes_api.manifests import IMAGE, kuberay_job

SITUATIONS = sorted((Path(__file__).parent.parent / "data" / "why").glob("*.yaml"))
KUBERAY = {"kind": "kuberay", "image": IMAGE, "namespace": "training", "queue": "team-a"}
JOB = kuberay_job(cluster=KUBERAY)


@pytest.fixture(scope="module")
def pending(tmp_path_factory: pytest.TempPathFactory) -> RunStatus:
    """The status of a run that no driver has begun."""
    store = open_store(tmp_path_factory.mktemp("why"))
    store.write(RunPaths("run").spec, JOB.to_bytes())
    return read_status(RunReader(store, "run"))


def evidence_of(tree: Mapping[str, Any], status: RunStatus) -> Evidence:
    """A recorded situation as `gather` would bring it."""
    if "rayjob" in tree:
        seen = seen_in(tree["rayjob"])
        situation = with_rayjob(status.situation, seen, run=status.uri)
        status = replace(status, rayjob=seen, situation=situation)
    cluster = ClusterEvidence(
        ray_cluster=tree.get("ray_cluster"),
        workload=tree.get("workload"),
        pods=tuple(tree.get("pods", ())),
        events=tuple(tree.get("events", ())),
        printed=tuple(Printed(pod, tuple(ls)) for pod, ls in tree.get("printed", {}).items()),
    )
    return Evidence(JOB, status, cluster=cluster)


def told(status: RunStatus, **tree: Any) -> Explanations:
    return explain(evidence_of(tree, status))


def event(reason: str, message: str, *, pod: str = "run-x-worker-1", **more: Any) -> dict[str, Any]:
    about = {"kind": "Pod", "name": pod}
    return {"type": "Warning", "reason": reason, "message": message, "involvedObject": about} | more


def worker(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "run-x-worker-1", "labels": {"ray.io/node-type": "worker"}},
        "spec": {"nodeName": "node-1", "containers": [{"name": "ray-worker"}]},
        "status": status,
    }


# -------------------------------------------------------------------------- recorded situations


@pytest.mark.parametrize("path", SITUATIONS, ids=lambda path: path.stem)
def test_a_recorded_situation_is_explained_with_what_to_type(
    path: Path, pending: RunStatus
) -> None:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert tree["source"]
    assert tree["made_by"]
    found = explain(evidence_of(tree, pending)).found
    first, expected = found[0], tree["expect"]
    assert first.rule == expected["rule"], found
    for part in expected["cause"]:
        assert part in first.cause
    for part in expected["remedy"]:
        assert part in first.remedy
    assert first.evidence
    if expected.get("only"):
        assert {finding.rule for finding in found} <= {first.rule, "run"}, found


def test_there_are_enough_of_them_and_each_kind_of_rule_is_met() -> None:
    met = {yaml.safe_load(p.read_text(encoding="utf-8"))["expect"]["rule"] for p in SITUATIONS}
    assert len(SITUATIONS) >= 20
    names = [rule.name for rule in RULES]
    assert met <= set(names)
    assert len(names) == len(set(names))


class Filled(dict[str, str]):
    """Fields of templates, each with something."""

    def __missing__(self, key: str) -> str:
        return "3" if key.startswith("more_") else "workers.cpus=N" if key == "smaller" else "b"


def test_what_is_to_be_typed_is_accepted(pending: RunStatus) -> None:
    """Every `--set` of every remedy, with something for N, NAME and the like, is one that a resume
    accepts and that makes a job."""
    fields = Filled(again="shoal resume RUN")
    templates = [rule.remedy for rule in RULES] + [kind.remedy for kind in SCHEDULING_KINDS]
    remedies = [template.format_map(fields) for template in templates]
    for path in SITUATIONS:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        remedies += [f.remedy for f in explain(evidence_of(tree, pending)).found]
    pattern = r"shoal resume \S+((?: --set (?:'[^']*'|[^\s;,]+))+)"
    commands = [c for remedy in remedies for c in re.findall(pattern, remedy)]
    changes = {word for c in commands for word in shlex.split(c) if word != "--set"}
    for change in sorted(changes):
        real = change.replace("cluster.KEY=VALUE", "cluster.auth=null")
        real = real.replace("cluster.KEY=null", "cluster.auth=null").replace("KEY=VALUE", "")
        real = real.replace("REGISTRY/NAME:TAG", "r.example.com/a:1").replace("NAME", "b")
        real = re.sub(r"=N$", "=2", real).replace("cluster.spot.over_min=true", "")
        if real:
            check_resume_overrides([real], is_study=False)
            parse_spec(apply_overrides(JOB.model_dump(mode="json"), [real]), where=change)
    assert len(changes) > 25


# ------------------------------------------------------------------------- what nobody recorded


@pytest.mark.parametrize(
    ("message", "nodes", "words"),
    [
        ("0/5 nodes are available: 5 Insufficient memory.", 5, ["Insufficient memory"]),
        (
            "0/9 nodes are available: 2 Insufficient cpu, 3 node(s) had taint {a/b: c}, that the "
            "pod didn't tolerate, 4 node(s) were unschedulable.",
            9,
            ["Insufficient cpu", "taint {a/b: c}, that the pod didn't tolerate", "unschedulable"],
        ),
        (
            "0/2 nodes are available: 1 node(s) had untolerated taint "
            "{node-role.kubernetes.io/control-plane: }, 1 node(s) had volume node affinity "
            "conflict. no new claims to deallocate, preemption: 0/2 nodes are available.",
            2,
            ["volume node affinity conflict", "control-plane"],
        ),
        ("0/1 nodes are available: 1 flux capacitor is cold.", 1, ["flux capacitor is cold"]),
        ("pod has unbound immediate PersistentVolumeClaims", None, ["unbound immediate"]),
        ("", None, []),
    ],
)
def test_the_schedulers_words_are_taken_apart_the_nearest_first(
    message: str, nodes: int | None, words: list[str]
) -> None:
    total, found = why_unschedulable(message)
    assert total == nodes
    assert len(found) == len(words)
    for shortage, part in zip(found, words, strict=True):
        assert part in shortage.text


def test_a_taint_of_the_system_is_not_to_be_tolerated(pending: RunStatus) -> None:
    message = (
        "0/3 nodes are available: 1 node(s) had untolerated taint "
        "{node-role.kubernetes.io/control-plane: }, 2 node(s) had untolerated taint "
        "{node.kubernetes.io/not-ready: }."
    )
    (first, *_) = told(pending, events=[event("FailedScheduling", message)]).found
    assert "tolerations" not in first.remedy
    assert "not in order" in first.cause


@pytest.mark.parametrize(
    ("reason", "message", "rule"),
    [
        ("Failed", 'Failed to pull image "a": no such host', "registry-unreachable"),
        ("Failed", 'Failed to pull image "a": the moon is full', "image-pull"),
        (
            "Failed",
            'Failed to pull image "go-api:latest": failed to resolve reference: pull access '
            "denied, repository does not exist or may require authorization",
            "image-not-allowed",
        ),
        ("Failed", 'Failed to pull image "a:9": manifest for a:9 not found', "image-missing"),
        (
            "FailedToRetrieveImagePullSecret",
            "Unable to retrieve some image pull secrets (regcred); attempting to pull the image "
            "may not succeed.",
            "pull-secret-missing",
        ),
        ("Failed", 'Error: secrets "my-password" not found', "config-missing"),
        ("Failed", "Error: container has runAsNonRoot and image will run as root", "runs-as-root"),
        ("FailedMount", "Unable to attach or mount volumes: timed out", "volume-not-mounted"),
        ("Evicted", "The node was low on resource: memory.", "evicted-for-memory"),
        (
            "Evicted",
            "Usage of EmptyDir volume 'cache' exceeds the limit '8Gi'.",
            "evicted-for-disk",
        ),
        ("Evicted", "The node had condition: [PIDPressure].", "evicted"),
        ("NodeNotReady", "Node is not ready", "node-lost"),
        ("FailedCreatePodSandBox", "plugin type=calico failed", "container-not-created"),
        ("SomethingNew", "nobody has heard of it", "newest-warning"),
    ],
)
def test_what_is_like_a_recorded_situation_is_explained_too(
    pending: RunStatus, reason: str, message: str, rule: str
) -> None:
    first = told(pending, events=[event(reason, message)]).found[0]
    assert first.rule == rule, first
    assert first.remedy


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        (
            'pods "a" is forbidden: ValidatingAdmissionPolicy labels denied request: The label is '
            "missing",
            "admission-refuses",
        ),
        (
            'Internal error occurred: failed calling webhook "check.gatekeeper.sh": dial tcp',
            "admission-unreachable",
        ),
        (
            'pods "a" is forbidden: failed quota: q: must specify limits.memory',
            "quota-wants-limits",
        ),
        ('pods "a" is forbidden: because it is Sunday', "creation-refused"),
        ("etcdserver: request timed out", "cluster-not-made"),
    ],
)
def test_refusals_of_pods_are_told_apart(pending: RunStatus, message: str, rule: str) -> None:
    about = {"kind": "RayCluster", "name": "run-x"}
    given = event("FailedToCreateWorkerPod", message, involvedObject=about)
    assert told(pending, events=[given]).found[0].rule == rule


def test_what_a_pod_has_got_over_explains_nothing(pending: RunStatus) -> None:
    up = worker(
        phase="Running",
        conditions=[{"type": "Ready", "status": "True"}],
        containerStatuses=[{"name": "ray-worker", "restartCount": 0, "state": {"running": {}}}],
    )
    events = [
        event("FailedScheduling", "0/1 nodes are available: 1 Insufficient cpu."),
        event("NotTriggerScaleUp", "pod didn't trigger scale-up: 1 max node group size reached"),
        event("Failed", 'Failed to pull image "a": not found'),
        event("Unhealthy", "Readiness probe failed: "),
    ]
    assert [f.rule for f in told(pending, pods=[up], events=events).found] == ["run"]
    # The same of a pod that is gone.
    assert told(pending, events=events).found[0].rule == "image-missing"


def test_pods_with_one_trouble_are_told_in_one_sentence(pending: RunStatus) -> None:
    message = "0/3 nodes are available: 3 Insufficient cpu."
    events = [
        event("FailedScheduling", message, pod=name, count=7)
        for name in ("run-x-head-0", "run-x-worker-1", "run-x-worker-2")
    ]
    (first,) = (
        f
        for f in told(pending, events=events).found
        if f.rule == "unschedulable"
        if "2 workers" in f.cause
    )
    assert "(7 times)" in first.evidence[0]


def test_a_run_that_is_over_is_resumed_and_one_that_waits_is_stopped_before(
    pending: RunStatus,
) -> None:
    given = event("FailedScheduling", "0/3 nodes are available: 3 Insufficient memory.")
    waits = told(pending, events=[given]).found[0].remedy
    assert f"shoal stop {pending.uri} --wait; then: shoal resume {pending.uri} --set" in waits
    gone = {"status": {"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"}}
    ended = told(pending, events=[given], rayjob=gone)
    assert [f.rule for f in ended.found] == ["unschedulable", "start-deadline"]
    assert "shoal stop" not in ended.found[0].remedy


def test_our_own_error_that_a_driver_printed_is_taken_with_its_hint(pending: RunStatus) -> None:
    lines = (
        "Job entrypoint command failed with exit code 3, last available logs:\n"
        "error: cannot write s3://shoal/runs/run/lease.json: access denied for the role\n\n"
        "hint: allow s3:PutObject on it in the policy of the bucket or role"
    )
    status = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}
    first = told(pending, rayjob={"status": {**status, "message": lines}}).found[0]
    assert first.rule == "own-error"
    assert first.cause.startswith("cannot write s3://shoal/runs/run/lease.json: access denied")
    assert first.remedy.startswith("allow s3:PutObject")
    assert f"shoal resume {pending.uri}" in first.remedy


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("botocore.errorfactory.NoSuchBucket: The specified bucket does not exist", "store-bucket"),
        ("An error occurred (InvalidAccessKeyId) when calling ListObjectsV2", "store-keys"),
        ("botocore.exceptions.NoCredentialsError: Unable to locate credentials", "store-keys"),
        ("ModuleNotFoundError: No module named 'jobs'", "module-missing"),
        ("OSError: [Errno 28] No space left on device", "disk-full"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "gpu-memory"),
        ("ray.exceptions.AuthenticationError: Authentication failed: Forbidden", "ray-token"),
        ("No available node types can fulfill resource request {'CPU': 6.0}.", "ray-room"),
        ("ValueError: the user's own", "driver-failed"),
    ],
)
def test_what_a_driver_printed_before_it_failed_is_understood(
    pending: RunStatus, line: str, rule: str
) -> None:
    status = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}
    message = f"Job entrypoint command failed with exit code 1, last available logs:\n{line}"
    found = told(pending, rayjob={"status": {**status, "message": message}})
    assert found.found[0].rule == rule
    assert found.lines[-1] == line


def test_lines_of_what_goes_on_are_not_looked_at(pending: RunStatus) -> None:
    printed = {"run-x-worker-1": ["CUDA out of memory. Tried to allocate 2 GiB"]}
    assert told(pending, printed=printed).found[0].rule == "run"


# ----------------------------------------------------------------------------- runs of this machine


def local_run(store: Store, **changes: Any) -> RunReader:
    spec = kuberay_job(cluster={"kind": "local"}, store=store.uri, **changes)
    store.write(RunPaths("run").spec, spec.to_bytes())
    return RunReader(store, "run")


def explained(reader: RunReader, lines: tuple[str, ...] = ()) -> Explanations:
    return explain(Evidence(reader.spec(), read_status(reader), lines=lines))


def end(reader: RunReader, state: State, failure: Failure | None = None) -> None:
    result = Result(
        run_id="run", state=state, generation=1, step=5, finished_at=1.0, failure=failure
    )
    reader.store.write(reader.paths.result, result.to_bytes())


def failure(state: State, message: str, hint: str | None, **more: Any) -> Failure:
    return Failure(state=state, problems=((message, hint),), where="rank 1 on node-7", **more)


def test_a_local_run_is_explained_by_what_its_folder_says(local_store: Store) -> None:
    reader = local_run(local_store)
    first = explained(reader).found[0]
    assert (first.rule, first.cause) == ("run", "no driver has started yet")
    assert f"shoal resume {reader.uri}" in first.remedy
    end(reader, State.FAILED_USER, failure(State.FAILED_USER, "the loss is NaN", "lower it"))
    (first,) = explained(reader).found
    assert (first.cause, first.remedy) == ("rank 1 on node-7: the loss is NaN", "lower it")


@pytest.mark.parametrize(
    ("state", "message", "remedy"),
    [
        (
            State.STARTING,
            "waits for nodes: 2 workers need 2 x 4 CPUs, and the 3 nodes have room for 1 (6 CPUs)",
            "--set workers.count=N",
        ),
        (
            State.RECOVERING,
            "training waits for the store: cannot write s3://shoal: it does not answer",
            "shoal list --store",
        ),
        (State.STARTING, "the workers are started", "shoal watch"),
    ],
)
def test_what_a_local_run_waits_for_is_told_with_the_sum_and_what_to_do(
    local_store: Store, state: State, message: str, remedy: str
) -> None:
    spec = kuberay_job(cluster={"kind": "local"}, store=local_store.uri)
    run = SyntheticRun(local_store, run_id="run", spec=spec).submit()
    now = time.time()
    run.lease(renewed_at=now, host="elsewhere")
    run.state(state, message, time=now)
    (first,) = explained(RunReader(local_store, "run")).found
    assert first.cause == message
    assert remedy in first.remedy


def test_of_a_failure_without_a_hint_the_last_lines_are_shown(local_store: Store) -> None:
    reader = local_run(local_store)
    end(reader, State.FAILED_USER, failure(State.FAILED_USER, "KeyError: 'x'", None))
    found = explained(reader, lines=("rank 0: KeyError: 'x'",))
    assert found.lines == ("rank 0: KeyError: 'x'",)
    assert f"shoal logs {reader.uri}" in found.found[0].remedy


def test_a_store_that_refuses_is_the_explanation_whatever_pods_say(pending: RunStatus) -> None:
    away = failure(
        State.FAILED_INFRA,
        "cannot write s3://shoal/runs: access denied (AccessDenied)",
        "allow s3:PutObject",
        exit_code=3,
        is_of_place=True,
    )
    result = Result(
        run_id="run", state=away.state, generation=1, step=0, finished_at=1.0, failure=away
    )
    situation = replace(
        pending.situation, state=away.state, cause="c", hint="h", is_over=True, exit_code=3
    )
    status = replace(pending, situation=situation, result=result)
    killed = {"exitCode": 137, "reason": "OOMKilled"}
    pod = worker(containerStatuses=[{"name": "ray-worker", "state": {"terminated": killed}}])
    assert [f.rule for f in told(status, pods=[pod]).found] == ["run"]
    # A driver that is gone is explained by its pods instead.
    status = replace(status, result=None)
    assert told(status, pods=[pod]).found[0].rule == "out-of-memory"


@pytest.mark.parametrize(
    ("state", "cause", "remedy"),
    [
        (State.SUCCEEDED, "it has done all of its steps", "shoal report"),
        (State.STOPPED, "it was stopped on request", "shoal resume"),
    ],
)
def test_a_run_that_ended_as_it_should_says_so(
    local_store: Store, state: State, cause: str, remedy: str
) -> None:
    reader = local_run(local_store)
    end(reader, state)
    (first,) = explained(reader).found
    assert first.cause == cause
    assert remedy in first.remedy


def test_a_run_that_works_says_so_and_what_is_wrong_besides(pending: RunStatus) -> None:
    situation = replace(pending.situation, state=State.RUNNING, generation=1)
    status = replace(pending, situation=situation, step=40, total_steps=80)
    waiting = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    message = "0/1 nodes are available: 1 Insufficient cpu."
    pod = worker(phase="Pending", conditions=[waiting | {"message": message}])
    pod["spec"].pop("nodeName")
    found = told(status, pods=[pod]).found
    assert "it works: step 40 of 80" in found[0].cause
    assert [f.rule for f in found] == ["run", "unschedulable"]


def test_studies_and_their_trials_are_explained(local_store: Store) -> None:
    study = running_study(local_store, now=time.time())
    reader = RunReader(local_store, study.run_id)
    (first,) = explain(gather(reader, context=None)).found
    assert first.cause.startswith("it works: ")
    search = reader.spec().search
    assert search is not None
    trials = Trials(search, reader.study_events()).by_number.values()
    failed = next(trial for trial in trials if trial.status == "failed")
    local_store.write(reader.trial(failed.number).paths.spec, make_spec().to_bytes())
    (first,) = explain(gather(reader.trial(failed.number), context=None)).found
    assert first.cause == "the loss of step 40 is not a number"
    assert f"shoal why {reader.uri}" in first.remedy
    assert "resume" not in first.remedy


# ------------------------------------------------------------------------------------------ secrets

CANARY = "canary0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://key:{CANARY}@bucket/x",
        f"GET /x?X-Amz-Signature={CANARY}&y=1",
        f"Authorization: Bearer {CANARY}",
        f"AWS_SECRET_ACCESS_KEY={CANARY}",
        f'{{"auth_token": "{CANARY}"}}',
        f"password: {CANARY}",
        f"hf_{CANARY}",
    ],
)
def test_secrets_in_texts_of_others_are_shown_nowhere(pending: RunStatus, text: str) -> None:
    assert CANARY not in redacted(text)
    pod = worker(
        phase="Failed",
        reason="Evicted",
        message=text,
        containerStatuses=[
            {
                "name": "ray-worker",
                "restartCount": 1,
                "state": {"terminated": {"exitCode": 1, "reason": "Error", "message": text}},
            }
        ],
    )
    pod["spec"]["containers"][0]["env"] = [{"name": "A", "value": CANARY}]
    pod["metadata"]["annotations"] = {"last-applied": CANARY}
    shown = told(
        pending,
        pods=[pod],
        events=[event("Failed", f'Failed to pull image "a": {text}'), event("New", text)],
        printed={"run-x-worker-1": [text, f"error: {text}", f"hint: {text}"]},
        rayjob={"status": {"jobDeploymentStatus": "Failed", "message": text}},
        workload={"metadata": {"name": "w"}, "status": {"conditions": [
            {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": text}]}},
        ray_cluster={"metadata": {"name": "c"}, "status": {"reason": text}},
    )  # fmt: skip
    assert CANARY not in str(shown.to_json())
    assert "***" in str(shown.to_json())


def test_names_of_secrets_are_shown() -> None:
    for text in (
        'secret "aws-keys-of-team" not found',
        "couldn't find key auth_token in Secret training/run-token",
        "no credentials were found",
        "RPC error: InvalidAuthToken: Authentication token is missing or incorrect",
    ):
        assert redacted(text) == text
