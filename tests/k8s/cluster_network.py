"""Which connections NetworkPolicies allow, as a network that enforces them does.

Source: https://kubernetes.io/docs/concepts/services-networking/network-policies. A connection is
allowed where the policies of its source allow it out, and those of its destination in; a pod that
no policy selects for a direction is open in it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Pod:
    namespace: str
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Host:
    """Something outside of the pod network."""

    address: str


Peer = Pod | Host


@dataclass(frozen=True)
class Network:
    policies: tuple[Policy, ...]

    @classmethod
    def of(cls, objects: Iterable[Policy]) -> Network:
        """That of an overlay."""
        return cls(tuple(o for o in objects if o["kind"] == "NetworkPolicy"))

    def allows(self, source: Peer, destination: Peer, port: int, *, protocol: str = "TCP") -> bool:
        """Whether the connection comes about."""
        goes_out = self._passes(source, destination, "Egress", "to", port, protocol)
        return goes_out and self._passes(destination, source, "Ingress", "from", port, protocol)

    def _passes(
        self, pod: Peer, peer: Peer, direction: str, side: str, port: int, protocol: str
    ) -> bool:
        if isinstance(pod, Host):
            return True
        own = [
            policy["spec"]
            for policy in self.policies
            if policy["metadata"]["namespace"] == pod.namespace
            and direction in policy["spec"]["policyTypes"]
            and selects(policy["spec"]["podSelector"], pod.labels)
        ]
        rules = [rule for spec in own for rule in spec.get(direction.lower(), ())]
        return not own or any(
            _has_port(rule, port, protocol)
            and (side not in rule or any(_is_peer(p, peer, pod.namespace) for p in rule[side]))
            for rule in rules
        )


def _has_port(rule: Policy, port: int, protocol: str) -> bool:
    return "ports" not in rule or any(
        each["protocol"] == protocol and each["port"] == port for each in rule["ports"]
    )


def _is_peer(described: Policy, peer: Peer, namespace: str) -> bool:
    if "ipBlock" in described:
        if isinstance(peer, Pod):
            return False  # by labels alone: networks differ in what a pod's address matches
        address = ipaddress.ip_address(peer.address)
        return address in ipaddress.ip_network(described["ipBlock"]["cidr"])
    if isinstance(peer, Host):
        return False
    if "namespaceSelector" in described:
        of_namespace = {"kubernetes.io/metadata.name": peer.namespace}
        if not selects(described["namespaceSelector"], of_namespace):
            return False
    elif peer.namespace != namespace:
        return False
    return selects(described.get("podSelector", {}), peer.labels)


def selects(selector: Policy, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects what has these labels."""
    return all(
        labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()
    ) and all(_meets(term, labels) for term in selector.get("matchExpressions", ()))


def _meets(term: Policy, labels: Mapping[str, str]) -> bool:
    value = labels.get(term["key"])
    match term["operator"]:
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "In":
            return value in term["values"]
        case "NotIn":
            return value not in term["values"]
    raise AssertionError(term)
