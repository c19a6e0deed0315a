"""Processes that turn rows into shards: tokenize, encode, checksum, write to the store.

Tasks are few and large. At most one more than there are processes is held at a time, and reports
come back in the order of the tasks, so the result does not depend on the number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import Any

import pyarrow as pa

from cluster.storage import Store
from jobs.errors import EnvironmentFault, Problem
from trainers.data.image_folder import check_images
from trainers.data.index_draft import ShardReport
from trainers.data.inspection import inspect_shard
from trainers.data.shards import Roles, Sizes, encode_shard
from trainers.data.tokenizers import Tokenization

_INLINE_BYTES = 8 * 2**20
"""Rows that are not worth the start of a process."""


@dataclass(frozen=True)
class WriteShard:
    """The task to write rows as a shard."""

    name: str
    rows: pa.Table
    store: Store
    sizes: Sizes
    roles: Roles
    tokenization: Tokenization | None
    image_columns: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return int(self.rows.nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrow pickles the whole buffers of a slice; an IPC stream holds its rows alone.
        values = [getattr(self, field.name) for field in fields(self) if field.name != "rows"]
        return _unpack_write, (_rows_to_stream(self.rows), *values)

    def run(self) -> ShardReport:
        table = self.rows
        for column in self.image_columns:
            check_images(table[column])
        if self.tokenization is not None and self.roles.text is not None:
            tokens = self.tokenization.encode(table[self.roles.text])
            table = table.append_column(self.tokenization.record.column, tokens)
        data, report = encode_shard(self.name, table, sizes=self.sizes, roles=self.roles)
        self.store.write(self.name, data)
        return report


@dataclass(frozen=True)
class InspectShard:
    """The task to read a shard that is there."""

    name: str
    store: Store
    schema: pa.Schema
    roles: Roles
    num_bytes: int

    def run(self) -> ShardReport:
        return inspect_shard(self.store, self.name, schema=self.schema, roles=self.roles)


Task = WriteShard | InspectShard


def _rows_to_stream(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def _unpack_write(stream: pa.Buffer, name: str, *values: Any) -> WriteShard:
    with pa.ipc.open_stream(stream) as reader:
        return WriteShard(name, reader.read_all(), *values)


class ShardWorkers:
    """Runs tasks in `processes` processes, or in this one where that is 1."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: deque[tuple[Future[ShardReport], Callable[[ShardReport], None]]] = deque()

    def __enter__(self) -> ShardWorkers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(
        self, task: Task, *, is_last: bool, take_report: Callable[[ShardReport], None]
    ) -> None:
        """Run a task; `take_report` is called in this thread, in the order of submission.

        Waits while too many tasks are under way. A small last task runs in this process where no
        other was started. Raises what the task raised, EnvironmentFault where a process died.
        """
        small = is_last and self._pool is None and task.num_bytes <= _INLINE_BYTES
        if self._processes == 1 or small:
            take_report(task.run())
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_process,
            )
        with _interrupts_held_back():
            future = self._pool.submit(_run, task)
        self._waiting.append((future, take_report))
        while len(self._waiting) > self._processes + 1:
            self._take_first()

    def finish(self) -> None:
        """Wait for all tasks."""
        while self._waiting:
            self._take_first()

    def _take_first(self) -> None:
        future, take_report = self._waiting.popleft()
        try:
            report = future.result()
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                Problem(
                    "a process that wrote shards was killed, perhaps because memory ran out",
                    "use fewer --processes, or a smaller --shard-bytes",
                )
            ) from error
        take_report(report)


_stores: dict[str, Store] = {}
"""Of this process, with their connections: each task brings its own, without any."""


def _run(task: Task) -> ShardReport:
    return replace(task, store=_stores.setdefault(task.store.uri, task.store)).run()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal, but the parent decides what happens then.

    A process that is started in here does not see it, from its first instruction on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_process() -> None:
    # The processes share the cores already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pa.set_cpu_count(1)
    parent: Any = multiprocessing.parent_process()
    # A parent that is killed cannot end its processes, and they would wait for tasks for ever.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
