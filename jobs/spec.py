"""Every knob that a user can set: `JobSpec` and its parts.

The job file is parsed once (`jobs.parse`) into a frozen `JobSpec`; the same JSON reaches every
worker.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from jobs.adapter_spec import Adapter as Adapter
from jobs.adapter_spec import Ia3Adapter as Ia3Adapter
from jobs.adapter_spec import LoraAdapter as LoraAdapter
from jobs.adapter_spec import PromptAdapter as PromptAdapter
from jobs.augment_spec import TextAugment as TextAugment
from jobs.cluster_spec import Gpu, LocalCluster
from jobs.cluster_spec import KubeRayCluster as KubeRayCluster
from jobs.optimizer_spec import Optimizer as Optimizer
from jobs.optimizer_spec import Plateau as Plateau
from jobs.seal import sealed
from jobs.search_spec import Search
from jobs.spec_parts import Fraction, Metric, Mode, Text
from jobs.spec_parts import SpecPart as SpecPart
from jobs.spec_parts import UnfitError as UnfitError

MAX_RUN_ID_CHARACTERS = 47
"""KubeRay derives other names from a RayJob's name; 47 keeps all of them under DNS-1035's 63."""
RUN_ID_SUFFIX_CHARACTERS = 6

MAX_AUTO_LANES = 64
"""Most lanes that `data.lanes: auto` chooses, unless there are more workers than that."""

RUN_ID_PATTERN = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)\s*")
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def _integer_as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def parse_bytes(value: object) -> object:
    """Bytes from `1.5 GiB`, `512 MiB` or a plain number; ValueError for any other text."""
    if isinstance(value, str):
        match = _BYTES.fullmatch(value)
        if match is None:
            raise ValueError("a size such as 512 MiB or 1.5 GiB is needed")
        return int(float(match[1]) * _UNITS[match[2]])
    return value


def format_bytes(num_bytes: float) -> str:
    """`1.5 GiB`: the largest unit that leaves at least one."""
    for unit, size in reversed(_UNITS.items()):
        if unit != "B" and num_bytes >= size:
            value = num_bytes / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{int(num_bytes)} B"


Label = Annotated[
    str,
    BeforeValidator(_integer_as_text),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer"}]}),
]
Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(gt=0),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^{_BYTES.pattern}$"},
                {"type": "integer", "exclusiveMinimum": 0},
            ]
        }
    ),
]


_LOGIN = re.compile(r"[^:/]*://([^/@]*@|[^/@:]*:(?!\d+(/|$))[^@]*@)")
"""A user, or a user and a password, which may hold a slash; not a port."""


def _without_login(uri: str) -> str:
    if _LOGIN.match(uri):
        raise UnfitError(
            "must not hold a user or password: the job file is stored with the run",
            "name a profile, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            shows_value=False,
        )
    return uri


Uri = Annotated[Text, AfterValidator(_without_login)]


class Task(SpecPart):
    """What is learned from which columns."""

    kind: Literal["text-classification"] = "text-classification"
    """One label for each text."""
    labels: Annotated[tuple[Label, ...], Field(min_length=2)]
    """The classes, in the order of the model's outputs."""
    text: Text = "text"
    """The column that holds the text."""
    label: Text = "label"
    """The column that holds the label: one of `labels`, or its position in them."""
    max_tokens: Annotated[int, Field(ge=8)] = 128
    """Tokens of a text that are used; what is longer is cut off."""
    augment: TextAugment | None = None
    """Changes of training texts, such as words that are left out; null: none."""
    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = None
    """What a row of each label counts in the loss that is trained on, 1 for those not given;
    balanced: rows / (labels * rows of the label); null: all alike. Losses of evaluations stay
    without it."""
    label_smoothing: Fraction = 0.0
    """Part of a row's target that is spread over all labels alike (Szegedy et al., 2016), for the
    loss that is trained on and told as train/loss; losses of evaluations stay without it."""

    @field_validator("labels")
    @classmethod
    def _labels_are_distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise UnfitError(
                f"must hold each label once; given twice: {', '.join(twice)}", "remove the second"
            )
        return labels


class Model(SpecPart):
    """The pretrained model and what is done to it before training."""

    source: Uri
    """A local folder, a folder in a store (`s3://...`), a run (its URI, or its id in this store),
    or a name on the Hugging Face hub."""
    revision: Text | None = None
    """Commit, tag or branch of a hub model; needed for one, so that a run can be repeated."""
    precision: Literal["float32", "tf32", "bfloat16", "auto"] = "auto"
    """Precision of the forward and backward pass; weights and optimizer stay float32. tf32: float32
    whose matrix products round their factors to 10 bits of mantissa, on GPUs only, which multiply
    those several times as fast. `auto`: bfloat16 on a GPU that has it, else float32."""
    freeze: tuple[Text, ...] = ()
    """Parameters that are not trained: a module's name (`embeddings`, `encoder.layer.0`), matched
    as whole parts of the parameter's path; in each part * stands for any text and ? for any
    character (`layer.?`)."""
    adapter: Adapter | None = None
    """Train few new weights and the head, and keep the model's own as they are: `{kind: lora}`,
    dora, ia3, prompt-tuning or prefix-tuning. null: train the model's own weights."""
    dropout: Fraction | None = None
    """Dropout of the encoder and the head; null leaves what the model's own configuration says."""
    compile: bool = False
    """Compile the model's repeated blocks for training (torch.compile): quicker steps, for a start
    that takes about a minute longer, on few cores several. Each worker needs a C++ compiler.
    Results differ by rounding, and evaluations run uncompiled. A run may change it when it is
    resumed."""
    activation_checkpointing: bool = False
    """Keep of the model's repeated blocks the inputs alone for the backward pass, and compute the
    rest again in it: far less memory, for about a third more time in each step. Gradients stay the
    same. A run may change it when it is resumed."""


class StoreAccess(SpecPart):
    """How one store is reached; what is absent comes from the standard AWS variables and profiles.

    Secrets are never written here: name a profile, or set the AWS variables.
    """

    endpoint_url: Uri | None = None
    """URL of an S3-compatible server; null: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or AWS itself."""
    region: Text | None = None
    """Region of the bucket; null: AWS_REGION, AWS_DEFAULT_REGION or the profile's."""
    profile: Text | None = None
    """Profile of the AWS configuration files."""
    anonymous: bool = False
    """Send unsigned requests, for public buckets."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """How the bucket is put into the URL; `auto`: path style for an own endpoint, else virtual."""
    ca_bundle: Text | None = None
    """File of certificate authorities for the endpoint; null: AWS_CA_BUNDLE or the system's."""
    server_side_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    """Encryption that is asked for on every write."""
    kms_key_id: Text | None = None
    """Key for aws:kms; null: the bucket's own."""
    conditional_writes: bool = True
    """false: for a store that ignores or refuses If-Match and If-None-Match. What must be new or
    unchanged is looked at before it is written then, which two writers at one moment can defeat."""

    @field_validator("endpoint_url")
    @classmethod
    def _endpoint_is_plain(cls, url: str | None) -> str | None:
        if url is not None:
            if not re.match(r"https?://[^/]", url):
                raise UnfitError(
                    "must be an http:// or https:// URL",
                    "write the whole URL, as in: endpoint_url: https://s3.example.com",
                )
            if "?" in url or "#" in url:
                raise UnfitError(
                    "must not hold a query, which may be a secret: the job file is stored with the "
                    "run",
                    "write the URL up to the ?",
                    shows_value=False,
                )
        return url


class StoreAt(SpecPart):
    """A place for runs and how it is reached."""

    uri: Uri
    """`s3://bucket/prefix`, or a local folder."""
    access: StoreAccess = StoreAccess()
    """Endpoint, region, profile; null keys come from the environment."""


def _store_from_text(value: object) -> object:
    return {"uri": value} if isinstance(value, str) else value


class Data(SpecPart):
    """The data sets, each a folder written by `shoal prepare`, and the order of their rows."""

    train: Uri
    """Folder of the training set: `s3://bucket/prefix` or a local path."""
    validation: Uri | None = None
    """Folder of the validation set; needed for early stopping and for choosing the best."""
    test: Uri | None = None
    """Folder of the test set; used twice: before training and, with the best model, after it."""
    access: StoreAccess = StoreAccess()
    """How the data's store is reached, where it differs from the environment."""
    sampling: Literal["balanced"] | dict[str, NonNegativeFloat] | None = None
    """How often a row of each label is used in an epoch, in the mean, 1 for those not given: 2.5 is
    twice or three times, drawn anew for each row and epoch; balanced: so that all labels have as
    many rows, and an epoch as many as the set; null: each row once."""
    seed: NonNegativeInt = 0
    """Seed of the order of rows, of dropout, of sampling and of the new head's weights."""
    lanes: PositiveInt | Literal["auto"] = "auto"
    """Runs into which an epoch is cut. A worker count that divides it reads each shard once;
    `auto`: the worker count, or the smallest number that all counts from `workers.min` to
    `workers.count` divide (above 64: as many of them as can be)."""
    window: PositiveInt = 16
    """Row groups of a lane among which rows are shuffled; shrinks to fit `stream_memory`."""
    stream_memory: Bytes = 2**30
    """Upper limit for the row groups that one worker holds in memory."""
    cache_gib: PositiveFloat = 20.0
    """Local disk, shared by the workers of a node, for fetched row groups. Model files and
    checkpoints under way come on top."""


class Batching(SpecPart):
    """How many rows make a step, and how they are cut to fit a device."""

    global_batch_size: PositiveInt = 32
    """Rows in one optimizer step, over all workers."""
    max_tokens_per_microbatch: PositiveInt | Literal["auto"] = 8192
    """Tokens, padding included, of one forward and backward pass of one worker, at most. A step
    takes as many micro-batches as it needs. With `packing`, 32 tokens of padding count as one.
    `auto`: as many as fit into memory and are quick, found by trying before the first step, and
    kept for the whole run."""
    launch_tokens: NonNegativeInt | Literal["auto"] = "auto"
    """What a micro-batch costs besides its tokens, in tokens: many make few micro-batches with more
    padding. `auto`: measured before the first step, and kept for the whole run."""
    packing: bool = False
    """true: the model's layers get the rows of a micro-batch one after the other, without padding;
    embeddings and head still see padded rows. For encoders whose positions lie in the embeddings,
    such as BERT, RoBERTa, DistilBERT and ELECTRA; any other is refused before the first step."""


class EarlyStopping(SpecPart):
    """When training ends because the model no longer improves."""

    metric: Metric = "validation/f1"
    """What is watched; f1, precision and recall are means over the classes."""
    mode: Mode = "max"
    """Whether smaller or larger is better."""
    patience: PositiveInt | None = 3
    """Evaluations in a row without improvement after which training stops; null: it never does, and
    `metric` only tells which checkpoint is the best."""
    min_delta: NonNegativeFloat = 0.0
    """Smallest change that counts as improvement."""


class Train(SpecPart):
    """How long training goes on and how it is watched."""

    epochs: PositiveInt = 3
    """Passes over the training set."""
    evaluate_every_steps: PositiveInt | None = None
    """Steps between evaluations; null: at the end of each epoch. The last step is always
    evaluated."""
    early_stopping: EarlyStopping | None = None
    """null: train all epochs, and take the lowest validation/loss as the best."""
    log_every_steps: PositiveInt = 10
    """Steps between two entries of loss and learning rate in the metrics."""
    max_skipped_in_a_row: NonNegativeInt = 5
    """Steps in a row whose gradient may be infinite or not a number: each is skipped, its update
    undone, its rows recorded as skipped. One more ends the run."""
    log_rows: bool = False
    """Debugging: write the ids of the rows of every step to the run folder."""


class Checkpoint(SpecPart):
    """When the state is saved and how much of it is kept."""

    every_steps: PositiveInt = 200
    """Steps between two checkpoints. Every improving evaluation and the last step save too."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_best: PositiveInt = 1
    """Best checkpoints that are kept besides."""
    max_failures_in_a_row: NonNegativeInt = 3
    """Checkpoints in a row that may fail to be stored while training goes on. When one more has
    failed, training waits for each save, while the store is away for `retries.wait_minutes` at
    most."""


class Workers(SpecPart):
    """The processes that train, and what each is given."""

    count: PositiveInt = 1
    """Number of workers."""
    min: PositiveInt | None = None
    """Fewest workers: the run starts with what the cluster has between `min` and `count`, goes on
    with fewer when a node is lost, and grows back. Batches, learning rate and the order of rows
    stay the same. null: always `count`."""
    resize_seconds: PositiveFloat = 60.0
    """With `min`: time between two looks whether the cluster has room for more workers. Each
    change saves the state and starts the workers anew."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each worker holds the whole model. fsdp: weights, gradients and optimizer state are cut
    over the workers (FSDP2), for models larger than one device; a node needs room for the whole
    model in its own memory while it starts. A run may change it when it is resumed."""
    cpus: PositiveInt = 1
    """CPU cores, and threads of torch, of one worker."""
    memory_gib: PositiveFloat | None = None
    """Memory that Ray reserves for one worker; null: not limited."""
    gpus: Literal[0, 1] = 0
    """GPUs of one worker."""

    @property
    def fewest(self) -> int:
        """The smallest number of workers with which the run goes on."""
        return self.count if self.min is None else self.min

    @property
    def counts(self) -> range:
        """Every number of workers that the run may have."""
        return range(self.fewest, self.count + 1)


class Retries(SpecPart):
    """How often the run starts again by itself."""

    worker_failures: NonNegativeInt = 2
    """Restarts from the last checkpoint after a worker has died, run out of memory or hung."""
    preemptions: NonNegativeInt | Literal["unlimited"] = "unlimited"
    """Restarts after the platform has announced that it takes a node; counted apart."""
    wait_minutes: PositiveFloat = 30.0
    """Longest wait for a store that does not answer, or for workers that the cluster does not
    have; then the run ends with exit code 3 and can be resumed."""
    hang_minutes: PositiveFloat = 10.0
    """Longest time in which no worker gets on: no step, no batch of an evaluation, no part of a
    checkpoint. Then the processes that wait or are stuck end, and the workers are started again."""


def auto_lanes(worker_counts: range) -> int:
    """The smallest number that all of the worker counts divide, the largest of them at least.

    Each lane costs memory, so beyond MAX_AUTO_LANES it is a multiple of the largest count alone:
    the one that most of the others divide as well.
    """
    most = worker_counts[-1]
    exact = math.lcm(*worker_counts)
    if exact <= max(MAX_AUTO_LANES, most):
        return exact
    multiples = range(most, max(MAX_AUTO_LANES, most) + 1, most)
    return max(multiples, key=lambda lanes: (sum(lanes % w == 0 for w in worker_counts), -lanes))


def no_validation_set(needed_by: str) -> UnfitError:
    """What is wrong with a job that compares what it does not measure."""
    return UnfitError(
        f"{needed_by} needs a validation set, but data.validation is not given",
        f"give data.validation the folder of the set, or remove {needed_by}",
    )


class JobSpec(SpecPart):
    """One fine-tuning job: what to train, on which data, with how many workers."""

    name: str
    """Start of the run's id: lower-case letters, digits and hyphens, a letter first."""
    task: Task
    model: Model
    data: Data
    batching: Batching = Batching()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    workers: Workers = Workers()
    retries: Retries = Retries()
    store: Annotated[StoreAt, BeforeValidator(_store_from_text)]
    """Where runs are kept: `s3://bucket/prefix` or a local folder, or `{uri: ..., access: ...}`."""
    store_lease: Literal["required", "none"] = "required"
    """required: one driver alone works on a run, by a lease that needs conditional writes. none:
    for stores without them; `store.access.conditional_writes` is false then, and of two drivers
    that are started at one moment both may work until one finds the other, within a minute."""
    cluster: Annotated[LocalCluster | KubeRayCluster, Field(discriminator="kind")] = LocalCluster(
        kind="local"
    )
    """Where the workers are: `{kind: local}`, or `{kind: kuberay, image: ...}`."""
    tracking: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Where metrics go besides the run folder's own. tensorboard: event files in the run folder.
    mlflow: the server of MLFLOW_TRACKING_URI. wandb: Weights & Biases. The last two are set by
    their own environment variables, and a resumed run goes on in the same tracked run."""
    search: Search | None = None
    """Many trials of this job with other values, of which the best is wanted; null: one run."""

    @model_validator(mode="before")
    @classmethod
    def _search_compares_what_stops(cls, tree: object) -> object:
        if not isinstance(tree, dict):
            return tree
        search, train = tree.get("search"), tree.get("train")
        stopping = train.get("early_stopping") if isinstance(train, dict) else None
        if not isinstance(search, dict) or "metric" in search or not isinstance(stopping, dict):
            return tree
        # A group that is wrong is told of at its own place only.
        try:
            watched = EarlyStopping.model_validate(stopping)
        except ValidationError:
            return tree
        inherited = {"metric": watched.metric, "mode": watched.mode}
        return {**tree, "search": {**inherited, **search}}

    @model_validator(mode="before")
    @classmethod
    def _no_lease_by_conditions(cls, tree: object) -> object:
        if not isinstance(tree, dict) or tree.get("store_lease") != "none":
            return tree
        store = _store_from_text(tree.get("store"))
        access = store.get("access", {}) if isinstance(store, dict) else None
        if not isinstance(store, dict) or not isinstance(access, dict):
            return tree  # and is refused for it
        return {**tree, "store": {**store, "access": {**access, "conditional_writes": False}}}

    @model_validator(mode="after")
    def _lease_has_conditions(self) -> JobSpec:
        if self.store_lease == "required" and not self.store.access.conditional_writes:
            raise UnfitError(
                "store.access.conditional_writes is false, but store_lease is required: a lease is "
                "held by conditional writes",
                "set store_lease: none",
            )
        return self

    @field_validator("name")
    @classmethod
    def _name_is_dns(cls, name: str) -> str:
        limit = MAX_RUN_ID_CHARACTERS - RUN_ID_SUFFIX_CHARACTERS - 1
        if not RUN_ID_PATTERN.fullmatch(name) or len(name) > limit:
            near = re.sub("[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789")[:limit].strip("-")
            raise UnfitError(
                f"must be at most {limit} lower-case letters, digits and hyphens, "
                "with a letter first and no hyphen last",
                f"write name: {near or 'sentiment'}",
            )
        return name

    @model_validator(mode="after")
    def _fewest_workers_are_few(self) -> JobSpec:
        fewest, most = self.workers.min, self.workers.count
        if fewest is not None and fewest > most:
            raise UnfitError(
                f"workers.min is {fewest}, but workers.count, the most workers, is {most}",
                f"set workers.count to {fewest} or more, or lower workers.min",
            )
        return self

    @model_validator(mode="after")
    def _tf32_has_gpus(self) -> JobSpec:
        if self.model.precision == "tf32" and not self.workers.gpus:
            raise UnfitError(
                "model.precision is tf32, which GPUs alone have, but workers.gpus is 0",
                "set workers.gpus to 1, or model.precision to float32",
            )
        return self

    @model_validator(mode="after")
    def _pods_are_as_the_workers(self) -> JobSpec:
        cluster = self.cluster
        if not isinstance(cluster, KubeRayCluster):
            return self
        if cluster.gpu != Gpu() and not self.workers.gpus:
            raise UnfitError(
                "cluster.gpu says what a GPU is called, but workers.gpus is 0",
                "set workers.gpus to 1, or remove cluster.gpu",
            )
        if cluster.spot is not None and cluster.spot.over_min and self.workers.min is None:
            raise UnfitError(
                "cluster.spot.over_min is true, but workers.min is not given, beyond which workers "
                "would be on spot nodes",
                "set workers.min, or remove cluster.spot.over_min to have all workers there",
            )
        return self

    @model_validator(mode="after")
    def _packed_rows_are_not_compiled(self) -> JobSpec:
        if self.model.compile and self.batching.packing:
            raise UnfitError(
                "model.compile and batching.packing are both true, but packed rows have other "
                "sizes in each micro-batch, for each of which the compiler would compile anew",
                "remove one of them",
            )
        return self

    @model_validator(mode="after")
    def _weights_are_of_labels(self) -> JobSpec:
        given = {"task.class_weights": self.task.class_weights, "data.sampling": self.data.sampling}
        for key, weights in given.items():
            if weights is None or isinstance(weights, str):
                continue
            for label in weights:
                if label not in self.task.labels:
                    near = difflib.get_close_matches(label, self.task.labels, n=1)
                    raise UnfitError(
                        f"{key} holds {label}, which is none of task.labels",
                        f"did you mean {near[0]}?"
                        if near
                        else f"name some of {', '.join(self.task.labels)}",
                    )
        return self

    @model_validator(mode="after")
    def _adapter_suits_the_rest(self) -> JobSpec:
        adapter = self.model.adapter
        if adapter is None:
            return self
        chosen = f"model.adapter.kind is {adapter.kind}"
        if self.model.freeze:
            raise UnfitError(
                f"{chosen}, with which all of the model's own weights but the head are frozen, so "
                "that model.freeze is without effect",
                "remove model.freeze",
            )
        if self.workers.strategy == "fsdp":
            raise UnfitError(
                f"{chosen}, but workers.strategy is fsdp, which cuts no model with an adapter",
                "set workers.strategy to ddp: an adapter's gradients and optimizer are small",
            )
        if isinstance(adapter, PromptAdapter) and self.batching.packing:
            raise UnfitError(
                f"{chosen}, but batching.packing is true, and packed rows have no virtual tokens",
                "remove batching.packing",
            )
        for key in ("compile", "activation_checkpointing"):
            if adapter.kind == "prefix-tuning" and getattr(self.model, key):
                raise UnfitError(
                    f"{chosen}, but model.{key} is true, and blocks that get keys and values from "
                    "outside cannot be run so",
                    f"remove model.{key}",
                )
        return self

    @model_validator(mode="after")
    def _optimizer_works_on_rows(self) -> JobSpec:
        kind = self.optimizer.kind
        if self.workers.strategy == "fsdp" and kind not in ("adamw", "sgd"):
            raise UnfitError(
                f"optimizer.kind is {kind}, but workers.strategy is fsdp, with which a worker has "
                "some rows of each weight, and only adamw and sgd are known to need no more",
                "set optimizer.kind to adamw, or workers.strategy to ddp",
            )
        return self

    @model_validator(mode="after")
    def _plateau_has_data(self) -> JobSpec:
        if self.optimizer.schedule == "plateau" and self.data.validation is None:
            raise no_validation_set("optimizer.schedule plateau")
        return self

    @model_validator(mode="after")
    def _early_stopping_has_data(self) -> JobSpec:
        if self.train.early_stopping is not None and self.data.validation is None:
            raise no_validation_set("train.early_stopping")
        return self

    @model_validator(mode="after")
    def _search_has_data(self) -> JobSpec:
        if self.search is not None and self.data.validation is None:
            raise no_validation_set("search")
        return self

    @model_validator(mode="after")
    def _search_and_trials_agree_on_the_best(self) -> JobSpec:
        search, stopping = self.search, self.train.early_stopping
        if search is None or stopping is None:
            return self
        if (search.metric, search.mode) != (stopping.metric, stopping.mode):
            raise UnfitError(
                f"search compares trials by the {search.mode} of {search.metric}, but "
                f"train.early_stopping, by which a trial keeps its best checkpoint, watches the "
                f"{stopping.mode} of {stopping.metric}",
                "remove search.metric and search.mode, or set train.early_stopping to the same",
            )
        return self

    @model_validator(mode="after")
    def _trials_have_room_of_one_size(self) -> JobSpec:
        if self.search is None:
            return self
        workers, share = self.workers, self.search.gpu_share
        if workers.min is not None:
            raise UnfitError(
                f"search gives each trial room for workers.count ({workers.count}) workers, but "
                f"workers.min is {workers.min}: trials are not elastic",
                "remove workers.min",
            )
        if share is not None and not workers.gpus:
            raise UnfitError(
                f"search.gpu_share is {share:g}, but workers.gpus is 0",
                "set workers.gpus to 1, or remove search.gpu_share",
            )
        if self.search.budget.gpu_hours is not None and not workers.gpus:
            raise UnfitError(
                f"search.budget.gpu_hours is {self.search.budget.gpu_hours:g}, but workers.gpus is "
                "0, so that it would never be used up",
                "set workers.gpus to 1, or bound the search by search.budget.hours or .epochs",
            )
        if share is not None and workers.count > 1:
            raise UnfitError(
                f"search.gpu_share is {share:g}, but a trial has {workers.count} workers, each of "
                "which needs a GPU to itself (NCCL connects no two of one GPU)",
                "set workers.count to 1, or remove search.gpu_share",
            )
        return self

    @property
    def unguarded(self) -> str | None:
        """What is lost where the store holds no lease, as a sentence; None where it does."""
        if self.store_lease == "required" or not self.store.uri.startswith("s3:"):
            return None
        return (
            "store_lease is none: a driver that is started at the same moment as this one may work "
            "on the run too, until one of them finds the other"
        )

    @property
    def lanes(self) -> int:
        """Number of lanes of an epoch: data.lanes, or what suits all worker counts if `auto`."""
        return auto_lanes(self.workers.counts) if self.data.lanes == "auto" else self.data.lanes

    @property
    def gpus_held(self) -> float:
        """GPUs that the workers hold; of a job that searches, those of one trial."""
        share = None if self.search is None else self.search.gpu_share
        return self.workers.count * self.workers.gpus * (1.0 if share is None else share)

    @property
    def best(self) -> tuple[str, Mode, float]:
        """Metric that tells the best checkpoint, its direction, and the least improvement."""
        stopping = self.train.early_stopping
        if stopping is None:
            return "validation/loss", "min", 0.0
        return stopping.metric, stopping.mode, stopping.min_delta

    def to_bytes(self) -> bytes:
        """The spec as the run folder keeps it: JSON of every key, defaults included, sealed."""
        return sealed(self.model_dump(mode="json"))

    def digests(self) -> dict[str, str]:
        """sha256 of the groups of keys that decide what may change on a resume.

        architecture     must be equal to restore a checkpoint
        data_order       must be equal to go on inside an epoch
        hyper_parameters recorded; may differ
        Everything else (workers, store, cluster, retries, tracking) is free.
        """
        whole = self.model_dump(mode="json")
        of_loss = [whole["task"].pop("label_smoothing")]
        augment = whole["task"].pop("augment")
        weights, sampling = whole["task"].pop("class_weights"), whole["data"]["sampling"]
        of_loss += [given for given in (weights, augment) if given is not None]
        architecture = [whole["task"], whole["model"]["source"], whole["model"]["revision"]]
        if whole["model"]["adapter"] is not None:
            of_adapter = {k: v for k, v in whole["model"]["adapter"].items() if k != "dropout"}
            architecture.append(of_adapter)
        groups: dict[str, object] = {
            "architecture": architecture,
            "data_order": [
                whole["data"]["train"],
                whole["data"]["seed"],
                whole["batching"]["global_batch_size"],
                *([] if sampling is None else [sampling]),
            ],
            "hyper_parameters": [whole["optimizer"], whole["train"], whole["model"], *of_loss],
        }
        return {
            group: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
            for group, part in groups.items()
        }
