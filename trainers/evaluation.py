"""Evaluation: every row of a set once, over all ranks, however uneven their shares."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from trainers import watchdog
from trainers.agreement import Agreement
from trainers.controls import Requests
from trainers.data.lanes import NotNeeded
from trainers.data.stream import RankBatch
from trainers.memory import passes_over
from trainers.microbatch import Cutting, IntArray, cut_microbatches
from trainers.parallel import autocast
from trainers.tasks.task import Batch, Metrics, Task

OnOutput = Callable[[IntArray, torch.Tensor, Batch], None]
"""Called with row ids [n], the model's output [n, ...] and the batch."""

_MOST_PASSES_BETWEEN_VOTES = 64
"""Micro-batches that are collated at once before the ranks agree to go on."""
_SECONDS_BETWEEN_VOTES = 1.0
"""What these may take before there are fewer of them between two votes."""


class BrokenOff(Exception):  # noqa: N818 - nothing is wrong
    """Raised on all ranks at the same point: the attempt is to end before its evaluation does."""

    def __init__(self, *, stops: bool) -> None:
        super().__init__("the evaluation is broken off")
        self.stops = stops
        """Whether the run is to stop; else the attempt gives way to another."""


def measure(
    model: nn.Module,
    task: Task,
    batches: Iterable[RankBatch],
    metrics: Metrics,
    *,
    device: torch.device,
    dtype: torch.dtype,
    cutting: Cutting,
    on_output: OnOutput | None = None,
    agreement: Agreement | None = None,
    asked: Callable[[], Requests] = Requests,
) -> None:
    """Updates `metrics` with what `model` (without its replication) says of the rows of `batches`.

    Add the states of all ranks afterwards, so that the result does not depend on how rows are
    shared out. With an `agreement` it is called by all ranks at the same time: where one of them
    cannot go on, it raises its error, and the others return; where one is `asked` to end, all raise
    BrokenOff. `batches` raise NotNeeded where they are waited for and `asked` says so from then on.
    A model that is cut over the ranks needs the agreement, as each pass gathers weights from all.

    Raises MicrobatchTooLarge where memory runs out in a pass, on this rank alone.
    """
    is_cut = isinstance(model, FSDPModule)

    def run(own: _Pass) -> None:
        watchdog.tick("evaluates")
        batch = own.batch if own.batch is not None else task.empty_batch()
        with passes_over(own.lengths, cutting):
            on_device = move(batch, device)
            output = task.forward(model, on_device)
            if own.batch is not None:
                metrics.update(output, on_device)
                if on_output is not None:
                    on_output(own.rows, output, on_device)

    passes = _passes(task, batches, cutting)
    was_training = model.training
    model.eval()
    try:
        with _no_gradient(model, cutting), autocast(device, dtype):
            if agreement is not None:
                _run_together(run, passes, agreement, is_cut=is_cut, asked=asked)
            else:
                assert not is_cut, "the ranks of a model that is cut run the same passes"
                for own in passes:
                    run(own)
    finally:
        model.train(was_training)
        if isinstance(model, FSDPModule):
            model.reshard()  # without a backward pass, its root would stay gathered


@dataclass(frozen=True, eq=False)
class _Pass:
    """A micro-batch, or a place for one: another rank has a batch, and this one has none left."""

    rows: IntArray
    """Row ids; shape [n]."""
    batch: Batch | None
    lengths: IntArray
    """Tokens of all rows of the batch from which it was cut, not of its own alone."""


_PLACE = _Pass(np.empty(0, dtype=np.int64), None, np.empty(0, dtype=np.int64))


def _passes(task: Task, batches: Iterable[RankBatch], cutting: Cutting) -> Iterator[_Pass]:
    for batch in batches:
        lengths = task.lengths(batch.items)
        for cut in cut_microbatches(lengths, cutting):
            with passes_over(lengths, cutting):
                collated = task.collate(batch.items.take(cut))
            yield _Pass(batch.rows[cut], collated, lengths)


def _run_together(
    run: Callable[[_Pass], None],
    passes: Iterator[_Pass],
    agreement: Agreement,
    *,
    is_cut: bool,
    asked: Callable[[], Requests],
) -> None:
    """Runs the passes of this rank; of a model that is cut, as many on all ranks.

    Before each some the ranks tell whether they can go on, and are to: an error of one, such as
    rows that cannot be read, ends the passes of all.
    """
    at_once, seconds, error = 1, 0.0, None
    while True:
        own, requests = list[_Pass](), Requests()
        try:
            if error is None:
                requests = asked()
                own = list(itertools.islice(passes, at_once))
        except NotNeeded:
            # The others wait for this rank: by its vote they hear of it, and that rows are left.
            requests, own = asked(), [_PLACE]
            assert requests.ends
        except Exception as caught:
            error = caught
        error = error or requests.superseded
        votes = agreement.gather(
            [len(own), error is not None, requests.stop, requests.yields, seconds]
        )
        if error is not None:
            raise error
        numbers, failed, stop, yielding, taken = zip(*votes, strict=True)
        if any(failed) or not any(numbers):
            return
        if any(stop) or any(yielding):
            raise BrokenOff(stops=any(stop))
        began = time.monotonic()
        try:
            for place in range(max(numbers) if is_cut else len(own)):
                run(own[place] if place < len(own) else _PLACE)
        except Exception as caught:
            if is_cut:
                raise  # the others wait in the pass, not for a vote
            error = caught
        seconds = time.monotonic() - began
        at_once = _next_number(at_once, seconds=max(taken))


def _next_number(at_once: int, *, seconds: float) -> int:
    """How many passes come before the next vote, by what those before the last took. Pure."""
    if seconds > _SECONDS_BETWEEN_VOTES:
        return max(1, at_once // 2)
    return min(2 * at_once, _MOST_PASSES_BETWEEN_VOTES)


def _no_gradient(model: nn.Module, cutting: Cutting) -> AbstractContextManager[None]:
    """Inference mode; no_grad for a model that is cut, whose gathered weights are used again in
    training, where tensors made in inference mode are not allowed, and for packed rows, as there
    are no nested tensors in inference mode."""
    if isinstance(model, FSDPModule) or cutting.packing:
        return torch.no_grad()
    return torch.inference_mode()


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied without waiting where it comes from pinned memory."""
    if device.type == "cpu":
        return batch
    return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}
