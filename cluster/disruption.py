"""What a run's pods may be taken away for: budgets beside its RayJob. Pure."""

from __future__ import annotations

from cluster.placement import Manifest
from cluster.pods import selector_of


def disruption_budgets(rayjob: Manifest) -> list[Manifest]:
    """PodDisruptionBudgets of a RayJob that `build_rayjob` made, for draining nodes with care.

    The head is not evicted: a run that loses it starts anew on another cluster. Workers are evicted
    down to the fewest of an elastic run, and one at a time of any other; each saves its state
    first. Numbers are of pods that stay, as Kubernetes asks of pods whose controller it cannot
    scale. A single worker needs no budget: it may go as any other.
    """
    groups = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    fewest = sum(group["minReplicas"] for group in groups)
    most = sum(group["maxReplicas"] for group in groups)
    staying = {"head": 1, "worker": fewest if most > fewest else fewest - 1}
    return [_budget(rayjob, role, number) for role, number in staying.items() if number > 0]


def _budget(rayjob: Manifest, role: str, staying: int) -> Manifest:
    metadata = rayjob["metadata"]
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {
            "name": f"{metadata['name']}-{role}",
            "namespace": metadata["namespace"],
            "labels": {
                label: value
                for label, value in metadata["labels"].items()
                if not label.startswith("kueue.x-k8s.io/")
            },
        },
        "spec": {
            "minAvailable": staying,
            "selector": {"matchLabels": selector_of(metadata["labels"], role=role)},
        },
    }
