"""Memory that runs out in a step or an evaluation, and by which micro-batch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from jobs.errors import ClusterError, Problem, ShoalError, TrainingError
from jobs.spec import JobSpec
from trainers.microbatch import Cutting, IntArray, computed_tokens, cut_microbatches

_OTHER_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""What torch says in errors of no type of their own."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BLOCKS = (2**30, 2**25)
"""Sizes below which a block comes from the heap; glibc before 2.36 takes 32 MiB at most."""


def keep_freed_memory() -> None:
    """Has the allocator of the C library keep what a pass has freed for the next one.

    By default glibc gives large blocks back to the system at once, which then has to clear each
    page anew: up to a tenth of a step on a CPU. What the process holds stays at its peak. Nothing
    happens with other C libraries. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    for num_bytes in _LARGE_BLOCKS:
        if mallopt(_M_MMAP_THRESHOLD, num_bytes):
            return


def give_back_memory() -> None:
    """Has glibc give what is freed back to the system. Source: malloc_trim(3)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


class MicrobatchTooLarge(Exception):  # noqa: N818 - named for what it says
    """The memory did not suffice for the passes over some rows."""

    def __init__(self, *, rows: int, tokens: int) -> None:
        super().__init__(f"{rows} rows of {tokens} tokens in all do not fit")
        self.rows = rows
        """Of the largest micro-batch."""
        self.tokens = tokens
        """That its layers compute (`computed_tokens`)."""


@contextmanager
def passes_over(lengths: IntArray, cutting: Cutting) -> Iterator[None]:
    """Inside the block this rank's rows, of `lengths` tokens, go through the model, and what they
    have taught goes into the weights.

    Raises MicrobatchTooLarge in place of an error of memory. It names the largest micro-batch into
    which `cut_microbatches` cuts the rows, whichever of them failed: what the passes before it have
    left behind counts too. A rank without rows, whose passes are of padding, has none to name: its
    error is raised as it is.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) or not len(lengths):
            raise
        cuts = cut_microbatches(lengths, cutting)
        sizes = [(computed_tokens(lengths[cut], cutting), len(cut)) for cut in cuts]
        tokens, rows = max(sizes)
        raise MicrobatchTooLarge(rows=rows, tokens=tokens) from error


class MemoryFault(ClusterError):  # noqa: N818
    """A micro-batch does not fit into a worker's memory; the next attempt's are smaller."""

    is_of_place = False


def memory_fault(error: MicrobatchTooLarge, *, step: int, spec: JobSpec) -> ShoalError:
    """The same for the user: a MemoryFault where smaller micro-batches may help, else a
    TrainingError. `spec` is the job with the limit that was in force."""
    if error.rows > 1:
        limit = spec.batching.max_tokens_per_microbatch
        included = "" if spec.batching.packing else ", padding included,"
        held = "" if limit == "auto" else f" (the limit was {limit} tokens)"
        return MemoryFault(
            Problem(
                f"after step {step} a micro-batch of {error.rows} rows and {error.tokens} tokens"
                f"{included} does not fit into memory{held}",
                f"a restart halves it; give a new run batching.max_tokens_per_microbatch: "
                f"{error.tokens // 2}",
            )
        )
    return TrainingError(
        Problem(
            f"after step {step} a micro-batch of one row, {error.tokens} tokens, does not fit into "
            "memory",
            f"lower task.max_tokens, which is {spec.task.max_tokens}, freeze a part of the model "
            "with model.freeze, name a smaller model in model.source, or give each worker more "
            "memory",
        )
    )


def room_fault(error: Exception) -> TrainingError:
    """Memory that ran out apart from any micro-batch, such as by the model itself."""
    return TrainingError(
        Problem(
            "the memory does not suffice for the model and its optimizer: "
            + str(error).partition("\n")[0],
            "name a smaller model in model.source, freeze a part of it with model.freeze, or give "
            "each worker more memory",
        )
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OTHER_TEXTS)
