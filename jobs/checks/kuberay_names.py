"""Whether what the job names in Kubernetes is there: the image's form, secrets, config maps, the
service account, classes, the claim. Values of secrets are never asked for. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cluster.kuberay_survey import Answer, Survey
from jobs.checks.finding import Finding, not_checked, ok, problem, warning
from jobs.cluster_spec import Claim, EphemeralVolume, KubeRayCluster
from jobs.image import parse_image
from jobs.spec import JobSpec

_MANY_NODES = ("ReadWriteMany", "ReadOnlyMany")


def check_image(cluster: KubeRayCluster) -> Iterator[Finding]:
    """Whether the job says which image it means; its form is right, or there were no job."""
    reference = parse_image(cluster.image)
    if reference is None or reference.is_fixed:
        return
    lacks = "has no tag, so that latest is taken" if reference.tag is None else "has the tag latest"
    yield warning(
        "cluster.image",
        f"cluster.image {cluster.image} {lacks}: pods of one run, and a resume, may get different "
        "images",
        "name a tag that is not moved, or a digest, as in: "
        f"{cluster.image.removesuffix(':latest')}:0.1.0",
    )


def check_names(spec: JobSpec, cluster: KubeRayCluster, found: Survey) -> Iterator[Finding]:
    """What was looked at, and what may not be looked at."""
    namespace = f"in the namespace {cluster.namespace}"
    by_key: dict[str, Iterable[str]] = {
        "image_pull_secrets": cluster.image_pull_secrets,
        "env_from_secrets": cluster.env_from_secrets,
        "env_secrets": dict.fromkeys(held.secret for held in cluster.env_secrets.values()),
    }
    for key, names in by_key.items():
        make = (
            "kubectl create secret docker-registry {name} --docker-server ... "
            if key == "image_pull_secrets"
            else "kubectl create secret generic {name} --from-literal KEY=... "
        )
        for name in names:
            hint = f"{make.format(name=name)}--namespace {cluster.namespace}, or name another"
            yield _named(f"cluster.{key}", f"secret {name}", namespace, found, hint)
    for name in cluster.env_from_config_maps:
        hint = f"kubectl create configmap {name} --from-literal KEY=... --namespace "
        yield _named(
            "cluster.env_from_config_maps",
            f"config map {name}",
            namespace,
            found,
            f"{hint}{cluster.namespace}, or name another",
        )
    if cluster.service_account is not None:
        yield _named(
            "cluster.service_account",
            f"service account {cluster.service_account}",
            namespace,
            found,
            f"see those that are there: kubectl get serviceaccounts --namespace "
            f"{cluster.namespace}",
            answer=found["service account"],
        )
    if cluster.priority_class is not None:
        yield _named(
            "cluster.priority_class",
            f"priority class {cluster.priority_class}",
            "in the cluster",
            found,
            "see those that are there: kubectl get priorityclasses",
            answer=found["priority class"],
        )
    yield from _check_cache(spec, cluster, found)


def _named(
    part: str, what: str, where: str, found: Survey, hint: str, *, answer: Answer | None = None
) -> Finding:
    """`answer` is that of the question of this name, unless it is given."""
    answer = found[what] if answer is None else answer
    if answer.is_missing:
        return problem(part, f"there is no {what} {where}", hint)
    if answer.tree is None:
        return not_checked(part, f"whether the {what} is there: {answer.why}")
    keys = "; its keys and values were not read" if what.startswith("secret ") else ""
    return ok(part, f"the {what} is there{keys}")


def _check_cache(spec: JobSpec, cluster: KubeRayCluster, found: Survey) -> Iterator[Finding]:
    cache, part = cluster.cache, "cluster.cache"
    if isinstance(cache, EphemeralVolume) and cache.storage_class is not None:
        yield _named(
            part,
            f"storage class {cache.storage_class}",
            "in the cluster",
            found,
            "see those that are there: kubectl get storageclasses",
            answer=found["storage class"],
        )
    if not isinstance(cache, Claim):
        return
    claim = found["claim"]
    yield _named(
        part,
        f"volume claim {cache.name}",
        f"in the namespace {cluster.namespace}",
        found,
        f"see those that are there: kubectl get persistentvolumeclaims --namespace "
        f"{cluster.namespace}",
        answer=claim,
    )
    if claim.tree is None:
        return
    modes = (claim.tree.get("spec") or {}).get("accessModes") or ()
    phase = (claim.tree.get("status") or {}).get("phase")
    if phase == "Lost":
        yield problem(part, f"the volume of the claim {cache.name} is lost", "name another claim")
    if spec.workers.count > 1 and not any(mode in _MANY_NODES for mode in modes):
        yield warning(
            part,
            f"the claim {cache.name} is {', '.join(modes)}, so that all {spec.workers.count} "
            "workers must be on one node, or wait for ever",
            "name a claim that is ReadWriteMany, or set cluster.cache to {kind: node}",
        )
