"""One run on several Ray nodes that fail, each in its own way, while it goes on.

A node is frozen for longer than it takes to miss it, and woken; one is cut off from everything, and
comes back; one is killed; at last the head is killed with the driver, while the nodes of workers
live on, and the run is resumed under a new head. What is left at the end is compared with the order
of rows that one undisturbed rank reads.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import yaml

from cluster.storage import Store, join_uri, open_store
from jobs.record import Attempt, State
from jobs.runs import RunReader
from jobs.submit import request_stop
from tests.evidence import global_batches, rows_by_epoch
from tests.faulty_proxy import proxy_to
from tests.nodes import Node, Nodes, nodes
from tests.tiny import tiny_model, tiny_reviews, tiny_tree
from trainers.data.cache import NodeCache
from trainers.data.index import open_index
from trainers.data.stream import RankStream
from trainers.tasks.task import build_task

pytestmark = pytest.mark.timeout(600)

ROWS = 768
GLOBAL_BATCH = 16
RUN = "flaky"
WAIT_SECONDS = 180
END_SECONDS = 150
"""Ray's processes give up a head that is gone 60 s after they have missed it, each by itself; and
what they miss takes time to be missed where all cores are taken."""
STEPS_BETWEEN = 15
"""Steps that an attempt makes, and saves some of, before the next node fails."""


@dataclass(frozen=True)
class Failure:
    """A node that failed, and what came after it."""

    host: str
    before: Attempt
    after: Attempt
    left: list[str] = field(default_factory=list)
    """Commands that still ran there a while after the node had woken or come back."""


@dataclass(frozen=True)
class Story:
    """What has happened to the run, and what it has left."""

    runs: Store
    shared: str | None
    """Why the nodes had no network of their own, if so."""
    failures: dict[str, Failure]
    exit_code: int
    said: str
    """By the command that started the run."""


@pytest.fixture(scope="module")
def story(bucket: Store, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("nodes")
    place = bucket.within("nodes")
    data = tiny_reviews(join_uri(place.uri, "data"), rows=ROWS, rows_per_group=64, held_out=16)
    tree = tiny_tree(
        tiny_model(folder / "model", hidden=96),
        {"train": data["train"], "seed": 3},
        join_uri(place.uri, "runs"),
        batching={"global_batch_size": GLOBAL_BATCH},
        train={"epochs": 10_000, "log_rows": True},
        checkpoint={"every_steps": 10},
        workers={"count": 2, "min": 1, "resize_seconds": 3600.0},
        retries={"worker_failures": 10},
    )
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))
    runs = open_store(join_uri(place.uri, "runs"))
    # The store takes its time over each save, for which the next one waits: nodes fail and come
    # back in minutes, and all that is trained meanwhile is counted in the end.
    with (
        proxy_to(os.environ["AWS_ENDPOINT_URL_S3"]) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        proxy.late_seconds = 1.0
        proxy.fail("late", "PUT", "checkpoints/", times=10**9)
        return play(folder, runs)


def play(folder: Path, runs: Store) -> Story:
    """Three nodes with room for one worker each; two workers are wanted, and one is enough."""
    with nodes(cpus=0, env={"HF_HUB_OFFLINE": "1"}) as cluster:
        cluster.add_several(3, cpus=1)
        with driver(cluster, folder, "run", "job.yaml", "--run-id", RUN) as run:
            play = Play(cluster, runs, run, folder / "said.log")
            first = play.await_attempt(workers=2)

            frozen = play.node_of(first, rank=1)
            frozen.freeze()
            second = play.await_attempt(after=first, workers=2)
            frozen.thaw()
            left_by_frozen = play.await_end_of(frozen)

            cut = play.node_of(second, rank=0)
            cut.cut_off()
            third = play.await_attempt(after=second, workers=1)
            cut.join_up()
            left_by_cut = play.await_end_of(cut)

            for node in (frozen, cut):
                node.begin()
            for node in (frozen, cut):
                node.await_joined()
            killed = play.node_of(third, rank=0)
            killed.kill()
            # Ray counts nodes that have just joined now or a while later.
            fourth = play.await_attempt(after=third)
            cluster.head.kill()
            run.wait(WAIT_SECONDS)

        cluster.replace_head()
        orphan = play.node_of(fourth, rank=0)
        killed.start()
        with driver(cluster, folder, "resume", join_uri(runs.uri, RUN)) as run:
            play = Play(cluster, runs, run, folder / "said.log")
            fifth = play.await_attempt(after=fourth)
            left_by_orphan = play.await_end_of(orphan)
            request_stop(runs, RUN, by="the test")
            code = run.wait(WAIT_SECONDS)
    return Story(
        runs,
        cluster.shared,
        {
            "frozen": Failure(frozen.host, first, second, left_by_frozen),
            "cut off": Failure(cut.host, second, third, left_by_cut),
            "killed": Failure(killed.host, third, fourth),
            "left by its head": Failure(orphan.host, fourth, fifth, left_by_orphan),
        },
        exit_code=code,
        said=(folder / "said.log").read_text(),
    )


@contextmanager
def driver(cluster: Nodes, folder: Path, *command: str) -> Iterator[subprocess.Popen[Any]]:
    with (folder / "said.log").open("wb") as said:
        process = cluster.popen(
            [sys.executable, "-m", "jobs.cli", *command],
            cwd=folder,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


class Play:
    """The run as it goes on."""

    def __init__(self, cluster: Nodes, runs: Store, run: subprocess.Popen[Any], said: Path) -> None:
        self._cluster = cluster
        self._reader = RunReader(runs, RUN)
        self._run = run
        self._said = said

    def await_attempt(self, *, workers: int | None = None, after: Attempt | None = None) -> Attempt:
        """The next attempt, once it gets on; it must have so many workers, if given."""
        number = 1 if after is None else after.attempt + 1

        def gets_on() -> bool:
            attempts = self._reader.attempts()
            return bool(attempts) and (
                attempts[-1].attempt >= number
                and self._steps_of(attempts[-1]) >= STEPS_BETWEEN
                and self._has_saved(attempts[-1])
            )

        self._wait(gets_on, f"attempt {number} does not get on")
        attempt = self._reader.attempts()[-1]
        assert workers in (None, attempt.world_size)
        return attempt

    def _has_saved(self, attempt: Attempt) -> bool:
        return any(
            manifest.attempt == attempt.attempt and manifest.step > (attempt.restored_step or 0)
            for manifest in self._reader.manifests()
        )

    def node_of(self, attempt: Attempt, *, rank: int) -> Node:
        """Where a rank of the attempt runs."""
        if self._cluster.network is not None:
            return next(node for node in self._cluster.all if node.host == attempt.hosts[rank])
        hosting = [node for node in self._cluster.all if any(map(is_worker, node.processes()))]
        return hosting[rank]

    def await_end_of(self, node: Node) -> list[str]:
        """Commands of the node's processes that do not end by themselves."""
        commands = {process: command_of(process) for process in node.processes()}
        _, left = psutil.wait_procs(list(commands), timeout=END_SECONDS)
        states = {process: state_of(process) for process in left}
        return [
            f"{state}: {commands[process]}"
            for process, state in states.items()
            # One that nobody has asked for its exit code has ended all the same.
            if state not in (None, psutil.STATUS_ZOMBIE)
        ]

    def _steps_of(self, attempt: Attempt) -> int:
        return sum(
            line["kind"] == "train" and line["attempt"] == attempt.attempt
            for line in self._reader.metrics_lines()
        )

    def _wait(self, condition: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if self._run.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{otherwise}:\n{self._said.read_text()}")
            time.sleep(1.0)  # each look asks the store several times


def is_worker(process: psutil.Process) -> bool:
    return "RayTrainWorker" in command_of(process)


def state_of(process: psutil.Process) -> str | None:
    """None where it has ended."""
    with suppress(psutil.NoSuchProcess):
        return str(process.status())
    return None


def command_of(process: psutil.Process) -> str:
    """Empty where it has ended."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


# ------------------------------------------------------------------------------- what it must show


@pytest.mark.parametrize("how", ["frozen", "cut off", "killed", "left by its head"])
def test_a_run_goes_on_without_a_node_that_is(how: str, story: Story) -> None:
    if how == "cut off" and story.shared is not None:
        pytest.skip(f"nodes share the network of this host, as {story.shared}: it was frozen too")
    failure = story.failures[how]
    assert failure.after.restored_step is not None
    assert failure.after.restored_step > (failure.before.restored_step or 0)
    if story.shared is None:
        assert failure.host in failure.before.hosts
        assert failure.host not in failure.after.hosts
    # Its ranks wake into a run that has gone on, and whoever started them is gone.
    assert failure.left == []


def test_the_run_ends_as_it_is_asked_to(story: Story) -> None:
    assert story.exit_code == State.STOPPED.exit_code, story.said
    result = RunReader(story.runs, RUN).result()
    assert result is not None
    assert result.state is State.STOPPED


def test_rows_are_used_once_in_the_order_of_an_undisturbed_rank(story: Story) -> None:
    batches = global_batches(story.runs, RUN)
    assert sorted(batches) == list(range(1, max(batches) + 1))
    assert batches == undisturbed(story.runs, steps=max(batches))
    *whole, last = rows_by_epoch(story.runs, RUN).values()
    assert whole
    assert all(epoch == Counter(range(ROWS)) for epoch in whole)
    assert max(last.values()) == 1


def undisturbed(runs: Store, *, steps: int) -> dict[int, list[int]]:
    """The global batches as one rank reads them."""
    spec = RunReader(runs, RUN).spec()
    data = open_store(spec.data.train)
    index = open_index(data)
    first = RunReader(runs, RUN).attempts()[0]
    assert first.lanes is not None
    assert first.window is not None
    task = build_task(spec, model_folder=Path(spec.model.source), index=index)
    batches: dict[int, list[int]] = {}
    with TemporaryDirectory() as folder:
        stream = RankStream(
            store=data,
            index=index,
            columns=task.columns,
            encode=task.encode,
            rank=0,
            world_size=1,
            seed=spec.data.seed,
            lanes=first.lanes,
            window=first.window,
            cache=NodeCache(Path(folder), limit_bytes=2**28),
        )
        for epoch in itertools.count():
            for batch in stream.batches(epoch=epoch, next_item=0, global_batch_size=GLOBAL_BATCH):
                if len(batches) == steps:
                    stream.close()
                    return batches
                batches[len(batches) + 1] = batch.rows.tolist()
    raise AssertionError("unreachable")
