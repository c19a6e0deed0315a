"""Whether a cluster has what runs need: KubeRay, Kueue, rights, the namespace; and takes the run's
manifests. Pure."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence

from cluster.kuberay_errors import KUBERAY_VERSION
from cluster.kuberay_survey import RAY, REQUIRED_RIGHTS, Operator, Right, Survey, rights_of
from cluster.placement import Manifest
from jobs.checks.finding import (
    ENVIRONMENT_EXIT_CODE,
    Finding,
    not_checked,
    ok,
    problem,
    problems_of,
    warning,
)
from jobs.spec import KubeRayCluster

PART, RIGHTS, NAMESPACE = "cluster", "cluster.rights", "cluster.namespace"
_FIRST_VERSION = (1, 4)
_NO_DRY_RUN = "does not support dry run"


def check_api(
    cluster: KubeRayCluster, found: Survey, *, manifests: Sequence[Manifest]
) -> Iterator[Finding]:
    """Of an API that was reached. `manifests` are those that were tried."""
    yield from _check_kuberay(cluster, found)
    yield from _check_rights(cluster, found)
    is_there = yield from _check_namespace(cluster, found, manifests[0])
    if is_there and not found[RAY].is_missing:
        for manifest in manifests:
            yield from _check_dry_run(found, manifest)


def _check_kuberay(cluster: KubeRayCluster, found: Survey) -> Iterator[Finding]:
    kubernetes = (found["version"].tree or {}).get("gitVersion", "Kubernetes")
    at = f"Kubernetes {kubernetes} at {found.server}"
    api = found[RAY]
    if api.is_missing and api.error is not None:
        yield from problems_of(PART, api.error)
        return
    if api.tree is None:
        yield ok(PART, at)
        yield not_checked(PART, f"whether KubeRay is there: {api.why}")
        return
    operators = found.operators(RAY)
    ours = [o for o in operators if not o.watched or cluster.namespace in o.watched]
    operator = next(iter(ours or operators), None)
    version = operator.version if operator is not None else None
    yield ok(PART, f"{at}, with KubeRay{f' {version}' if version else ''}")
    if operator is None:
        seen = found[f"operator of {RAY}"]
        why = seen.why if seen.error is not None else "its operator was not found by its labels"
        yield not_checked(PART, f"which version of KubeRay runs, and whether it does: {why}")
    elif not ours:
        yield _of_other_namespaces(cluster, operator)
    elif not operator.is_available:
        yield problem(
            PART,
            f"KubeRay's operator {operator.name} in the namespace {operator.namespace} is not "
            "running, so that nobody takes up a RayJob",
            f"ask an administrator to see: kubectl describe deployment {operator.name} --namespace "
            f"{operator.namespace}",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )
    if version is not None:
        yield from _check_version(cluster, version)


def _of_other_namespaces(cluster: KubeRayCluster, operator: Operator) -> Finding:
    return problem(
        NAMESPACE,
        f"KubeRay's operator {operator.name} in the namespace {operator.namespace} takes up "
        f"RayJobs of {', '.join(operator.watched)}, not of {cluster.namespace}",
        f"set cluster.namespace to one of these, or ask an administrator to add "
        f"{cluster.namespace} to watchNamespace of KubeRay's values",
        exit_code=ENVIRONMENT_EXIT_CODE,
    )


def _check_version(cluster: KubeRayCluster, version: str) -> Iterator[Finding]:
    upgrade = f"ask an administrator for KubeRay {KUBERAY_VERSION}"
    number = _numbers(version)
    if number < _FIRST_VERSION:
        yield warning(
            PART, f"KubeRay {version} is older than 1.4: runs are not made for it", upgrade
        )
    if cluster.auth == "token" and number < (1, 5, 1):
        yield problem(
            "cluster.auth",
            f"cluster.auth is token, but KubeRay {version} knows no tokens before 1.5.1",
            f"set cluster.auth to null, or {upgrade}",
        )
    if cluster.start_deadline_minutes is not None and number < (1, 6):
        yield warning(
            "cluster.start_deadline_minutes",
            f"cluster.start_deadline_minutes has no effect with KubeRay {version}, before 1.6",
            f"remove it, or {upgrade}",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("-")[0]))


# ----------------------------------------------------------------------------------------- rights


def _check_rights(cluster: KubeRayCluster, found: Survey) -> Iterator[Finding]:
    """Those without which nothing is submitted or stopped are problems, others say what is lost."""
    rights = rights_of(cluster)
    known = {right: found.is_allowed(right) for right in rights}
    denied = [right for right, is_allowed in known.items() if is_allowed is False]
    unknown = [right for right, is_allowed in known.items() if is_allowed is None]
    namespace = cluster.namespace
    if missing := [right for right in denied if right.lost is None]:
        verbs = ", ".join(right.verb for right in missing)
        yield problem(
            RIGHTS,
            f"you have no right to {verbs} rayjobs.ray.io in the namespace {namespace}",
            f"ask an administrator for a role in the namespace with: {_rule(missing)}; "
            "or let somebody who has the right start the run: shoal submit JOB.yaml --record-only",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )
    elif not any(right in unknown for right in REQUIRED_RIGHTS):
        verbs = ", ".join(right.verb for right in REQUIRED_RIGHTS)
        yield ok(RIGHTS, f"{verbs} rayjobs.ray.io in the namespace {namespace}")
    if optional := [right for right in denied if right.lost is not None]:
        by_loss: dict[str, list[Right]] = {}
        for right in optional:
            by_loss.setdefault(str(right.lost), []).append(right)
        told = "; ".join(
            f"{' and '.join(r.verb for r in rights)} {rights[0].whole_resource}, so {lost}"
            for lost, rights in by_loss.items()
        )
        yield warning(
            RIGHTS,
            f"runs work, but in the namespace {namespace} you have no right to {told}",
            f"ask an administrator for a role with: {_rule(optional)}",
        )
    if unknown:
        (why, *_) = dict.fromkeys(found[f"{r.verb} {r.whole_resource}"].why for r in unknown)
        told = ", ".join(f"{right.verb} {right.whole_resource}" for right in unknown)
        yield not_checked(RIGHTS, f"whether you have the right to {told}: {why}")


def _rule(rights: Sequence[Right]) -> str:
    """Rules of RBAC, one for each resource."""
    verbs: dict[tuple[str, str], list[str]] = {}
    for right in rights:
        verbs.setdefault((right.group, right.resource), []).append(right.verb)
    return "; ".join(
        f'{{apiGroups: ["{group}"], resources: ["{resource}"], verbs: [{", ".join(some)}]}}'
        for (group, resource), some in verbs.items()
    )


# ------------------------------------------------------------------------- namespace and manifests


def _check_namespace(
    cluster: KubeRayCluster, found: Survey, rayjob: Manifest
) -> Generator[Finding, None, bool]:
    """Returns whether the namespace may be there: whoever may not read it learns that from the dry
    run."""
    answer, name = found["namespace"], cluster.namespace
    tried = found[f"dry run of {rayjob['metadata']['name']}"]
    is_refused = tried.error is not None and tried.error.reason == "NamespaceMissing"
    if is_refused or (answer.error is not None and answer.error.is_missing):
        yield problem(
            NAMESPACE,
            f"there is no namespace {name} in the cluster at {found.server}",
            "set cluster.namespace to one that is there, or name another cluster with --context; "
            "see them with: kubectl get namespaces",
        )
        return False
    phase = ((answer.tree or {}).get("status") or {}).get("phase")
    if phase == "Terminating":
        yield problem(
            NAMESPACE,
            f"the namespace {name} is being deleted, and takes no run any more",
            "set cluster.namespace to another one",
        )
        return False
    if answer.tree is not None:
        yield ok(NAMESPACE, f"{name} is there")
    elif tried.tree is None:
        yield not_checked(NAMESPACE, f"whether the namespace {name} is there: {answer.why}")
    return True


def _check_dry_run(found: Survey, manifest: Manifest) -> Iterator[Finding]:
    """What the API, its quotas and its webhooks say to a manifest. A budget that is not let in is
    left out by a submit. A right that is missing is told with the others."""
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    answer = found[f"dry run of {name}"]
    if answer.error is None:
        if kind == "RayJob":
            yield ok(PART, "the RayJob is accepted by a strict dry run")
    elif answer.error.lacks_right:
        return
    elif answer.error.code is None or _NO_DRY_RUN in answer.why:
        yield not_checked(PART, f"whether the cluster accepts the {kind} {name}: {answer.why}")
    elif kind == "RayJob" or not answer.error.is_forbidden:
        yield from problems_of(PART, answer.error)
    else:
        for refused in answer.error.problems:
            yield warning(
                PART,
                f"{refused.message}; without it nodes may be drained under the run",
                refused.hint or "ask an administrator of the cluster",
            )
