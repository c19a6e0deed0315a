"""Loops beside Shoal's, one in each process: what bench/train.py compares with.

    python bench/plain_loops.py '{"loop": "naive" | "trainer" | "bare", ...}'

naive     every row padded to the most tokens, a whole global batch in one pass
trainer   Hugging Face's Trainer; `sampling` is random (dynamic padding) or group_by_length
bare      a torchrun loop over micro-batches that lie ready in memory: those of Shoal's run

On the `device` cpu or cuda, in the `precision` float32 or bfloat16 (autocast). The last line is
JSON: rows per second after the first steps, tokens computed and real ones, the accuracy on the test
rows afterwards, and on a GPU the most memory that training took.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification

Row = tuple[list[int], int]
"""Tokens, and the number of the class."""
Batch = dict[str, torch.Tensor]

LABELS = ("negative", "positive")


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(asked["seed"])
    loops: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "naive": _naive,
        "trainer": _trainer,
        "bare": _bare,
    }
    measured = loops[asked["loop"]](asked)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(measured), flush=True)


def _naive(asked: dict[str, Any]) -> dict[str, Any]:
    rows = rows_of(asked["train"])
    size, most = asked["global_batch_size"], asked["max_tokens"]
    rng = np.random.default_rng(asked["seed"])
    epochs = -(-asked["steps"] * size // len(rows))
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(epochs)])

    def batches() -> Iterator[list[Batch]]:
        for step in range(asked["steps"]):
            picked = [rows[i] for i in order[step * size : (step + 1) * size]]
            yield [padded(picked, to=most)]

    return _train(asked, batches())


def _bare(asked: dict[str, Any]) -> dict[str, Any]:
    """Micro-batches of each step of this rank; all ranks have as many steps."""
    rank = int(os.environ.get("RANK", "0"))
    steps: list[list[Batch]] = torch.load(Path(asked["batches"]) / f"{rank}.pt", weights_only=True)
    return _train(asked, iter(steps))


def _train(asked: dict[str, Any], steps: Iterator[list[Batch]]) -> dict[str, Any]:
    """AdamW, linear decay, clipping, and gradients that are those of the whole global batch."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    model = plain = _model(asked).to(asked["device"]).train()
    if world_size > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # As in Shoal: what has one dimension does not decay.
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=asked["learning_rate"],
        fused=True,
    )
    clock = _Clock(asked["warm_steps"])
    autocast = torch.autocast(
        asked["device"], dtype=torch.bfloat16, enabled=asked["precision"] == "bfloat16"
    )
    real = computed = 0
    for step, microbatches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = asked["learning_rate"] * (1 - step / asked["steps"])
        optimizer.zero_grad(set_to_none=True)
        for number, held in enumerate(microbatches):
            batch = {key: tensor.to(asked["device"]) for key, tensor in held.items()}
            waits = number < len(microbatches) - 1 and world_size > 1
            with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
                with autocast:
                    logits = model(
                        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                    ).logits
                    loss = nn.functional.cross_entropy(logits, batch["label"], reduction="sum")
                (loss * world_size / asked["global_batch_size"]).backward()
            real += int(held["attention_mask"].sum())
            computed += held["input_ids"].numel()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        clock.step_done()
    clock.stop()
    tokens = torch.tensor([real, computed])
    if world_size > 1:
        dist.all_reduce(tokens)
    peak = _peak_memory()
    return {
        "rows_per_second": clock.steps * asked["global_batch_size"] / clock.seconds(),
        "steps": asked["warm_steps"] + clock.steps,
        "real_tokens": int(tokens[0]),
        "computed_tokens": int(tokens[1]),
        "peak_memory_bytes": peak,
        "accuracy": _accuracy(plain, asked),
    }


def _trainer(asked: dict[str, Any]) -> dict[str, Any]:
    import datasets
    import transformers
    from transformers import (
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    transformers.utils.logging.set_verbosity_error()
    rows = rows_of(asked["train"])
    clock = _Clock(asked["warm_steps"])
    tokens = {"real": 0, "computed": 0}
    collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(asked["model"]))

    def collate(features: Any) -> Any:
        batch = collator(features)
        tokens["real"] += int(batch["attention_mask"].sum())
        tokens["computed"] += batch["input_ids"].numel()
        return batch

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_done()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

    trainer = Trainer(
        model=_model(asked),
        args=TrainingArguments(
            output_dir=asked["place"],
            per_device_train_batch_size=asked["trainer_batch"],
            gradient_accumulation_steps=asked["global_batch_size"] // asked["trainer_batch"],
            max_steps=asked["steps"],
            learning_rate=asked["learning_rate"],
            weight_decay=0.01,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            train_sampling_strategy=asked["sampling"],
            seed=asked["seed"],
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=asked["device"] == "cpu",
            bf16=asked["precision"] == "bfloat16",
        ),
        train_dataset=datasets.Dataset.from_dict(
            {
                "input_ids": [ids for ids, _ in rows],
                "attention_mask": [[1] * len(ids) for ids, _ in rows],
                "length": [len(ids) for ids, _ in rows],
                "labels": [label for _, label in rows],
            }
        ),
        data_collator=collate,
        callbacks=[Ticks()],
    )
    trainer.train()
    peak = _peak_memory()
    return {
        "rows_per_second": clock.steps * asked["global_batch_size"] / clock.seconds(),
        "steps": asked["warm_steps"] + clock.steps,
        "real_tokens": tokens["real"],
        "computed_tokens": tokens["computed"],
        "peak_memory_bytes": peak,
        "accuracy": _accuracy(trainer.model, asked),
    }


# ------------------------------------------------------------------------------- what they share


def rows_of(folder: str) -> list[Row]:
    """All rows of a folder of Parquet files with `input_ids` and `label`."""
    table = pq.read_table(sorted(Path(folder).glob("*.parquet")))
    labels = [LABELS.index(label) for label in table["label"].to_pylist()]
    return list(zip(table["input_ids"].to_pylist(), labels, strict=True))


def padded(rows: Sequence[Row], *, to: int | None = None) -> Batch:
    """A batch, padded to the longest of its rows, or to `to` tokens."""
    longest = to or max(len(ids) for ids, _ in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for number, (tokens, _) in enumerate(rows):
        ids[number, : len(tokens)] = tokens
        mask[number, : len(tokens)] = 1
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "label": torch.tensor([label for _, label in rows]),
    }


def _model(asked: dict[str, Any]) -> nn.Module:
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        asked["model"], num_labels=len(LABELS), dtype=torch.float32
    )
    return model


def _accuracy(model: nn.Module, asked: dict[str, Any]) -> float:
    """Part of the test rows that the model gets right."""
    model.eval()
    rows = sorted(rows_of(asked["test"]), key=lambda row: len(row[0]))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            batch = {
                key: tensor.to(asked["device"])
                for key, tensor in padded(rows[start : start + 64]).items()
            }
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
            right += int((logits.argmax(-1) == batch["label"]).sum())
    return right / len(rows)


def _peak_memory() -> int | None:
    """Bytes of the GPU's memory that tensors have taken at most; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


class _Clock:
    """Time of the steps after the first few, which find caches cold; waits for a GPU's work."""

    def __init__(self, warm_steps: int) -> None:
        self._left = warm_steps
        self._began = self._now()
        self._ended: float | None = None
        self.steps = 0

    def step_done(self) -> None:
        if self._left:
            self._left -= 1
            self._began = self._now()
        else:
            self.steps += 1

    def stop(self) -> None:
        self._ended = self._now()

    def seconds(self) -> float:
        return (self._ended or self._now()) - self._began

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


if __name__ == "__main__":
    main()
