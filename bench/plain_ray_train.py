"""A plain Ray Train loop, as Ray's documentation shows it: what benchmarks compare Shoal with.

    python bench/plain_ray_train.py '{"model": ..., "rows": ..., "storage": ..., ...}'

Attaches where RAY_ADDRESS points, or starts Ray.

A pretrained classifier of `transformers`, a `DataLoader`, `prepare_model`, `prepare_data_loader`,
`ray.train.report` with a checkpoint after every `checkpoint_every` steps, and `max_failures` for
the restarts, which go on from the last checkpoint. By the book, except that a checkpoint within an
epoch also holds the position in it.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def train_func(config: dict[str, Any]) -> None:
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

    context = ray.train.get_context()
    is_shared = context.get_world_size() > 1  # else Ray wraps neither the model nor the sampler
    rows = pq.read_table(config["rows"]).to_pylist()
    loader = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=config["global_batch_size"] // context.get_world_size(),
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
    )
    loader = ray.train.torch.prepare_data_loader(loader)

    epoch = batches_done = step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"))
        (model.module if is_shared else model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, batches_done, step = state["epoch"], state["batches_done"], state["step"]
    if context.get_world_rank() == 0:
        with Path(config["starts"]).open("a") as starts:
            starts.write(f"{step}\n")

    while step < config["steps"]:
        if is_shared:
            loader.sampler.set_epoch(epoch)
        last = batches_done + config["steps"] - step
        for batch in itertools.islice(loader, batches_done, last):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            batches_done, step = batches_done + 1, step + 1
            if step % config["checkpoint_every"] == 0:
                with tempfile.TemporaryDirectory() as folder:
                    checkpoint = None
                    if context.get_world_rank() == 0:
                        state = {
                            "model": (model.module if is_shared else model).state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "epoch": epoch,
                            "batches_done": batches_done,
                            "step": step,
                        }
                        torch.save(state, Path(folder, "state.pt"))
                        checkpoint = Checkpoint.from_directory(folder)
                    ray.train.report({"loss": loss.item()}, checkpoint=checkpoint)
        epoch, batches_done = epoch + 1, 0


def main() -> None:
    config = json.loads(sys.argv[1])
    ray.init()
    TorchTrainer(
        train_func,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=config["workers"]),
        run_config=RunConfig(
            name=config["name"],
            storage_path=config["storage"],
            failure_config=FailureConfig(max_failures=100),
        ),
    ).fit()


if __name__ == "__main__":
    main()
