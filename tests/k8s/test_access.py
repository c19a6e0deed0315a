"""Who may do what: exactly what the guide says, and nothing that leads further."""

from __future__ import annotations

import re

import pytest
from overlays import EXAMPLES, K8S, OVERLAYS, Object, built, of_kind, pods_of, rayjob_of

Rights = dict[str, set[tuple[str, str, str]]]
"""Of each Role: API group, resource, verb."""


def rights(overlay: str) -> Rights:
    return {
        name: {
            (group, resource, verb)
            for rule in role["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }
        for name, role in of_kind(built(overlay), "Role").items()
    }


def told_rights() -> tuple[Rights, dict[str, str]]:
    """What the guide's table says, and which Role is of one overlay alone."""
    told: Rights = {}
    only: dict[str, str] = {}
    text = (K8S / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"^\| `shoal-user.*$", text, re.MULTILINE):
        role, group, resources, verbs, without = (cell.strip() for cell in line.split("|")[1:-1])
        assert without
        (name,) = re.findall(r"`([^`]*)`", role)
        if overlay := re.search(r"\(([^)]*)\)", role):
            only[name] = overlay[1]
        group = "" if group == "core" else group.strip("`")
        told.setdefault(name, set()).update(
            (group, resource, verb)
            for resource in re.findall(r"`([^`]*)`", resources)
            for verb in verbs.split(", ")
        )
    return told, only


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_users_have_the_rights_that_the_guide_lists(overlay: str) -> None:
    told, only = told_rights()
    expected = {name: each for name, each in told.items() if only.get(name, overlay) == overlay}
    assert rights(overlay) == expected


def test_to_submit_and_stop_runs_rayjobs_are_enough() -> None:
    verbs = ("get", "list", "watch", "create", "patch", "delete")
    assert told_rights()[0]["shoal-user"] == {("ray.io", "rayjobs", verb) for verb in verbs}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_right_leads_to_secrets_into_pods_or_to_more_rights(overlay: str) -> None:
    for granted in rights(overlay).values():
        for group, resource, verb in granted:
            assert "*" not in (group, resource, verb)
            assert group != "rbac.authorization.k8s.io"
            assert resource not in {"secrets", "pods/exec", "serviceaccounts/token"}
            assert (resource, verb) != ("pods", "create")
    assert of_kind(built(overlay), "ClusterRole") == {}
    assert of_kind(built(overlay), "ClusterRoleBinding") == {}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_role_is_bound_to_the_group_of_users_and_to_nobody_else(overlay: str) -> None:
    bindings = of_kind(built(overlay), "RoleBinding")
    assert set(bindings) == set(rights(overlay))
    for name, binding in bindings.items():
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == ("Role", name)
        (subject,) = binding["subjects"]
        assert (subject["kind"], subject["name"]) == ("Group", "shoal-users")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pods_account_has_no_rights_and_no_token_of_its_own(overlay: str) -> None:
    (account,) = of_kind(built(overlay), "ServiceAccount").values()
    assert account["automountServiceAccountToken"] is False
    assert not _is_subject(account, of_kind(built(overlay), "RoleBinding").values())


def _is_subject(account: Object, bindings: object) -> bool:
    return account["metadata"]["name"] in str(bindings).split("'")


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_token_is_mounted_for_an_autoscaler_alone(example: str) -> None:
    """Which KubeRay gives a Role of the run's own, bound to the account of the head."""
    rayjob = rayjob_of(example)
    is_elastic = rayjob["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    for role, _, template in pods_of(rayjob):
        expected = role == "head" and is_elastic
        assert template["spec"]["automountServiceAccountToken"] is expected
