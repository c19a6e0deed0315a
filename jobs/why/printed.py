"""Rules about what drivers, workers and pods print: errors of their own, of Ray and of the store.

Our own errors say what to type: they are taken as they are. What others print is matched by words
that have stayed the same over their versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jobs.why.facts import Fact, Source
from jobs.why.rule import Context, Finding, Rule, short

_OF: frozenset[Source] = frozenset({"printed", "folder"})
_PRINTED: frozenset[Source] = frozenset({"printed"})


def own_errors(facts: Sequence[Fact], context: Context) -> Iterator[Finding]:
    """The last `error: ...` of ours that was printed, with its `hint: ...`."""
    printed = [fact for fact in facts if fact.source == "printed"]
    for place in range(len(printed) - 1, -1, -1):
        _, found, cause = printed[place].message.partition("error: ")
        if not found or not _is_ours(printed[place].message):
            continue
        hints = (fact.message for fact in printed[place + 1 : place + 4])
        hint = next((h.partition("hint: ")[2] for h in hints if "hint: " in h), "")
        remedy = f"{short(hint)}; then: {context.again}" if hint else _look(context)
        yield Finding("own-error", short(cause), remedy, (printed[place].text,))
        return


def _is_ours(line: str) -> bool:
    """Whether a line begins so, perhaps behind a name of who printed it."""
    before = line.partition("error: ")[0].strip()
    return not before or before.endswith((":", ")", "]"))


def _look(context: Context) -> str:
    return f"see more: shoal logs {context.run}; then: {context.again}"


_STORE = (
    "give head and workers the access: cluster.service_account, or keys by "
    "cluster.env_from_secrets; then: {again}; test it with: shoal check JOB.yaml"
)

RULES = (
    Rule(
        name="store-role",
        of=_OF,
        message=r"\((?P<code>\w+)\) when calling the AssumeRole\w* operation|"
        r"(?P<why>Not authorized to perform sts:AssumeRoleWithWebIdentity)",
        cause="the service account {account} cannot take its role at the cloud, so the store "
        "refuses the run ({code}{why})",
        remedy="correct the role's trust policy (it names namespace and service account), or "
        "name another account: {again} --set cluster.service_account=NAME",
    ),
    Rule(
        name="store-refuses",
        of=_OF,
        message=r"\((?P<code>AccessDenied|403|Forbidden|AllAccessDisabled)\)(?: when calling the "
        r"(?P<operation>\w+) operation)?|(?P<word>access denied for .*)|is not authorized to "
        r"perform: (?P<action>s3:\w+)",
        cause="the store refuses the run: {said}",
        remedy="allow it in the policy of the bucket or role ({action}{operation}); " + _STORE,
    ),
    Rule(
        name="store-keys",
        of=_OF,
        message=r"(?P<code>InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|"
        r"NoCredentialsError|Unable to locate credentials|no credentials were found)",
        cause="the store does not accept the run's keys, or it has none ({code})",
        remedy=_STORE,
    ),
    Rule(
        name="store-bucket",
        of=_OF,
        message=r"NoSuchBucket|has no bucket (?P<bucket>\S+)",
        cause="there is no such bucket: {said}",
        remedy="correct the URI (store, data or model.source of the job) or the endpoint, or make "
        "it: aws s3 mb s3://BUCKET",
    ),
    Rule(
        name="ray-token",
        of=_PRINTED,
        message=r"(?P<why>InvalidAuthToken|Invalid authentication token|Missing authentication "
        r"token|Authentication token is (?:missing|invalid)[^.]*|AuthenticationError)",
        cause="a part of the Ray cluster does not accept the token of another ({why})",
        remedy="KubeRay before 1.5.1 makes no tokens, and an image with another Ray reads none: "
        "do without: {again} --set cluster.auth=null; or make both new: {again}",
    ),
    Rule(
        name="ray-memory",
        of=_OF,
        message=r"(?P<why>(?:\d+ )?Workers? \(tasks / actors\) killed due to memory pressure|"
        r"[Tt]ask was killed due to the node running low on memory|"
        r"running low on memory|OutOfMemoryError: Task)",
        cause="Ray ended a worker's process, as the pod had too little memory left: {why}",
        remedy="give workers more: {again} --set workers.memory_gib={more_memory}; a new run may "
        "hold less at a time (batching.max_tokens_per_microbatch)",
    ),
    Rule(
        name="gpu-memory",
        of=_OF,
        message=r"(?P<why>(?:CUDA|HIP) out of memory[^.]*)",
        cause="a GPU ran out of memory: {why}",
        remedy="keep less: {again} --set model.activation_checkpointing=true; a new run may hold "
        "less at a time (batching.max_tokens_per_microbatch)",
    ),
    Rule(
        name="ray-room",
        of=_PRINTED,
        message=r"(?P<why>No available node types can fulfill[^.]*|could not find a node type to "
        r"satisfy the request[^.]*)",
        cause="Ray's autoscaler has no group of pods large enough: {why}",
        remedy="pods are as large as workers.cpus, workers.gpus and workers.memory_gib say; see "
        "what asks for more: shoal status {run}",
    ),
    Rule(
        name="dashboard-unreachable",
        of=_PRINTED,
        message=r"(?P<why>Failed to connect to Ray at address[^.]*|"
        r"(?:port=8265|:8265).*(?:Connection refused|Max retries|timed out|Name or service)|"
        r"Failed to resolve \S*head-svc\S*|(?:Connection refused|Max retries exceeded).*8265)",
        cause="the submitter cannot reach Ray's dashboard on the head: {why}",
        remedy="see whether the head is up: shoal logs {run} --pods; a network policy must let the "
        "pods of a run reach port 8265 of its head (k8s/base does); then: {again}",
    ),
    Rule(
        name="module-missing",
        of=_PRINTED,
        message=r"(?P<why>ModuleNotFoundError: .*|ImportError: .*)",
        cause="the image {image} lacks what the run imports: {why}",
        remedy="use an image with shoal[train] of this version, as k8s/Dockerfile makes it: "
        "{again} --set cluster.image=REGISTRY/NAME:TAG",
    ),
    Rule(
        name="disk-full",
        of=_OF,
        message=r"No space left on device",
        cause="a disk is full: {said}",
        remedy="a new run may ask for more (data.cache_gib, {cache} now); of a run on Kubernetes: "
        "{again} --set 'cluster.cache={{kind: ephemeral}}'",
    ),
)
