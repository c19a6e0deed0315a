"""`cluster:` in a job file: what is refused, with what to type; and no secret in any output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.disruption import disruption_budgets
from jobs.errors import SpecError, render_error
from jobs.image import ImageReference, parse_image
from jobs.parse import load_spec, parse_spec, recorded_spec
from tests.rayjobs import DATA, GPUS, JOBS, SEARCHED_DATA, job, on_kuberay, rayjob


def problem(**changes: Any) -> tuple[str, str]:
    with pytest.raises(SpecError) as refused:
        job(**changes)
    (only,) = refused.value.problems
    return only.message, only.hint or ""


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a priority without a queue": (
        {"cluster": on_kuberay(queue_priority="urgent")},
        "has queue_priority urgent, without effect outside a queue",
        "set cluster.queue",
    ),
    "suspended in a queue": (
        {"cluster": on_kuberay(queue="team-a", suspend=True)},
        "has suspend true, but in the queue team-a it is Kueue who suspends",
        "remove cluster.suspend",
    ),
    "prices of nothing": (
        {"cluster": on_kuberay(prices={"gpu_hour": 0.0})},
        "has no price, so that nothing can be added up",
        "remove cluster.prices",
    ),
    "together and apart": (
        {"cluster": on_kuberay(pack="zone", spread="zone")},
        "has pack and spread for zone: workers cannot be together and apart",
        "remove one of them",
    ),
    "a GPU's name without GPUs": (
        {"cluster": on_kuberay(gpu={"type": "nvidia-l4"})},
        "cluster.gpu says what a GPU is called, but workers.gpus is 0",
        "set workers.gpus to 1",
    ),
    "spot nodes beyond no minimum": (
        {"workers": GPUS, "cluster": on_kuberay(spot={"label": "spot", "over_min": True})},
        "cluster.spot.over_min is true, but workers.min is not given",
        "set workers.min",
    ),
    "a label of ours": (
        {"cluster": on_kuberay(labels={"kueue.x-k8s.io/queue-name": "team-a"})},
        "must not begin with shoal/, ray.io/, app.kubernetes.io/, kueue.x-k8s.io/",
        "a queue of Kueue is cluster.queue",
    ),
    "a value that is no label": (
        {"cluster": on_kuberay(labels={"team": "search & ads"})},
        'cluster.labels.team is "search & ads", but must be the value of a label',
        "in quotes",
    ),
    "a truth for a label": (
        {"cluster": on_kuberay(nodes={"selector": {"spot": True}})},
        "cluster.nodes.selector.spot is true, but must be a text",
        '"yes"',
    ),
    "a key that is no label": (
        {"cluster": on_kuberay(spread="topology.kubernetes.io/zone/")},
        "must be the key of a label",
        "topology.kubernetes.io/zone",
    ),
    "an image with a scheme": (
        {"cluster": on_kuberay(image="https://registry.example.com/shoal:1")},
        "must be an image as containers are named",
        "registry.example.com/shoal:0.1.0",
    ),
    "an image in capitals": (
        {"cluster": on_kuberay(image="Registry/Shoal")},
        'cluster.image is "Registry/Shoal", but must be an image',
        "REGISTRY/NAME:TAG",
    ),
    "a variable of ours": (
        {"cluster": on_kuberay(env_secrets={"RAY_AUTH_TOKEN": {"secret": "a", "key": "b"}})},
        "cluster.env_secrets has RAY_AUTH_TOKEN, but Shoal and KubeRay set HOME, HF_HOME and",
        "remove RAY_AUTH_TOKEN",
    ),
    "a claim without a name": (
        {"cluster": on_kuberay(cache={"kind": "claim"})},
        "cluster.cache.name is missing",
        "add cluster.cache.name",
    ),
    "the storage class of a claim": (
        {"cluster": on_kuberay(cache={"kind": "claim", "name": "a", "storage_class": "b"})},
        "cluster.cache.storage_class belongs to cluster.cache.kind ephemeral",
        "write cluster.cache.kind: ephemeral",
    ),
    "an unknown taint effect": (
        {"cluster": on_kuberay(nodes={"tolerations": [{"key": "a", "effect": "Never"}]})},
        "must be NoSchedule, PreferNoSchedule or NoExecute",
        "",
    ),
}


@pytest.mark.parametrize(("changes", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_told_with_what_to_type(
    changes: dict[str, Any], message: str, hint: str
) -> None:
    told, typed = problem(**changes)
    assert message in told
    assert hint in typed


def test_a_rule_says_one_thing() -> None:
    rule = {"label": "a", "any_of": ["b"], "none_of": ["c"]}
    message, hint = problem(cluster=on_kuberay(nodes={"required": [rule]}))
    assert "has any_of and none_of for a" in message
    assert hint == "remove none_of"


@pytest.mark.parametrize("kind", JOBS)
def test_a_job_survives_the_way_through_the_run_folder(kind: str) -> None:
    """Where all defaults are written out."""
    assert recorded_spec(job(kind).to_bytes()) == job(kind)


DIGEST = "sha256:" + 64 * "a"


@pytest.mark.parametrize(
    ("image", "registry", "tag", "digest"),
    [
        ("shoal", "docker.io", None, None),
        ("shoal:0.1.0", "docker.io", "0.1.0", None),
        ("team/shoal:latest", "docker.io", "latest", None),
        ("localhost/shoal", "localhost", None, None),
        (
            "registry.example.com:5000/team/shoal:0.1.0-cuda_12",
            "registry.example.com:5000",
            "0.1.0-cuda_12",
            None,
        ),
        (f"registry.example.com/shoal@{DIGEST}", "registry.example.com", None, DIGEST),
        (f"registry.example.com/shoal:1@{DIGEST}", "registry.example.com", "1", DIGEST),
        ("ghcr.io/a-b/c__d.e", "ghcr.io", None, None),
    ],
)
def test_an_image_may_be_named_as_containers_are(
    image: str, registry: str, tag: str | None, digest: str | None
) -> None:
    assert job(cluster=on_kuberay(image=image)).cluster.image == image  # type: ignore[union-attr]
    assert parse_image(image) == ImageReference(registry, tag, digest)


def test_what_names_no_image_has_no_parts() -> None:
    for text in ("", "Shoal", "shoal:", "a//b", "shoal@sha256:1", "x" * 256):
        assert parse_image(text) is None


# ----------------------------------------------------------------------------------- secrets

AWS_ID, AWS_KEY = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
TOKEN, HEX = "hf_QwErTyUiOpAsDfGh", "0123456789abcdef0123456789abcdef01234567"
LOGIN = f"{AWS_ID}:{AWS_KEY}"

CANARIES = (AWS_ID, AWS_KEY, TOKEN, HEX)

PLANTED: dict[str, dict[str, Any]] = {
    "as the name of a secret": {"cluster": on_kuberay(env_from_secrets=[TOKEN])},
    "in the place of a list": {"cluster": on_kuberay(env_from_secrets=TOKEN)},
    "as a name in hexadecimal": {"cluster": on_kuberay(env_from_secrets=["object-store", HEX])},
    "as a pull secret": {"cluster": on_kuberay(image_pull_secrets=[AWS_KEY])},
    "as a variable": {"cluster": on_kuberay(env_secrets={"HF_TOKEN": TOKEN})},
    "as a variable's secret": {
        "cluster": on_kuberay(env_secrets={"HF_TOKEN": {"secret": TOKEN, "key": "token"}})
    },
    "as a secret's key": {
        "cluster": on_kuberay(env_secrets={"HF_TOKEN": {"secret": "hub", "key": TOKEN}})
    },
    "as the name of a variable": {
        "cluster": on_kuberay(env_secrets={AWS_KEY: {"secret": "hub", "key": "token"}})
    },
    "as a config map": {"cluster": on_kuberay(env_from_config_maps=[TOKEN])},
    "as a label": {"cluster": on_kuberay(labels={"token": TOKEN})},
    "as a service account": {"cluster": on_kuberay(service_account=AWS_ID)},
    "as a login of a registry": {"cluster": on_kuberay(image=f"{LOGIN}@registry.example.com/a:1")},
    "in a variable without a secret": {
        "cluster": on_kuberay(env={"AWS_SECRET_ACCESS_KEY": AWS_KEY})
    },
    "in the store": {"store": f"s3://{LOGIN}@shoal/runs"},
    "in the data": {"data": {**DATA, "train": f"s3://{LOGIN}@lake/train"}},
    "in the model": {"model": {"source": f"s3://{LOGIN}@models/minilm"}},
    "in an endpoint": {
        "store": {"uri": "s3://a", "access": {"endpoint_url": f"https://{LOGIN}@s3.example.com"}}
    },
    "in an endpoint's query": {
        "store": {
            "uri": "s3://a",
            "access": {"endpoint_url": f"https://s3.example.com?key={TOKEN}"},
        }
    },
    "as a key of the store": {"store": {"uri": "s3://a", "access": {"secret_key": AWS_KEY}}},
}


@pytest.mark.parametrize("changes", PLANTED.values(), ids=PLANTED)
def test_a_secret_in_the_job_is_refused_and_repeated_nowhere(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    tree = json.loads(job().model_dump_json(exclude_unset=True)) | changes
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    ((key, value),) = changes.items()
    by_override = f"{key}={json.dumps(value)}"
    path_without = tmp_path / "without.yaml"
    path_without.write_text(yaml.safe_dump(json.loads(job().model_dump_json(exclude_unset=True))))
    for file, overrides in ((path, ()), (path_without, (by_override,))):
        with pytest.raises(SpecError) as refused:
            load_spec(file, overrides)
        shown = render_error(refused.value) + repr(refused.value)
        assert not [canary for canary in CANARIES if canary in shown]
        assert "hint:" in shown


@pytest.mark.parametrize(
    "override",
    [
        f"cluster.env.AWS_SECRET_ACCESS_KEY={AWS_KEY}",
        f"cluster.env_secrets.HF_TOKEN={TOKEN}",
        f"cluster.env_from_secrets=[{TOKEN}]",
        f"store.access.secret_access_key={AWS_KEY}",
        f"cluster={{kind: kuberay, image: 7, env_from_secrets: [{TOKEN}]}}",
    ],
)
def test_a_secret_behind_set_is_repeated_nowhere(override: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(json.loads(job().model_dump_json(exclude_unset=True))))
    with pytest.raises(SpecError) as refused:
        load_spec(path, [override])
    shown = render_error(refused.value)
    assert not [canary for canary in CANARIES if canary in shown]


def test_no_manifest_holds_what_the_environment_of_its_maker_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, canary in zip(
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY"),
        CANARIES,
        strict=True,
    ):
        monkeypatch.setenv(name, canary)
    for kind in JOBS:
        made = rayjob(job(kind), user="alice", checkpoint_bytes=1)
        text = yaml.safe_dump_all([made, *disruption_budgets(made)])
        assert not [canary for canary in CANARIES if canary in text]


def test_a_study_on_kubernetes_checks_its_values_against_the_same_cluster() -> None:
    """Its jobs are made from the whole job, with all defaults."""
    spec = job(data=SEARCHED_DATA, search={"trials": 4}, workers=GPUS | {"count": 1})
    assert spec.search is not None
    tree = spec.model_dump(mode="json")
    assert parse_spec(tree, where="spec.json") == spec
