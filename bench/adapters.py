"""How near does each way to train few weights come to training all of them, on real sentences?

    python bench/adapters.py [--rows 2000] [--kinds lora,dora] [--small] [--json FILE]

MiniLM-L6 learns the sentiment of film sentences (examples/assets.py), fully and with each adapter,
on the same rows of the same seed, in this process. For each: accuracy on the test set, beside that
of full training, the share of weights that are trained, bytes of a checkpoint that is neither the
best nor the last, seconds, and the largest difference of a logit between the trained model and its
merged folder. `--small`: a tiny model and tiny rows, to see that it works.

Exit code 1 where LoRA has less than 97 % of the accuracy of full training, or trains 5 % of the
weights or more, or where a merged model differs by more than 1e-4; not judged with `--small`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lab
import torch
from rich.table import Table
from transformers import AutoModelForSequenceClassification

from cluster.storage import open_store
from examples import assets
from jobs.parse import parse_spec
from jobs.record import ADAPTER_WEIGHTS, MODEL_WEIGHTS, RunPaths
from jobs.spec import JobSpec
from tests.ranks import assignment_of
from tests.tiny import LABELS, tiny_model, tiny_reviews
from trainers.adapted_folder import adapt, load_model
from trainers.adapters import is_merged
from trainers.data.index import open_index
from trainers.data.prepare import prepare
from trainers.data.prepare_plan import PrepareOptions
from trainers.records import read_attempts, read_manifests
from trainers.session import ProcessSession
from trainers.tasks.task import build_task
from trainers.worker import train_worker

LEAST_RATIO, MOST_SHARE, MOST_DIFFERENCE = 0.97, 0.05, 1e-4
WAYS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 2e-4, "adapter": None},
    "lora": {
        "learning_rate": 2e-3,
        "adapter": {"kind": "lora", "rank": 8, "target_modules": "all-linear"},
    },
    "dora": {
        "learning_rate": 2e-3,
        "adapter": {"kind": "dora", "rank": 8, "target_modules": "all-linear"},
    },
    "ia3": {"learning_rate": 1e-2, "adapter": {"kind": "ia3"}},
    "prompt-tuning": {"learning_rate": 3e-2, "adapter": {"kind": "prompt-tuning"}},
    "prefix-tuning": {"learning_rate": 2e-2, "adapter": {"kind": "prefix-tuning"}},
}


@dataclass(frozen=True)
class Result:
    """What one way has come to."""

    way: str
    accuracy: float
    ratio: float
    """Of the accuracy of full training."""
    trained_share: float
    checkpoint_bytes: int
    """Weights alone, without the merged ones."""
    seconds: float
    difference: float | None
    """Between the trained model and its `model/` folder; None for full training."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--kinds", default="lora,dora,ia3")
    options = lab.arguments_of(parser)
    results: list[Result] = []
    with lab.place() as scratch:
        model, data = world(scratch, options)
        for way in ["full", *options.kinds.split(",")]:
            spec = job(way, model, data, str(scratch), epochs=options.epochs, small=options.small)
            full = results[0].accuracy if results else None
            results.append(measured(way, spec, model, full=full))
            print(results[-1], file=sys.stderr)
    found = {"ways": [asdict(result) for result in results]}
    lab.tell("adapters", found, tables=[table_of(results)], json_file=options.json)
    return 0 if options.small or all(map(is_good, results)) else 1


def world(scratch: Path, options: argparse.Namespace) -> tuple[Path, dict[str, str]]:
    """The model's folder and the data sets."""
    if options.small:
        sets = tiny_reviews(str(scratch / "data"), rows=64, rows_per_group=16)
        return tiny_model(scratch / "model"), {k: sets[k] for k in ("train", "test")}
    lines = assets.movie_sentences().read_text(encoding="utf-8").splitlines()
    # Of every part of the file, whose lines have an order; a quarter of them for the test.
    wanted = options.rows * 4 // 3
    chosen = [lines[place * len(lines) // wanted] for place in range(wanted)]
    source = scratch / "sentences.jsonl"
    source.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    prepare(PrepareOptions(source=str(source), to=str(scratch / "data"), split="test=0.25"))
    return assets.minilm(), {name: str(scratch / "data" / name) for name in ("train", "test")}


def job(
    way: str, model: Path, data: dict[str, str], scratch: str, *, epochs: int, small: bool
) -> JobSpec:
    given = WAYS[way]
    tree = {
        "name": "adapters",
        "task": {"labels": list(LABELS), "max_tokens": 32 if small else 128},
        "model": {"source": str(model), "adapter": given["adapter"]},
        "data": {**data, "seed": 7},
        "batching": {
            "global_batch_size": 32,
            "max_tokens_per_microbatch": 1024,
            "launch_tokens": 60,
        },
        "optimizer": {"learning_rate": given["learning_rate"], "warmup_steps": 10},
        "train": {"epochs": epochs},
        "store": f"{scratch}/runs",
        "tracking": [],
    }
    return parse_spec(tree, where=way)


def measured(way: str, spec: JobSpec, model: Path, *, full: float | None) -> Result:
    began = time.monotonic()
    with ProcessSession(use_gpu=torch.cuda.is_available()) as session:
        outcome = train_worker(session, assignment_of(spec, way))
    seconds = time.monotonic() - began
    if outcome.test is None:
        sys.exit(f"{way}: {outcome.failure}")
    store, paths = open_store(spec.store.uri), RunPaths(way)
    last, attempt = read_manifests(store, paths)[-1], read_attempts(store, paths)[-1]
    weights = ADAPTER_WEIGHTS if last.has_adapter else MODEL_WEIGHTS
    folder = Path(spec.store.uri, paths.checkpoint(last.name))
    accuracy = outcome.test["metrics"]["accuracy"]
    return Result(
        way=way,
        accuracy=accuracy,
        ratio=accuracy / (accuracy if full is None else full),
        trained_share=attempt.num_trained_parameters / attempt.num_parameters,
        checkpoint_bytes=next(part.bytes for part in last.parts if part.name == weights),
        seconds=round(seconds, 1),
        difference=difference(spec, model, folder) if last.has_adapter else None,
    )


def difference(spec: JobSpec, model: Path, checkpoint: Path) -> float:
    """The largest one of a logit, over rows of tokens that the model knows."""
    task = build_task(spec, model_folder=model, index=open_index(open_store(spec.data.train)))
    trained = task.build_model(model, dropout=None, seed=0)
    adapt(trained, spec, folder=model, adapter_in=checkpoint)
    folder = checkpoint / "model"
    merged = is_merged(trained)
    exported = AutoModelForSequenceClassification.from_pretrained(folder) if merged else None
    ids = torch.randint(5, 150, (16, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one = trained.eval()(input_ids=ids).logits
        other = (exported or load_model(folder)).eval()(input_ids=ids).logits
    return float((one - other).abs().max())


def is_good(result: Result) -> bool:
    if result.difference is not None and result.difference > MOST_DIFFERENCE:
        return False
    is_near = result.ratio >= LEAST_RATIO and result.trained_share < MOST_SHARE
    return is_near or result.way != "lora"


def table_of(results: list[Result]) -> Table:
    columns = ("way", "accuracy", "of full", "trained", "checkpoint", "seconds", "merged differs")
    table = Table(*columns)
    for r in results:
        table.add_row(
            r.way,
            f"{r.accuracy:.3f}",
            f"{r.ratio:.1%}",
            f"{r.trained_share:.2%}",
            f"{r.checkpoint_bytes / 2**20:.2f} MiB",
            f"{r.seconds:.0f}",
            "" if r.difference is None else f"{r.difference:.1e}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
