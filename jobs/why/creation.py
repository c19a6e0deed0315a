"""Rules about objects that could not be made: what the API refuses when KubeRay makes pods.

The same words come as an event of the Ray cluster (`FailedToCreateHeadPod`), as its condition
`ReplicaFailure`, before KubeRay 1.3 as its `status.reason`, and as `FailedCreate` of the
submitter's Job.
"""

from __future__ import annotations

from jobs.why.facts import Source
from jobs.why.rule import Rule

_OF: frozenset[Source] = frozenset({"event", "ray cluster"})

RULES = (
    Rule(
        name="service-account-missing",
        of=_OF,
        message=r'error looking up service account \S*?/(?P<name>[^:\s]+): serviceaccount "',
        cause="pods cannot be made, as there is no service account {name} in the namespace "
        "{namespace}",
        remedy="make it: kubectl create serviceaccount {name} --namespace {namespace}; or name "
        "another: {again} --set cluster.service_account=NAME",
    ),
    Rule(
        name="quota-exceeded",
        of=_OF,
        message=r"exceeded quota: (?P<quota>[^,]+), requested: (?P<asked>.+), used: (?P<used>.+), "
        r"limited: (?P<limit>.+)",
        cause="pods cannot be made, as the quota {quota} of the namespace {namespace} is used up: "
        "asked for {asked}; used {used}; limit {limit}",
        remedy="wait until others end, or ask for less: {again} --set workers.count=N; see it "
        "with: kubectl describe resourcequota {quota} --namespace {namespace}",
    ),
    Rule(
        name="quota-wants-limits",
        of=_OF,
        message=r"failed quota: (?P<quota>[^:]+): must specify (?P<keys>.+)",
        cause="pods cannot be made, as the quota {quota} of the namespace {namespace} wants {keys} "
        "for all of them, and the job gives none",
        remedy="say how much memory workers have: {again} --set workers.memory_gib={more_memory}",
    ),
    Rule(
        name="limit-range",
        of=_OF,
        message=r"(?P<rule>(?:maximum|minimum) \S+ usage per (?:Container|Pod) is [^.\],]+, but "
        r"(?:limit|request) is [^\],]+)|(?P<ratio>\S+ max limit to request ratio [^\],]+)",
        cause="pods cannot be made, as a limit range of the namespace {namespace} refuses them: "
        "{rule}{ratio}",
        remedy="fit workers.cpus, workers.memory_gib and cluster.head to it: {again} --set "
        "workers.memory_gib=N; see it with: kubectl describe limitrange --namespace {namespace}",
    ),
    Rule(
        name="pod-security",
        of=_OF,
        message=r'violates PodSecurity "(?P<standard>[^"]+)": (?P<what>.+)',
        cause="pods cannot be made, as they violate the Pod Security Standard {standard} of the "
        "namespace {namespace}: {what}",
        remedy="pods of this version of Shoal meet it: if the RayJob was made by hand or by an "
        "older one, {again}; if something adds containers to pods (a mesh, an agent), ask the "
        "administrator",
    ),
    Rule(
        name="priority-class-missing",
        of=_OF,
        message=r"no PriorityClass with name (?P<name>\S+) was found",
        cause="pods cannot be made, as there is no priority class {name} in the cluster",
        remedy="see those that are there: kubectl get priorityclasses; then: {again} --set "
        "cluster.priority_class=NAME",
    ),
    Rule(
        name="admission-unreachable",
        of=_OF,
        message=r'failed calling webhook "(?P<hook>[^"]+)"',
        cause="pods cannot be made, as the cluster's admission webhook {hook} does not answer",
        remedy="tell the cluster's administrator, and wait: it is tried again by itself",
    ),
    Rule(
        name="admission-refuses",
        of=_OF,
        message=r'(?:admission webhook "(?P<hook>[^"]+)"|ValidatingAdmissionPolicy (?P<policy>'
        r"'?[^ ]+)).*? denied (?:the )?request:?\s*(?P<why>.*)",
        cause="pods cannot be made, as a rule of the cluster refuses them ({hook}{policy}): {why}",
        remedy="change the job as it asks (labels: cluster.labels; image: cluster.image), or ask "
        "the cluster's administrator; then: {again} --set cluster.KEY=VALUE",
    ),
    Rule(
        name="creation-refused",
        of=_OF,
        message=r"(?:pods?|jobs?\.batch|rayclusters?\.ray\.io) \"?[^ ]+ (?:is|are) (?:forbidden|"
        r"invalid): (?P<why>.+)",
        cause="Kubernetes refuses what KubeRay makes for the run: {why}",
        remedy="see what it was given: shoal render {run}; ask the cluster's administrator about "
        "the rule; then: {again} --set KEY=VALUE",
    ),
)
