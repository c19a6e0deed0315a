"""The job file's `cluster:`: where the workers are, and what their pods on Kubernetes are given.

What a key becomes in the manifest of KubeRay is in `cluster.rayjob` and `cluster.pods`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from jobs.image import parse_image
from jobs.spec_parts import SpecPart, Text, UnfitError

MAX_KUBERNETES_NAME_CHARACTERS = 63
"""The limit of labels, in which some of the names are repeated."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_LABEL_PART = re.compile(r"[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_KEY = re.compile(r"[-._A-Za-z0-9]{1,253}")
_VALUE_OF_A_SECRET = re.compile(
    r"(AKIA|ASIA)[0-9A-Z]{12,}|hf_\w{8,}|gh[pousr]_\w{8,}|github_pat_\w+|sk-[\w-]{16,}"
    r"|xox[a-z]-[\w-]+|glpat-[\w-]+|eyJ[\w-]{8,}\.[\w-]+.*"
)
"""Values that say by their form that they are keys."""
_HEXADECIMAL = re.compile(r"[0-9a-f]{32,}")
_OWN_VARIABLES = ("HOME", "HF_HOME")
_OWN_VARIABLE_PREFIXES = ("SHOAL_", "RAY_", "KUBERAY_")
_OWN_LABEL_PREFIXES = ("shoal/", "ray.io/", "app.kubernetes.io/", "kueue.x-k8s.io/")


def _kubernetes_name(name: str) -> str:
    """A name as most objects of Kubernetes have one (a DNS-1123 subdomain); UnfitError else."""
    if not _NAME.fullmatch(name) or len(name) > MAX_KUBERNETES_NAME_CHARACTERS:
        raise UnfitError(
            f"must be at most {MAX_KUBERNETES_NAME_CHARACTERS} lower-case letters, digits, hyphens "
            "and dots, with a letter or digit first and last",
            "write the name of an object in Kubernetes, such as team-a",
            shows_value=not _VALUE_OF_A_SECRET.fullmatch(name),
        )
    return name


def _name_of_a_secret(name: str) -> str:
    """As above; what is wrong may be the secret's value, and is not repeated."""
    if (
        not _NAME.fullmatch(name)
        or len(name) > MAX_KUBERNETES_NAME_CHARACTERS
        or _VALUE_OF_A_SECRET.fullmatch(name)
        or _HEXADECIMAL.fullmatch(name)
    ):
        raise UnfitError(
            "must be the name of a secret in Kubernetes, never its value: the job file is stored "
            "with the run",
            "make a secret: kubectl create secret generic NAME --from-literal=KEY=..., and write "
            "NAME",
            shows_value=False,
        )
    return name


def _key_of_a_secret(key: str) -> str:
    if not _SECRET_KEY.fullmatch(key) or _VALUE_OF_A_SECRET.fullmatch(key):
        raise UnfitError(
            "must be the name of a key in the secret (letters, digits, hyphens, dots and _), never "
            "its value",
            "look at the keys: kubectl describe secret NAME",
            shows_value=False,
        )
    return key


def _label(label: str) -> str:
    """A label's key: `name` or `prefix/name`."""
    prefix, slash, name = label.rpartition("/")
    if (
        not _LABEL_PART.fullmatch(name)
        or len(name) > 63
        or (slash and not (_NAME.fullmatch(prefix) and len(prefix) <= 253))
    ):
        raise UnfitError(
            "must be the key of a label: letters, digits, hyphens, dots and _, with a domain and a "
            "slash in front where it has one",
            "write for example topology.kubernetes.io/zone",
        )
    return label


def _label_value(value: str) -> str:
    if _VALUE_OF_A_SECRET.fullmatch(value):
        raise UnfitError(
            "must hold no secret: labels are read by everybody",
            "name a secret in cluster.env_from_secrets",
            shows_value=False,
        )
    if value and (not _LABEL_PART.fullmatch(value) or len(value) > 63):
        raise UnfitError(
            "must be the value of a label: at most 63 letters, digits, hyphens, dots and _, with a "
            "letter or digit first and last",
            'write true and numbers in quotes, as in "true"',
        )
    return value


def _own_label(label: str) -> str:
    if label.startswith(_OWN_LABEL_PREFIXES):
        raise UnfitError(
            "must not begin with "
            f"{', '.join(_OWN_LABEL_PREFIXES)}: Shoal, KubeRay and Kueue set those labels",
            "choose another label; a queue of Kueue is cluster.queue",
        )
    return label


def _variables(named: object) -> object:
    """Looked at before what they are from, whose errors would name them: a name may be a value."""
    for name in named if isinstance(named, dict) else ():
        if not _VARIABLE.fullmatch(name) or _VALUE_OF_A_SECRET.fullmatch(name):
            raise UnfitError(
                "must have names of environment variables as keys: letters, digits and _, no digit "
                "first",
                "write for example HF_TOKEN: {secret: hub, key: token}",
                shows_value=False,
            )
        if name in _OWN_VARIABLES or name.startswith(_OWN_VARIABLE_PREFIXES):
            raise UnfitError(
                f"has {name}, but Shoal and KubeRay set {', '.join(_OWN_VARIABLES)} and what "
                f"begins with {', '.join(_OWN_VARIABLE_PREFIXES)}",
                f"remove {name}",
            )
    return named


def _image(image: str) -> str:
    if parse_image(image) is None:
        raise UnfitError(
            "must be an image as containers are named, without a scheme or a login",
            "write REGISTRY/NAME:TAG, as in registry.example.com/shoal:0.1.0; registries are "
            "logged in to by cluster.image_pull_secrets",
            shows_value="@" not in image.partition("@sha256:")[0],
        )
    return image


def _only_names(example: str) -> Callable[[object], object]:
    """Refuses a single text where names are listed, or a text where a secret's key is described:
    it may be the value of a secret, which pydantic's own errors would show."""

    def check(value: object) -> object:
        if isinstance(value, str | int | float):
            raise UnfitError(
                "must hold names of secrets, never a value: the job file is stored with the run",
                f"write {example}",
                shows_value=False,
            )
        return value

    return check


KubernetesName = Annotated[Text, AfterValidator(_kubernetes_name)]
SecretName = Annotated[Text, AfterValidator(_name_of_a_secret)]
SecretNames = Annotated[
    tuple[SecretName, ...], BeforeValidator(_only_names("a list, as in [object-store]"))
]
Label = Annotated[Text, AfterValidator(_label)]
LabelValue = Annotated[str, AfterValidator(_label_value)]
OwnLabel = Annotated[Label, AfterValidator(_own_label)]


class LocalCluster(SpecPart):
    """This machine, or the Ray cluster that RAY_ADDRESS names."""

    kind: Literal["local"]
    """Start Ray here, or attach to RAY_ADDRESS."""


class SecretKey(SpecPart):
    """One key of a secret of Kubernetes."""

    secret: SecretName
    """Name of the secret, in the run's namespace."""
    key: Annotated[Text, AfterValidator(_key_of_a_secret)]
    """Name of the key in it whose value is meant."""


class Toleration(SpecPart):
    """A taint of nodes that keeps these pods away no longer."""

    key: Label
    """Key of the taint."""
    value: LabelValue | None = None
    """Its value; null: any."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Its effect; null: any."""


class NodeRule(SpecPart):
    """What a label of a node must be; without values, that the node has it."""

    label: Label
    """The label, such as node.kubernetes.io/instance-type."""
    any_of: tuple[LabelValue, ...] = ()
    """It has one of these values."""
    none_of: tuple[LabelValue, ...] = ()
    """It has none of these values; a node without the label will do."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> NodeRule:
        if self.any_of and self.none_of:
            raise UnfitError(
                f"has any_of and none_of for {self.label}, but the first leaves nothing to exclude",
                "remove none_of",
            )
        return self


class Nodes(SpecPart):
    """Which nodes pods may be on."""

    selector: dict[Label, LabelValue] = Field(default_factory=dict)
    """Labels that a node must have, with their values."""
    required: tuple[NodeRule, ...] = ()
    """Rules that a node must meet, all of them."""
    preferred: Annotated[tuple[NodeRule, ...], Field(max_length=6)] = ()
    """Rules that decide among the nodes left; each outweighs all after it."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that do not keep the pods away. That of the GPU's resource need not be told."""


class Head(SpecPart):
    """The pod with Ray's head and the driver. It trains nothing."""

    cpus: PositiveInt = 2
    """CPU cores."""
    memory_gib: PositiveFloat = 4.0
    """Memory: Ray's own servers, its dashboard, and the driver."""
    nodes: Nodes = Nodes()
    """Nodes on which it may be."""


class Gpu(SpecPart):
    """What a GPU is called in this Kubernetes."""

    resource: Label = "nvidia.com/gpu"
    """The resource that a pod asks for, such as amd.com/gpu or nvidia.com/mig-3g.40gb."""
    type: LabelValue | None = None
    """Type of GPU: the value that a node's `type_label` must have, such as
    NVIDIA-H100-80GB-HBM3; null: any."""
    type_label: Label = "nvidia.com/gpu.product"
    """The label that tells the type. NVIDIA's GPU operator sets this one; on GKE it is
    cloud.google.com/gke-accelerator."""


class Spot(SpecPart):
    """Nodes that the cloud may take back at any time. Workers are placed on them; the head is not,
    as a run starts anew on another cluster when it loses that."""

    label: Label
    """Label of such nodes: cloud.google.com/gke-spot, karpenter.sh/capacity-type,
    eks.amazonaws.com/capacityType, kubernetes.azure.com/scalesetpriority."""
    value: LabelValue = "true"
    """Its value there: "true", spot, SPOT, spot."""
    taint: Label | None = None
    """Key of their taint, which the workers tolerate; null: the label."""
    over_min: bool = False
    """true: `workers.min` workers are on other nodes, and only those beyond are on these."""
    head: bool = False
    """true: the head may be on them as well."""


class NodeDisk(SpecPart):
    """The cache lies on the node's own disk, and ends with the pod."""

    kind: Literal["node"] = "node"
    """An emptyDir, as large as `data.cache_gib` asks: on local SSDs where the nodes keep pods'
    files on them."""


class EphemeralVolume(SpecPart):
    """The cache lies in a volume that is made for each pod, and ends with it."""

    kind: Literal["ephemeral"]
    """A generic ephemeral volume, as large as `data.cache_gib` asks."""
    storage_class: KubernetesName | None = None
    """Its storage class, such as one of local NVMe disks; null: the cluster's default."""


class Claim(SpecPart):
    """The cache lies in a volume that is there, and outlives the run."""

    kind: Literal["claim"]
    """A PersistentVolumeClaim. In a file system that pods share each has a folder of its own."""
    name: KubernetesName
    """Name of the claim; with several workers one that many nodes may write (ReadWriteMany)."""


class Prices(SpecPart):
    """What an hour costs, in any one currency; `shoal plan` adds it up over the pods."""

    gpu_hour: NonNegativeFloat = 0.0
    """Of a GPU (`gpu.resource`)."""
    cpu_hour: NonNegativeFloat = 0.0
    """Of a CPU core."""
    memory_gib_hour: NonNegativeFloat = 0.0
    """Of a GiB of memory."""

    @model_validator(mode="after")
    def _has_a_price(self) -> Prices:
        if not (self.gpu_hour or self.cpu_hour or self.memory_gib_hour):
            raise UnfitError(
                "has no price, so that nothing can be added up",
                "set gpu_hour, cpu_hour or memory_gib_hour, or remove cluster.prices",
            )
        return self


class KubeRayCluster(SpecPart):
    """A Ray cluster of the run's own on Kubernetes, started and ended by KubeRay as a RayJob.

    Secrets are named, never written here: their values stay in Kubernetes.
    """

    kind: Literal["kuberay"]
    """A RayJob, which `shoal render` prints for kubectl."""
    image: Annotated[Text, AfterValidator(_image)]
    """Container image of all pods, with shoal[train] and a user of id 1000, as k8s/Dockerfile
    makes it."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] | None = None
    """When a node fetches the image; null: Always for the tag latest, else IfNotPresent."""
    image_pull_secrets: SecretNames = ()
    """Secrets with which the image is pulled from its registry."""
    namespace: KubernetesName = "default"
    """Namespace of the RayJob."""
    labels: dict[OwnLabel, LabelValue] = Field(default_factory=dict)
    """Labels of the RayJob and all its pods besides Shoal's, such as a team or a cost centre."""
    service_account: KubernetesName | None = None
    """Service account of head and workers, through which clouds grant access to stores (web
    identity); null: the namespace's default."""
    env_from_secrets: SecretNames = ()
    """Secrets whose keys become environment variables of head and workers, such as
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or HF_TOKEN."""
    env_from_config_maps: tuple[KubernetesName, ...] = ()
    """Config maps whose keys become environment variables of head and workers, for what is no
    secret, such as MLFLOW_TRACKING_URI or NCCL_SOCKET_IFNAME."""
    env_secrets: Annotated[
        dict[str, Annotated[SecretKey, BeforeValidator(_only_names("{secret: NAME, key: KEY}"))]],
        BeforeValidator(_variables),
    ] = Field(default_factory=dict)
    """Environment variables of head and workers, each from one key of a secret:
    `HF_TOKEN: {secret: hub, key: token}`."""
    head: Head = Head()
    """The head's pod."""
    nodes: Nodes = Nodes()
    """Nodes on which workers may be."""
    pack: Label | None = None
    """Label of nodes, such as topology.kubernetes.io/zone: all workers are where it has one and the
    same value. null: anywhere."""
    spread: Label | None = None
    """Label of nodes, such as kubernetes.io/hostname: workers lie evenly over its values, as far
    as there is room. null: as the scheduler likes."""
    gpu: Gpu = Gpu()
    """What `workers.gpus` asks Kubernetes for."""
    spot: Spot | None = None
    """Nodes that may be taken back, for the workers; null: none are asked for."""
    priority_class: KubernetesName | None = None
    """Priority class of the pods; null: the cluster's default."""
    cache: Annotated[NodeDisk | EphemeralVolume | Claim, Field(discriminator="kind")] = NodeDisk()
    """Where workers keep rows, models and checkpoints under way."""
    shared_memory_gib: PositiveFloat = 0.5
    """Size of /dev/shm, which counts as memory of the pod: NCCL and Ray use it."""
    queue: KubernetesName | None = None
    """Local queue of Kueue in which the run waits for its turn; null: it starts at once. A run that
    changes its size there (`workers.min`, or a search without `max_concurrent`) needs Kueue's
    feature gate ElasticJobsViaWorkloadSlices."""
    queue_priority: KubernetesName | None = None
    """Kueue's WorkloadPriorityClass of the run; null: the priority of its pods."""
    suspend: bool = False
    """true: nothing is started until somebody sets `spec.suspend` of the RayJob to false."""
    auth: Literal["token"] | None = "token"
    """Who speaks to this Ray cluster needs a token, which KubeRay makes for it. null: nobody does;
    for KubeRay before 1.5.1, which knows no tokens."""
    backoff_limit: NonNegativeInt = 2
    """How often KubeRay starts the run again, on a new Ray cluster, after it has failed, as when
    the head is lost."""
    deadline_minutes: PositiveFloat | None = None
    """Longest time from the start of the pods to the end of the run, retries included, after which
    KubeRay ends it; null: none."""
    start_deadline_minutes: PositiveFloat | None = None
    """Longest wait for the pods, after which KubeRay gives up; null: none. For KubeRay 1.6 and
    later."""
    ttl_seconds: NonNegativeInt = 60
    """How long the Ray cluster outlives the run, for its last lines."""
    upload_mib_per_second: PositiveFloat = 50.0
    """How fast one pod writes to the store. A pod that must go is given the time to save a
    checkpoint at this rate, as far as the platform grants it."""

    prices: Prices | None = None
    """What an hour of the pods costs, for `shoal plan`; null: not known."""

    @model_validator(mode="after")
    def _queue_decides(self) -> KubeRayCluster:
        if self.queue is None and self.queue_priority is not None:
            raise UnfitError(
                f"has queue_priority {self.queue_priority}, without effect outside a queue",
                "set cluster.queue, or remove cluster.queue_priority; the priority of pods is "
                "cluster.priority_class",
            )
        if self.queue is not None and self.suspend:
            raise UnfitError(
                f"has suspend true, but in the queue {self.queue} it is Kueue who suspends and "
                "starts the run",
                "remove cluster.suspend, or cluster.queue",
            )
        return self

    @model_validator(mode="after")
    def _workers_are_together_or_apart(self) -> KubeRayCluster:
        if self.pack is not None and self.pack == self.spread:
            raise UnfitError(
                f"has pack and spread for {self.pack}: workers cannot be together and apart",
                "remove one of them",
            )
        return self
