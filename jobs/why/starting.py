"""Rules about pods that have a node and do not get on: images, configuration, volumes, probes."""

from __future__ import annotations

import re

from jobs.why.facts import Fact, Source
from jobs.why.rule import Context, Rule

_OF: frozenset[Source] = frozenset({"event", "container", "ray cluster"})
_PULL = r"(?:[Ff]ailed to pull image|ErrImagePull|[Bb]ack-off pulling image)"
_NAMED = re.compile(r"(?:pull|pulling|[Cc]ontainer) image \"(?P<image>[^\"]+)\"")
_LOGIN = (
    "make it: kubectl create secret docker-registry NAME --namespace {namespace} "
    "--docker-server=... ; then: {again} --set 'cluster.image_pull_secrets=[NAME]'"
)


def _probe(fact: Fact, context: Context) -> dict[str, str]:
    sizes = {
        "head": ("cluster.head.cpus=4", "cluster.head.memory_gib={more_head_memory}"),
        "worker": ("workers.cpus=N", "workers.memory_gib={more_memory}"),
    }.get(fact.role)
    room = "" if sizes is None else " --set ".join(sizes).format_map(context.fields)
    return {"room": f"; Ray needs more room: {context.again} --set {room}" if room else ""}


def _image(fact: Fact, context: Context) -> dict[str, str]:
    """The image that is meant: something may have added a container with another one."""
    named = _NAMED.search(fact.message)
    return {"image": named["image"] if named else context.fields["image"]}


def _made(fact: Fact, context: Context) -> dict[str, str]:
    return {"made": "configmap" if "configmap" in fact.message else "secret generic"}


RULES = (
    Rule(
        name="pull-secret-missing",
        of=_OF,
        reason="FailedToRetrieveImagePullSecret",
        message=r"image pull secrets \((?P<secrets>[^)]+)\)",
        cause="{who} cannot log in to the image's registry, as there is no secret {secrets} in "
        "the namespace {namespace}",
        remedy=_LOGIN,
    ),
    Rule(
        name="image-name-wrong",
        of=_OF,
        reason="InvalidImageName",
        cause="{who} cannot start, as the image's name is none: {said}",
        remedy="correct it: {again} --set cluster.image=REGISTRY/NAME:TAG",
    ),
    Rule(
        name="image-never-pulled",
        of=_OF,
        reason="ErrImageNeverPull",
        cause="{who} cannot start, as the image {image} is not on the node, and "
        "cluster.image_pull_policy is Never",
        remedy="{again} --set cluster.image_pull_policy=IfNotPresent",
        more=_image,
    ),
    Rule(
        name="image-not-allowed",
        of=_OF,
        message=rf"(?i){_PULL}.*?(?:pull access denied|may require authorization|"
        r"insufficient_scope|unauthorized|authentication required|no basic auth|"
        r"failed to authorize|failed to fetch (?:anonymous|oauth) token|denied:|"
        r"40[13] (?:Unauthorized|Forbidden)|requested access to the resource is denied)",
        cause="{who} cannot start: the registry does not give out the image {image}, which is "
        "not there or needs a login",
        remedy="see that the name is right (cluster.image); if the registry wants a login, name a "
        "secret with one; " + _LOGIN,
        more=_image,
    ),
    Rule(
        name="image-missing",
        of=_OF,
        message=rf"(?i){_PULL}.*?(?:not found|manifest unknown|no such image|NotFound|"
        r"name unknown|does not exist|404)",
        cause="{who} cannot start: the registry has no image {image}",
        remedy="correct the name or the tag, or push it: {again} --set "
        "cluster.image=REGISTRY/NAME:TAG",
        more=_image,
    ),
    Rule(
        name="image-wrong-platform",
        of=_OF,
        message=r"(?:no match for platform|exec format error)",
        cause="{who} cannot start: the image {image} is for processors of another kind than the "
        "node's",
        remedy="build it for the nodes (docker buildx build --platform linux/amd64,linux/arm64), "
        "or choose nodes: {again} --set 'cluster.nodes.selector={{kubernetes.io/arch: amd64}}'",
        more=_image,
    ),
    Rule(
        name="registry-unreachable",
        yields=True,
        of=_OF,
        message=rf"(?i){_PULL}.*?(?:timeout|timed out|dial tcp|connection refused|TLS|x509|"
        r"toomanyrequests|rate limit|50\d |context deadline exceeded|no such host)",
        cause="{who} cannot start: the image's registry does not answer the node as it should: "
        "{said}",
        remedy="it is tried again by itself; if it stays so, ask the cluster's administrator "
        "about the way from nodes to the registry, or use another one: {again} --set "
        "cluster.image=REGISTRY/NAME:TAG",
    ),
    Rule(
        name="image-pull",
        yields=True,
        of=_OF,
        reason="ErrImagePull|ImagePullBackOff|ImageInspectError|RegistryUnavailable|"
        "ContainersNotReady|Failed|BackOff",
        message=rf"{_PULL}|ImagePullBackOff",
        cause="{who} cannot start, as the image {image} cannot be pulled: {said}",
        remedy="see the name (cluster.image) and the secret for it (cluster.image_pull_secrets); "
        "see more with: kubectl describe pod {pod} --namespace {namespace}",
        more=_image,
    ),
    Rule(
        name="config-key-missing",
        of=_OF,
        message=r"couldn't find key (?P<key>\S+) in (?P<kind>Secret|ConfigMap) "
        r"(?P<space>[^/\s]+)/(?P<name>\S+)",
        cause="{who} cannot start, as the {kind} {name} has no key {key}",
        remedy="see its keys: kubectl describe {kind} {name} --namespace {namespace}; add the "
        "key, or correct cluster.env_secrets of the job",
    ),
    Rule(
        name="config-missing",
        of=_OF,
        message=r'(?P<kind>secret|configmap)s? "(?P<name>[^"]+)" not found',
        cause="{who} cannot start, as there is no {kind} {name} in the namespace {namespace}",
        remedy="make it: kubectl create {made} {name} --namespace {namespace} "
        "--from-literal=KEY=...; or correct cluster.env_from_secrets, "
        "cluster.env_from_config_maps or cluster.env_secrets",
        more=_made,
    ),
    Rule(
        name="runs-as-root",
        of=_OF,
        message=r"container has runAsNonRoot and image will run as root|"
        r"image has non-numeric user",
        cause="{who} cannot start, as the image {image} wants to run as root",
        remedy="use an image with the user 1000, as k8s/Dockerfile makes it: {again} --set "
        "cluster.image=REGISTRY/NAME:TAG",
        more=_image,
    ),
    Rule(
        name="volume-in-use",
        of=_OF,
        message=r"Multi-Attach error for volume \"(?P<volume>[^\"]+)\" (?P<why>.+)",
        cause="{who} cannot start, as the volume {volume} is attached to another node: {why}",
        remedy="wait until that pod is gone; workers on several nodes need a claim that many may "
        "write (ReadWriteMany), or a volume each: {again} --set "
        "'cluster.cache={{kind: ephemeral}}'",
    ),
    Rule(
        name="volume-not-mounted",
        of=_OF,
        reason="FailedMount|FailedAttachVolume|FailedMapVolume",
        cause="{who} cannot start, as a volume cannot be mounted: {said}",
        remedy="see the claim and its events: kubectl describe persistentvolumeclaims --namespace "
        "{namespace}; or use the node's disk: {again} --set 'cluster.cache={{kind: node}}'",
    ),
    Rule(
        name="container-not-created",
        yields=True,
        of=_OF,
        reason="CreateContainerConfigError|CreateContainerError|RunContainerError|"
        "StartError|FailedCreatePodSandBox|FailedPreStopHook|FailedPostStartHook",
        cause="{who} cannot start its container ({reason}): {said}",
        remedy="see more with: kubectl describe pod {pod} --namespace {namespace}; correct what "
        "it names, or ask the cluster's administrator",
    ),
    Rule(
        name="not-ready",
        yields=True,
        of=_OF,
        reason="Unhealthy",
        message=r"(?:Readiness|Liveness|Startup) probe (?:failed|errored)",
        cause="{who} did not answer Kubernetes' probes: Ray is not up there, or too slow",
        remedy="see what it prints: shoal logs {run} --pods{room}",
        more=_probe,
    ),
)
