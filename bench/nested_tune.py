"""Trials of Ray Tune that each start a TorchTrainer: what a study is compared with.

    python bench/nested_tune.py '{"model": ..., "rows": ..., "storage": ..., ...}'

As Ray's documentation has it: the trainable is a function that builds a TorchTrainer with
TuneReportCallback, and the worker reports a checkpoint. It writes when each trial has ended, one
line of Unix seconds each.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.train
import ray.train.torch
import ray.tune
import torch
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def train_fn_per_worker(config: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForSequenceClassification.from_pretrained(
        config["model"], num_labels=len(config["labels"])
    )
    model = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"])

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = tokenizer(
            [row["text"] for row in rows], padding=True, truncation=True,
            max_length=config["max_tokens"], return_tensors="pt",
        )  # fmt: skip
        batch["labels"] = torch.tensor([config["labels"].index(row["label"]) for row in rows])
        return dict(batch)

    loader = DataLoader(
        pq.read_table(config["rows"]).to_pylist(),  # type: ignore[arg-type]
        batch_size=config["global_batch_size"],
        shuffle=True,
        collate_fn=collate,
    )
    loss = torch.tensor(0.0)
    for batch in ray.train.torch.prepare_data_loader(loader):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder, "model.pt"))
        ray.train.report(
            {"loss": loss.item()}, checkpoint=ray.train.Checkpoint.from_directory(folder)
        )


def train_driver_fn(config: dict[str, Any]) -> None:
    trainer = TorchTrainer(
        train_fn_per_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name=f"train-trial_id={ray.tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()


class Ends(ray.tune.Callback):
    """Writes when trials end."""

    def __init__(self, file: str) -> None:
        self._file = file

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with Path(self._file).open("a") as file:
            file.write(f"{time.time()}\n")


def main() -> None:
    config = json.loads(sys.argv[1])
    at_once = config.pop("at_once")
    # One for the driver of each trial and one for its worker.
    ray.init(num_cpus=2 * at_once)
    tuner = ray.tune.Tuner(
        train_driver_fn,
        param_space=config | {"learning_rate": ray.tune.loguniform(1e-4, 1e-1)},
        tune_config=ray.tune.TuneConfig(
            num_samples=config.pop("trials"), max_concurrent_trials=at_once
        ),
        run_config=ray.tune.RunConfig(
            name=config.pop("name"),
            storage_path=config["storage"],
            callbacks=[Ends(config.pop("ends"))],
            verbose=0,
        ),
    )
    errors = tuner.fit().errors
    if errors:
        raise errors[0]


if __name__ == "__main__":
    main()
