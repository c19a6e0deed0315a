"""What a run leaves behind in object storage, and where: the one file that knows the layout.

    spec.json                                   the job, immutable; created only if absent
    amendments/0001.json                        keys that a resume changed
    lease.json                                  who drives the run now (compare-and-swap)
    control/0001.json                           requests: stop, save, yield, extend
    attempts/0001.json                          one start of the worker group: what it restored
    attempts/0001-outcome.json                  how it ended
    attempts/0001-crash.json                    or why it broke off, where a rank could still tell
    events/gen-0001/driver/000001.jsonl         state changes, numbered whole objects
    events/attempt-0001/rank-0/000001.jsonl
    metrics/attempt-0001/rank-0/000001.jsonl    loss, learning rate, evaluations, skipped steps
    rows/attempt-0001/rank-0/000001.jsonl       ids of the rows of each step (train.log_rows)
    logs/gen-0001/driver/000001.jsonl           log lines
    logs/attempt-0001/rank-0/000001.jsonl
    checkpoints/step-00000200-attempt-0003/...  the parts of a checkpoint, then manifest.json, last
    models/step-00000200/...                    a plain model folder, as `shoal checkpoints
                                                --consolidate` makes it; config.json last
    tensorboard/...                             event files
    report/index.html, report/report.json
    evaluations/DIGEST/predictions.parquet      the best model on other data, by the data's digest;
    evaluations/DIGEST/metrics.json             written last
    study/00000001.json                         what happened in a study: jobs/study/log.py
    trials/0007/...                             a trial of it: a run of its own
    result.json                                 how the run ended; written last
    deleting.json                               the run is being deleted; readers refuse it

S3 has no append and no rename, so streams of lines are numbered whole objects. An *attempt* is one
start of the worker group; a *generation* is one start of the driver, and may have many attempts.
Everything here is data and pure functions; reading and writing happen elsewhere.
"""

from __future__ import annotations

import json
import posixpath
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from jobs.errors import ClusterError, EnvironmentFault, ShoalError, SpecError
from jobs.seal import sealed, unsealed

MODEL_WEIGHTS = "model/model.safetensors"
"""The part of a checkpoint that makes its `model/` a folder that loads."""
ADAPTER_FOLDER = "adapter/"
ADAPTER_WEIGHTS = f"{ADAPTER_FOLDER}adapter_model.safetensors"
"""The part of a checkpoint that holds an adapter, which needs the model that it was trained on."""
MANIFEST_VERSION = 2


class State(StrEnum):
    """What a run is doing, or by whose doing it ended."""

    PENDING = "PENDING"
    """Submitted; no driver has started."""
    STARTING = "STARTING"
    """The driver is up; workers, data and model are being prepared."""
    RUNNING = "RUNNING"
    RECOVERING = "RECOVERING"
    """The workers are started again from the last checkpoint (one died, a node was taken, their
    number changes), or training waits for a store that does not answer. As the state of an attempt:
    it saved and gave way to the next one."""
    STOPPING = "STOPPING"
    """A stop was asked for; the state is being saved."""
    SUCCEEDED = "SUCCEEDED"
    STOPPED = "STOPPED"
    """Ended by request, with a checkpoint; can be resumed."""
    PRUNED = "PRUNED"
    """A trial that its study has ended before its full budget."""
    FAILED_USER = "FAILED_USER"
    """The data, the model or the training itself is at fault; the same start would fail again."""
    FAILED_SPEC = "FAILED_SPEC"
    """The job file is at fault."""
    FAILED_RESOURCES = "FAILED_RESOURCES"
    """The cluster has not what the job asks for."""
    FAILED_INFRA = "FAILED_INFRA"
    """Storage, a node or the driver failed; a resume may succeed."""

    @property
    def ends_retries(self) -> bool:
        """Whether a platform that starts the driver again would only meet the same end."""
        return self.is_final and self not in (State.FAILED_INFRA, State.FAILED_RESOURCES)

    @property
    def is_final(self) -> bool:
        return self in _FINAL

    @property
    def exit_code(self) -> int:
        """0 done (or pruned), 1 failed, 2 the user's input, 3 the environment, 130 stopped."""
        return _EXIT_CODES.get(self, 0)


_FINAL = frozenset(
    {
        State.SUCCEEDED,
        State.STOPPED,
        State.PRUNED,
        State.FAILED_USER,
        State.FAILED_SPEC,
        State.FAILED_RESOURCES,
        State.FAILED_INFRA,
    }
)
_EXIT_CODES = {
    State.STOPPED: 130,
    State.FAILED_USER: 1,
    State.FAILED_SPEC: 2,
    State.FAILED_RESOURCES: 3,
    State.FAILED_INFRA: 3,
}


class Record(BaseModel):
    """A JSON object of the run folder; keys of later versions are kept out of the way."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=1).encode()


class SealedRecord(Record):
    """A record that is stored with a digest of itself, which is compared when it is read."""

    def to_bytes(self) -> bytes:
        return sealed(json.loads(super().to_bytes()))

    @model_validator(mode="before")
    @classmethod
    def _is_as_written(cls, tree: object) -> object:
        return unsealed(tree) if isinstance(tree, dict) else tree


DAMAGED_RECORD_HINT = (
    "put an older version of it back, where the bucket keeps versions; else start a new run whose "
    "model.source is the folder model/ of a checkpoint of this one"
)
"""For a record without which nobody can tell what a run has done."""


class Failure(Record):
    """Why something ended: the problems, as the user is to read them."""

    state: State
    problems: tuple[tuple[str, str | None], ...]
    """(message, hint) of each problem."""
    where: str = ""
    """`driver` or `rank 3 on node-7`."""
    exit_code: int = 1
    traceback: str | None = None
    """For bugs; None for a user's error."""
    is_of_place: bool = False
    """As of ShoalError. Not of a process that died or hung."""

    @classmethod
    def of(cls, error: BaseException, *, where: str) -> Failure:
        """The failure that an exception means."""
        if isinstance(error, ShoalError):
            return cls(
                state=_state_of(error),
                problems=tuple((p.message, p.hint) for p in error.problems),
                where=where,
                exit_code=error.exit_code,
                is_of_place=error.is_of_place,
            )
        return cls(
            state=State.FAILED_USER,
            problems=((f"{type(error).__name__}: {error}", None),),
            where=where,
            traceback="".join(traceback.format_exception(error)),
        )


def _state_of(error: ShoalError) -> State:
    if isinstance(error, SpecError):
        return State.FAILED_SPEC
    if isinstance(error, ClusterError):
        return State.FAILED_RESOURCES
    if isinstance(error, EnvironmentFault):
        return State.FAILED_INFRA
    return State.FAILED_USER


class Attempt(SealedRecord):
    """One start of the worker group; written by rank 0 before the first step."""

    attempt: int
    generation: int
    world_size: int
    restored_step: int | None
    """Step of the checkpoint from which it went on; None: from the start."""
    evaluates_first: bool = False
    """Whether it begins with the evaluation at that step, which was broken off."""
    controls_seen: int = 0
    """Number of the newest request to the run that was not meant for it, but for a start before."""
    started_at: float
    """Unix seconds, as the first rank opened its account of the time."""
    hosts: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    device: str = "cpu"
    max_tokens_per_microbatch: int | None = None
    """Where memory has run out, or the job leaves it open: what holds in place of the job's own;
    None: the job's own."""
    launch_tokens: int | None = None
    """What a micro-batch costs besides its tokens, where the job has it measured."""
    num_parameters: int = 0
    num_trained_parameters: int = 0
    total_steps: int = 0
    steps_per_epoch: int = 0
    rows_per_epoch: int = 0
    data_digest: str = ""
    window: int = 0
    lanes: int = 0
    start_seconds: float = 0.0
    """From `started_at` until data, model and optimizer were ready."""


class Outcome(SealedRecord):
    """How an attempt ended by itself; absent where it was killed."""

    attempt: int
    state: State
    step: int
    failure: Failure | None = None
    best_step: int | None = None
    trial: int | None = None
    """Of a study: the trial whose best checkpoint is its model."""
    test: dict[str, Any] | None = None
    """Evaluation of the best model on the test set (or validation set, see `tested_on`)."""
    before: dict[str, Any] | None = None
    """Evaluation of the untrained model on the same set; of a study, that of the model that the
    job's own values have come to."""
    tested_on: Literal["test", "validation"] | None = None
    seconds: dict[str, float] = {}
    """Where the attempt's wall clock went, by the purposes of `jobs/account.py`; all of it from the
    attempt's `started_at` to this outcome."""


class Microbatch(Record):
    """Rows that go through the model at once."""

    rows: int
    tokens: int
    """Rows times the longest of them, padding included; without it where rows are packed."""


class Crash(SealedRecord):
    """Why an attempt broke off, told by a rank before its process ended.

    The ranks could not agree on an outcome: the others were waiting for this one. The first rank
    that tells counts.
    """

    attempt: int
    failure: Failure
    out_of_memory: Microbatch | None = None
    """The largest micro-batch of the step (or evaluation) in whose passes memory ran out."""

    @property
    def reason(self) -> str:
        """`rank 1 on node-7: why`."""
        return f"{self.failure.where}: {self.failure.problems[0][0]}"


class Part(Record):
    """One file of a checkpoint, by its name relative to the checkpoint's folder."""

    name: str
    bytes: int
    sha256: str
    """What `shoal checkpoints --verify` compares; part of what names the file's content."""
    xxh3: str
    """XXH3 of 128 bits, which a restore compares while the bytes arrive, at a tenth of the time
    that SHA-256 takes. Empty for a file that Shoal has not written: its bytes are counted."""


class StreamPosition(Record):
    """Where in the order of rows a checkpoint stands; all of it must match to go on."""

    order_version: int
    index_digest: str
    lanes: int
    window: int
    seed: int
    global_batch_size: int
    epoch: int
    next_item: int
    """First position of `epoch` that no step has used."""
    sampler_digest: str | None = None
    """With weighted sampling: how often rows are used."""


class Manifest(SealedRecord):
    """The commit object of a checkpoint: written last, names every part with bytes and sha256."""

    version: int = MANIFEST_VERSION
    step: int
    attempt: int
    generation: int
    parent_step: int | None
    """Step of the checkpoint from which this attempt had started."""
    created_at: float
    parts: tuple[Part, ...]
    digests: dict[str, str]
    stream: StreamPosition
    evaluation: dict[str, float] = {}
    """Metrics of the evaluation at this step, such as validation/f1; empty without one."""
    best_step: int | None = None
    """Step of the best evaluation so far, this one included."""
    evaluation_pending: bool = False
    """Whether the evaluation at this step was broken off: whoever goes on begins with it."""
    is_last_step: bool = False
    max_tokens_per_microbatch: int | None = None
    """As in the attempt: what held in place of the job's own."""
    launch_tokens: int | None = None
    """As in the attempt."""

    @property
    def name(self) -> CheckpointName:
        return CheckpointName(self.step, self.attempt)

    @property
    def total_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def has_model(self) -> bool:
        """Whether its `model/` loads as it is; else each worker's part of the weights is apart, or
        there is an adapter only."""
        return any(part.name == MODEL_WEIGHTS for part in self.parts)

    @property
    def has_adapter(self) -> bool:
        """Whether it is an adapter's, which goes on from its base model."""
        return any(part.name == ADAPTER_WEIGHTS for part in self.parts)


class Lease(SealedRecord):
    """Who drives the run. Replaced by compare-and-swap only."""

    generation: int
    holder: str
    """Random id of the driver process."""
    host: str
    boot: str = ""
    """Boot and process space of the holder's machine, see cluster.process; empty: unknown."""
    pid: int
    started: str = ""
    """When the holder's process started, in its system's own count."""
    renewals: int
    """Grows with each renewal, so that the object's ETag changes."""
    ttl_seconds: float
    released: bool = False
    taken_at: float = 0.0
    """Unix seconds by the holder's clock; for people, as `renewed_at` is, not for expiry."""
    renewed_at: float = 0.0

    @property
    def driver(self) -> str:
        """Who holds it, since when, and until when if it is not renewed again; for people."""
        since = f", since {_clock(self.taken_at)}" if self.taken_at else ""
        seen = ""
        if self.renewed_at:
            until = f"until {_clock(self.renewed_at + self.ttl_seconds)} unless it is renewed"
            seen = f", last sign at {_clock(self.renewed_at)}, held {until}"
        return f"process {self.pid} on {self.host} (generation {self.generation}{since}{seen})"


class Control(Record):
    """A request to the run, from any machine."""

    kind: Literal["stop", "save", "yield", "extend"]
    """stop: save and end the run. save: save and go on. yield: save and end the attempt, so that
    another one goes on, with another number of workers. extend: more trials for a study."""
    requested_at: float
    by: str = ""
    attempt: int | None = None
    """The only attempt that is meant; None: every one. A yield names its attempt, or each of those
    that follow would give way as well."""
    generation: int | None = None
    """The only driver whose attempts are meant; None: every one. A yield names its driver: the
    attempt that it was to begin next may become its successor's first."""
    trials: int | None = None
    """Of extend: how many trials the study is to have in all."""
    space: dict[str, Any] | None = None
    """Of extend: what the new trials search, as in the job file; None: what the study searches."""

    @model_validator(mode="after")
    def _yield_names_who_is_meant(self) -> Control:
        if self.kind == "yield" and (self.attempt is None or self.generation is None):
            raise ValueError("a request to yield names its attempt and its generation")
        return self

    @model_validator(mode="after")
    def _extend_names_how_many(self) -> Control:
        if self.kind == "extend" and self.trials is None:
            raise ValueError("a request to extend names the number of trials")
        return self

    def is_for(self, *, attempt: int, generation: int) -> bool:
        """Whether an attempt of a driver is meant."""
        return self.attempt in (None, attempt) and self.generation in (None, generation)


class Amendment(SealedRecord):
    """Keys that a resume changed; applied in the order of their numbers, for good."""

    overrides: tuple[str, ...]
    """`path=value`, as after --set."""
    made_at: float
    """Unix seconds."""


class Result(SealedRecord):
    """How the run ended: the last object that a driver writes."""

    run_id: str
    state: State
    generation: int
    step: int
    finished_at: float
    best_checkpoint: str | None = None
    """Folder of the best checkpoint, relative to the run folder; None where nothing was evaluated,
    or where the best one is gone."""
    last_checkpoint: str | None = None
    outcome: Outcome | None = None
    failure: Failure | None = None

    @property
    def exit_code(self) -> int:
        """Exit code of the command that waited for the run."""
        return self.failure.exit_code if self.failure is not None else self.state.exit_code


# ---------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class RunPaths:
    """Keys of a run's objects in the store of runs; `run_id` is the run's folder."""

    run_id: str

    def _join(self, *parts: str) -> str:
        return posixpath.join(self.run_id, *parts)

    @property
    def spec(self) -> str:
        return self._join("spec.json")

    @property
    def lease(self) -> str:
        return self._join("lease.json")

    @property
    def result(self) -> str:
        return self._join("result.json")

    @property
    def deleting(self) -> str:
        return self._join("deleting.json")

    def amendment(self, number: int) -> str:
        return self._join("amendments", f"{number:04d}.json")

    @property
    def amendments(self) -> str:
        return self._join("amendments/")

    @property
    def control(self) -> str:
        return self._join("control/")

    def control_request(self, number: int) -> str:
        return self._join("control", f"{number:04d}.json")

    @property
    def attempts(self) -> str:
        return self._join("attempts/")

    def attempt(self, attempt: int) -> str:
        return self._join("attempts", f"{attempt:04d}.json")

    def is_attempt(self, key: str) -> bool:
        """Whether the object of that key is an Attempt."""
        return key.removeprefix(self.attempts).removesuffix(".json").isdigit()

    def outcome(self, attempt: int) -> str:
        return self._join("attempts", f"{attempt:04d}-outcome.json")

    def crash(self, attempt: int) -> str:
        return self._join("attempts", f"{attempt:04d}-crash.json")

    def lines(self, kind: LineKind, source: Source, number: int) -> str:
        """One numbered object of JSON lines."""
        return self._join(kind, source.folder, f"{number:06d}.jsonl")

    def lines_folder(self, kind: LineKind) -> str:
        return self._join(kind) + "/"

    @property
    def checkpoints(self) -> str:
        return self._join("checkpoints/")

    def checkpoint(self, name: CheckpointName) -> str:
        """Folder of a checkpoint, with a slash at its end.

        Each attempt has its own: whatever a superseded one still writes, it touches no other's.
        """
        return self._join("checkpoints", name.folder) + "/"

    def manifest(self, name: CheckpointName) -> str:
        return self.checkpoint(name) + "manifest.json"

    def model(self, step: int) -> str:
        """Folder of a model that was asked for, with a slash at its end."""
        return self._join("models", f"step-{step:08d}") + "/"

    @property
    def tensorboard(self) -> str:
        return self._join("tensorboard/")

    def evaluation(self, data_digest: str) -> str:
        """Folder of an evaluation on other data, with a slash at its end."""
        return self._join("evaluations", data_digest) + "/"

    @property
    def study(self) -> str:
        return self._join("study/")

    def study_object(self, first: int, last: int | None = None) -> str:
        """An object of a study's log: of one append, or of those from `first` to `last`."""
        name = f"{first:08d}" if last is None else f"{first:08d}-{last:08d}"
        return self._join("study", f"{name}.json")

    @property
    def trials(self) -> str:
        return self._join("trials/")

    def trial(self, number: int) -> RunPaths:
        """The run folder of a study's trial."""
        return RunPaths(self._join("trials", f"{number:04d}"))

    @property
    def report_html(self) -> str:
        return self._join("report", "index.html")

    @property
    def report_json(self) -> str:
        return self._join("report", "report.json")

    @property
    def winner(self) -> str:
        """Of a study: the job with its best values, as a file to run."""
        return self._join("report", "winner.yaml")


_CHECKPOINT_FOLDER = re.compile(r"step-(\d{8,})-attempt-(\d{4,})")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """Which checkpoint of a run: the step, and the attempt that saved it."""

    step: int
    attempt: int

    @property
    def folder(self) -> str:
        return f"step-{self.step:08d}-attempt-{self.attempt:04d}"

    @classmethod
    def parse(cls, folder: str) -> CheckpointName | None:
        """The checkpoint of a folder's name; None for any other text."""
        match = _CHECKPOINT_FOLDER.fullmatch(folder)
        name = cls(int(match[1]), int(match[2])) if match is not None else None
        return name if name is not None and name.folder == folder else None


@dataclass(frozen=True)
class Past:
    """What of a run lies before a start of its driver, and does not concern it."""

    controls: int = 0
    """Number of the last request that is old."""
    generation: int = 0
    """Generation of the last driver whose end is old. Where a later one has ended for a reason that
    a restart would meet again, this start is a retry of the platform with nothing to do."""


NOTHING_PAST = Past()


LineKind = Literal["events", "metrics", "rows", "logs"]


@dataclass(frozen=True, order=True)
class Source:
    """Who writes a stream of lines: the driver of a generation, or a rank of an attempt."""

    number: int
    """Generation of a driver, attempt of a rank."""
    rank: int | None
    """None: the driver."""

    @property
    def span(self) -> str:
        """The folder of all who write in that generation, or that attempt."""
        return f"{'gen' if self.rank is None else 'attempt'}-{self.number:04d}"

    @property
    def folder(self) -> str:
        return f"{self.span}/{'driver' if self.rank is None else f'rank-{self.rank}'}"

    @classmethod
    def parse(cls, folder: str) -> Source:
        """The source of a folder such as `attempt-0001/rank-0`; ValueError for any other text."""
        span, _, writer = folder.partition("/")
        kind, _, number = span.partition("-")
        if kind == "gen" and writer == "driver":
            return cls(int(number), None)
        if kind == "attempt" and writer.startswith("rank-"):
            return cls(int(number), int(writer.removeprefix("rank-")))
        raise ValueError(f"{folder} is no folder of lines")


# --------------------------------------------------------------------------------------- lineage


def rightful(attempts: Iterable[Attempt]) -> list[Attempt]:
    """The attempts by number, but those that a superseded driver began after its successor had."""
    found: list[Attempt] = []
    for attempt in sorted(attempts, key=lambda a: a.attempt):
        if not found or attempt.generation >= found[-1].generation:
            found.append(attempt)
    return found


def lineage(attempts: Iterable[Attempt]) -> list[tuple[int, int, int | None]]:
    """Which attempt each step of the final weights came from: [(attempt, after, until)].

    The attempt's steps s with after < s <= until are in the lineage; `until` None means all.
    An attempt that restored step 40 takes every later step away from the attempts before it; where
    it evaluates step 40 first, that is in its span as well as in theirs.
    Attempts of which nothing is left are not listed.
    """
    spans: list[tuple[int, int, int | None]] = []
    until: int | None = None
    for attempt in reversed(rightful(attempts)):
        restored = attempt.restored_step or 0
        # The evaluation of the restored step may be its own.
        after = restored - 1 if attempt.evaluates_first else restored
        if until is None or after < until:
            spans.append((attempt.attempt, after, until))
            until = restored if until is None else min(restored, until)
    return spans[::-1]


def in_lineage(step: int, attempt: int, spans: Sequence[tuple[int, int, int | None]]) -> bool:
    """Whether what `attempt` wrote for `step` belongs to the final weights."""
    return any(
        attempt == a and after < step and (until is None or step <= until)
        for a, after, until in spans
    )


def live_manifests(manifests: Iterable[Manifest], attempts: Iterable[Attempt]) -> list[Manifest]:
    """Manifests that no later attempt has superseded, by step; step 0 belongs to every attempt.

    One for each step: where two attempts saved one, that of the later, which has evaluated it.
    """
    spans = lineage(attempts)
    live = [m for m in manifests if m.step == 0 or in_lineage(m.step, m.attempt, spans)]
    by_step = {m.step: m for m in sorted(live, key=lambda m: m.name)}
    return list(by_step.values())


def best_manifest(live: Sequence[Manifest]) -> Manifest | None:
    """The best checkpoint as training judged it: what the newest of `live` (by step) says it is.

    None where nothing was evaluated, or where the best one is gone.
    """
    best_step = live[-1].best_step if live else None
    return next((m for m in live if m.step == best_step), None)


def by_merit(
    live: Sequence[Manifest], *, metric: str, mode: Literal["min", "max"]
) -> list[Manifest]:
    """The best first, then the others that were evaluated by their value, the earlier of equals
    first."""
    best = best_manifest(live)
    sign = 1 if mode == "min" else -1
    scored = [m for m in live if metric in m.evaluation and m is not best]
    scored.sort(key=lambda m: (sign * m.evaluation[metric], m.step))
    return scored if best is None else [best, *scored]


def merge_metrics(
    lines: Iterable[Mapping[str, Any]], attempts: Iterable[Attempt]
) -> list[dict[str, Any]]:
    """Lines of metrics in order of steps, of each step only what belongs to the final weights.

    Each line holds at least `step`, `attempt` and `kind`; step 0 is the untrained model.
    """
    spans = lineage(attempts)
    kept: dict[tuple[int, str, str], dict[str, Any]] = {}
    for line in lines:
        step, attempt = int(line["step"]), int(line["attempt"])
        if step == 0 or in_lineage(step, attempt, spans):
            kept[step, str(line["kind"]), str(line.get("split", ""))] = dict(line)
    return [kept[key] for key in sorted(kept)]


def _clock(seconds: float) -> str:
    """`2026-11-25 08:12:01 UTC`; `seconds` are Unix seconds."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
