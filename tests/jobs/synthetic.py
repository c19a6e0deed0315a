"""Run folders as a real run would leave them, written through the run folder's own layout."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from cluster.storage import Store
from jobs.parse import parse_spec
from jobs.record import (
    Attempt,
    CheckpointName,
    Lease,
    Manifest,
    Outcome,
    Part,
    Result,
    RunPaths,
    Source,
    State,
    StreamPosition,
)
from jobs.spec import JobSpec

START = 1_790_000_000.0
"""Unix seconds at which all synthetic runs began."""
SECONDS_PER_STEP = 0.5
STEPS = 300
LOG_EVERY = 10
EVALUATE_EVERY = 50
WEIGHTS = b"weights " * 64


def make_spec(labels: Sequence[str] = ("negative", "positive"), **changes: Any) -> JobSpec:
    tree: dict[str, Any] = {
        "name": "sentiment",
        "task": {"kind": "text-classification", "labels": list(labels), "max_tokens": 64},
        "model": {"source": "s3://models/minilm"},
        "data": {
            "train": "s3://lake/reviews/train",
            "validation": "s3://lake/reviews/validation",
            "test": "s3://lake/reviews/test",
            "seed": 7,
        },
        "optimizer": {"learning_rate": 5e-5, "warmup_steps": 30},
        "train": {
            "epochs": 3,
            "evaluate_every_steps": EVALUATE_EVERY,
            "early_stopping": {"metric": "validation/f1", "mode": "max", "patience": 3},
        },
        "workers": {"count": 2},
        "store": "s3://shoal/runs",
    }
    return parse_spec(tree | changes, where="synthetic")


def evaluation(labels: Sequence[str], *, skill: float, rows: int, seed: int) -> dict[str, Any]:
    """Metrics, per-class table and confusion of a model that is right with chance `skill`."""
    random_ = random.Random(seed)
    n = len(labels)
    weights = [1.0 / (1 + 0.35 * i) for i in range(n)]
    counts = [max(3, round(rows * w / sum(weights))) for w in weights]
    confusion = [[0] * n for _ in range(n)]
    for true, count in enumerate(counts):
        own = min(0.99, max(1 / n, skill + random_.uniform(-0.08, 0.06)))
        for _ in range(count):
            near = (true + random_.choice([-1, 1, 1, 2, random_.randrange(n)])) % n
            confusion[true][true if random_.random() < own else near] += 1
    per_class = []
    for i, label in enumerate(labels):
        hit, support = confusion[i][i], sum(confusion[i])
        predicted = sum(row[i] for row in confusion)
        precision = hit / predicted if predicted else 0.0
        recall = hit / support if support else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        per_class.append(
            {"label": label, "precision": precision, "recall": recall, "f1": f1, "support": support}
        )
    total = sum(map(sum, confusion))
    metrics = {
        "loss": -math.log(max(0.05, skill)) + 0.05,
        "accuracy": sum(confusion[i][i] for i in range(n)) / total,
        **{
            name: sum(float(c[name]) for c in per_class) / n
            for name in ("f1", "precision", "recall")
        },
    }
    return {"rows": total, "metrics": metrics, "per_class": per_class, "confusion": confusion}


@dataclass
class SyntheticRun:
    """Writes a run step by step into `store`, which holds the runs."""

    store: Store
    run_id: str = "sentiment-a1b2c3"
    spec: JobSpec = field(default_factory=make_spec)
    steps: int = STEPS
    _numbers: dict[tuple[str, Source], int] = field(default_factory=dict)
    _scores: dict[int, float] = field(default_factory=dict)
    _saved: dict[int, CheckpointName] = field(default_factory=dict)
    _spent: dict[int, dict[str, float]] = field(default_factory=dict)
    """By attempt."""

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.run_id)

    @property
    def labels(self) -> Sequence[str]:
        return self.spec.task.labels

    def submit(self) -> SyntheticRun:
        self.store.write_if_absent(self.paths.spec, self.spec.to_bytes())
        return self

    def lines(self, kind: Any, source: Source, *lines: dict[str, Any]) -> None:
        number = self._numbers[kind, source] = self._numbers.get((kind, source), 0) + 1
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.store.write(self.paths.lines(kind, source, number), text.encode())

    def state(self, state: State, message: str, *, time: float, generation: int = 1) -> None:
        line = {"time": time, "event": "state", "state": state, "message": message}
        self.lines("events", Source(generation, None), line | {"generation": generation})

    def lease(self, *, generation: int = 1, renewed_at: float, **changes: Any) -> None:
        values: dict[str, Any] = {
            "generation": generation,
            "holder": "f00d",
            "host": "node-7",
            "pid": 4242,
            "renewals": 9,
            "ttl_seconds": 15.0,
            "renewed_at": renewed_at,
        }
        self.store.write(self.paths.lease, Lease(**values | changes).to_bytes())

    def start_attempt(
        self, attempt: int, *, restored_step: int | None = None, generation: int = 1, time: float
    ) -> None:
        record = Attempt(
            attempt=attempt,
            generation=generation,
            world_size=self.spec.workers.count,
            restored_step=restored_step,
            started_at=time,
            hosts=("node-7",),
            versions={"torch": "2.13.0", "transformers": "5.23.0", "ray": "2.60.0"},
            num_parameters=22_713_986,
            num_trained_parameters=22_713_986,
            total_steps=self.steps,
            steps_per_epoch=self.steps // 3,
            rows_per_epoch=self.steps // 3 * 32,
            data_digest="9f86d081884c7d65" * 4,
            window=4,
            lanes=2,
            start_seconds=6.4,
        )
        self.store.write(self.paths.attempt(attempt), record.to_bytes())
        origin = "the start" if restored_step is None else f"step {restored_step}"
        self.lines(
            "events",
            Source(generation, None),
            {
                "time": time,
                "event": "attempt",
                "attempt": attempt,
                "generation": generation,
                "message": f"attempt {attempt} goes on from {origin}",
            },
        )

    def train(self, attempt: int, *, after: int, until: int, time: float) -> float:
        """Steps after < s <= until, with logs, evaluations and checkpoints; the time it ended."""
        random_ = random.Random(attempt)
        source = Source(attempt, 0)
        metrics: list[dict[str, Any]] = []
        spent = self._spent[attempt] = dict.fromkeys(
            ("start", "compute", "data_wait", "synchronisation", "checkpoint", "evaluation"), 0.0
        ) | {"start": 6.4}
        for step in range(after + LOG_EVERY, until + 1, LOG_EVERY):
            now = time + (step - after) * SECONDS_PER_STEP
            for name, share in (("compute", 0.78), ("data_wait", 0.03), ("synchronisation", 0.11)):
                spent[name] += LOG_EVERY * SECONDS_PER_STEP * share
            if step % EVALUATE_EVERY == 0:
                spent["evaluation"] += 2.1
                spent["checkpoint"] += 0.3
            metrics.append(self._train_line(attempt, step, now, dict(spent), random_))
            if step % EVALUATE_EVERY == 0:
                metrics.append(self._evaluation_line(attempt, step, now))
                self.checkpoint(attempt, step, time=now)
        self.lines("metrics", source, *metrics)
        return time + (until - after) * SECONDS_PER_STEP

    def _train_line(
        self, attempt: int, step: int, now: float, spent: dict[str, float], random_: random.Random
    ) -> dict[str, Any]:
        warmup = self.spec.optimizer.warmup_steps
        rise = min(1.0, step / warmup) if warmup else 1.0
        fall = (self.steps - step) / max(1, self.steps - warmup)
        rows_per_second = 64 * random_.uniform(0.93, 1.04)
        return {
            "time": now,
            "attempt": attempt,
            "step": step,
            "kind": "train",
            "epoch": step / (self.steps / 3),
            "loss": 0.24 + 0.5 * math.exp(-step / 80) + random_.gauss(0, 0.018),
            "learning_rate": self.spec.optimizer.learning_rate * min(rise, fall),
            "grad_norm": 1.1 + random_.random(),
            "rows": 32,
            "rows_per_second": rows_per_second,
            "tokens_per_second": rows_per_second * 38,
            "padding_share": 0.04,
            "data_wait_share": 0.03,
            "imbalance": 0.02,
            "total_steps": self.steps,
            "eta_seconds": (self.steps - step) * SECONDS_PER_STEP,
            "seconds": spent,
        }

    def skill(self, step: int) -> float:
        return 0.86 - 0.36 * math.exp(-step / 60) - max(0, step - 200) * 0.0002

    def _evaluation_line(
        self, attempt: int, step: int, now: float, split: str = "validation"
    ) -> dict[str, Any]:
        return {
            "time": now,
            "attempt": attempt,
            "step": step,
            "kind": "evaluation",
            "split": split,
            "seconds": 2.1,
            **evaluation(self.labels, skill=self.skill(step), rows=800, seed=step),
        }

    def checkpoint(self, attempt: int, step: int, *, time: float, generation: int = 1) -> None:
        name = self._saved[step] = CheckpointName(step, attempt)
        folder = self.paths.checkpoint(name)
        parts = []
        for part, data in (
            ("model/config.json", b"{}"),
            ("model/model.safetensors", WEIGHTS),
            ("optimizer.safetensors", b"o"),
        ):
            self.store.write(folder + part, data)
            digest = hashlib.sha256(data).hexdigest()
            parts.append(
                Part(
                    name=part,
                    bytes=len(data),
                    sha256=digest,
                    xxh3=xxhash.xxh3_128_hexdigest(data),
                )
            )
        metrics = evaluation(self.labels, skill=self.skill(step), rows=800, seed=step)["metrics"]
        metric, mode, _ = self.spec.best
        sign = 1 if mode == "min" else -1
        self._scores[step] = sign * metrics[metric.removeprefix("validation/")]
        manifest = Manifest(
            best_step=min(self._scores, key=lambda s: (self._scores[s], s)),
            step=step,
            attempt=attempt,
            generation=generation,
            parent_step=None,
            created_at=time,
            parts=tuple(parts),
            digests=self.spec.digests(),
            stream=StreamPosition(
                order_version=1,
                index_digest="9f86d081884c7d65" * 4,
                lanes=2,
                window=4,
                seed=7,
                global_batch_size=32,
                epoch=step // (self.steps // 3),
                next_item=step % (self.steps // 3) * 32,
            ),
            evaluation={f"validation/{name}": value for name, value in metrics.items()},
            is_last_step=step == self.steps,
        )
        self.store.write(self.paths.manifest(name), manifest.to_bytes())

    def _folder(self, step: int) -> str:
        return f"checkpoints/{self._saved.get(step, CheckpointName(step, 1)).folder}"

    def before(self, attempt: int = 1, *, time: float, split: str = "test") -> None:
        """The evaluation of the model before training."""
        line = self._evaluation_line(attempt, 0, time, split)
        self.lines("metrics", Source(attempt, 0), line)

    def finish(
        self,
        state: State,
        *,
        attempt: int,
        step: int,
        time: float,
        generation: int = 1,
        failure: Any = None,
        tested_on: str | None = "test",
    ) -> None:
        done = state is State.SUCCEEDED
        before = evaluation(self.labels, skill=self.skill(0), rows=1000, seed=0)
        after = evaluation(self.labels, skill=self.skill(200), rows=1000, seed=1)
        outcome = Outcome(
            attempt=attempt,
            state=state,
            step=step,
            failure=failure,
            best_step=200 if step >= 200 else None,
            test=after if done else None,
            before=before if done else None,
            tested_on=tested_on if done else None,  # type: ignore[arg-type]
            seconds=self._spent.get(attempt, {"start": 6.4}) | {"finish": 1.2, "other": 0.5},
        )
        self.store.write(self.paths.outcome(attempt), outcome.to_bytes())
        result = Result(
            run_id=self.run_id,
            state=state,
            generation=generation,
            step=step,
            finished_at=time,
            best_checkpoint=f"checkpoints/{self._saved[200].folder}" if step >= 200 else None,
            last_checkpoint=f"checkpoints/{self._saved[step].folder}"
            if step in self._saved
            else None,
            outcome=outcome,
            failure=failure,
        )
        self.store.write(self.paths.result, result.to_bytes())
        self.lease(generation=generation, renewed_at=time, released=True)

    def logs(self, *, time: float) -> None:
        """Lines of the driver and of two ranks, interleaved in time."""
        for second, source, level, message in (
            (0, Source(1, None), "INFO", "the driver starts"),
            (1, Source(1, 0), "INFO", "rank 0 loads the model"),
            (2, Source(1, 1), "INFO", "rank 1 loads the model"),
            (3, Source(1, 1), "WARNING", "a shard was read twice"),
            (4, Source(1, 0), "DEBUG", "bucket layout fixed"),
            (5, Source(1, None), "ERROR", "rank 1 died"),
        ):
            line = {"time": time + second, "level": level, "logger": "shoal", "message": message}
            self.lines("logs", source, line)


def succeeded(store: Store, *, tested_on: str = "test", **run: Any) -> SyntheticRun:
    """A run that ended well, after one worker's death at step 130."""
    made = SyntheticRun(store, **run).submit()
    made.state(State.STARTING, "the driver is up", time=START)
    made.start_attempt(1, time=START + 4)
    made.before(time=START + 8, split=tested_on)
    made.state(State.RUNNING, "training", time=START + 9)
    died = made.train(1, after=0, until=130, time=START + 10)
    made.state(State.RECOVERING, "rank 1 died; starting again from step 100", time=died + 5)
    made.start_attempt(2, restored_step=100, time=died + 12)
    made.state(State.RUNNING, "training", time=died + 19)
    ended = made.train(2, after=100, until=made.steps, time=died + 20)
    made.logs(time=START)
    made.state(State.SUCCEEDED, "all epochs are done", time=ended + 9)
    made.finish(State.SUCCEEDED, attempt=2, step=made.steps, time=ended + 10, tested_on=tested_on)
    return made


def running(store: Store, *, now: float, until: int = 120, **run: Any) -> SyntheticRun:
    """A run in the middle of its first attempt, whose driver renewed its lease at `now`."""
    made = SyntheticRun(store, **run).submit()
    start = now - until * SECONDS_PER_STEP - 10
    made.state(State.STARTING, "the driver is up", time=start)
    made.start_attempt(1, time=start + 4)
    made.before(time=start + 8)
    made.state(State.RUNNING, "training", time=start + 9)
    made.train(1, after=0, until=until, time=start + 10)
    made.lease(renewed_at=now)
    return made
