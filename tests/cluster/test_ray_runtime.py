"""How many workers there is room for, and what is said where it is too little."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster import ray_runtime
from cluster.ray_runtime import (
    describe_shortage,
    refuse_too_small,
    resources_of,
    room_for,
    room_for_trials,
)
from jobs.errors import ClusterError
from jobs.spec import Workers
from tests.tiny import tiny_job

GIB = 2**30
SPACE = {"model.dropout": {"uniform": [0, 0.1]}}


def node(cpus: float, *, gpus: float = 0, memory_gib: float = 64) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "memory": memory_gib * GIB, "node:10.0.0.1": 1.0}


@pytest.mark.parametrize(
    ("workers", "nodes", "room"),
    [
        ({"count": 4}, [], 0),
        ({"count": 4, "cpus": 2}, [node(5), node(3)], 3),  # not 8 // 2: a worker lies in one node
        ({"count": 4, "cpus": 1}, [node(0), node(4)], 4),
        ({"count": 4, "cpus": 4, "gpus": 1}, [node(64, gpus=2), node(64)], 2),
        ({"count": 4, "memory_gib": 48}, [node(64, memory_gib=100)], 2),
        ({"count": 1}, [{"GPU": 8.0}], 0),
    ],
)
def test_each_worker_lies_in_one_node(
    workers: dict[str, Any], nodes: list[dict[str, float]], room: int
) -> None:
    assert room_for(Workers(**workers), nodes) == room


@pytest.mark.parametrize(
    ("share", "nodes", "room"),
    [
        (0.5, [node(8, gpus=1)], 2),
        (0.1, [node(64, gpus=1)], 10),  # and not 1 // 0.1
        (0.6, [node(8, gpus=2)], 2),  # not 2 // 0.6: a share lies on one GPU
        (0.25, [node(3, gpus=4)], 3),
        (0.5, [node(8, gpus=1.5), node(8, gpus=0.4)], 3),  # of what is free
        (1.0, [node(8, gpus=2)], 2),
    ],
)
def test_trials_share_gpus(share: float, nodes: list[dict[str, float]], room: int) -> None:
    assert room_for(Workers(gpus=1), nodes, gpu_share=share) == room


def test_a_trial_has_room_for_all_of_its_workers_or_none(tmp_path: Path) -> None:
    data = {"train": "train", "validation": "validation"}
    parts = {"workers": {"count": 3, "cpus": 2}, "search": {"space": SPACE}}
    job = tiny_job(tmp_path, data, "runs", **parts)
    assert room_for_trials(job, [node(4), node(2)]) == 1
    assert room_for_trials(job, [node(5), node(3)]) == 1
    assert room_for_trials(job, [node(5), node(1)]) == 0
    assert room_for_trials(job, [node(13)]) == 2


def test_a_worker_asks_for_what_the_job_gives_it_and_no_more() -> None:
    assert resources_of(Workers(cpus=2)) == {"CPU": 2}
    assert resources_of(Workers(cpus=2, gpus=1, memory_gib=0.5)) == {
        "CPU": 2,
        "GPU": 1,
        "memory": GIB // 2,
    }


def test_a_shortage_is_a_sum_that_people_can_check() -> None:
    assert describe_shortage(Workers(count=8, min=2, cpus=4), [node(4), node(2), node(0)]) == (
        "2 workers need 2 x 4 CPUs, and the cluster's 3 nodes have room for 1 (6 CPUs)"
    )
    assert describe_shortage(Workers(count=1, cpus=1, gpus=1, memory_gib=8), [node(4)]) == (
        "1 worker needs 1 x 1 CPU and 1 GPU and 8 GiB memory, and the cluster's 1 node has room "
        "for 0 (4 CPUs, 0 GPUs, 64 GiB memory)"
    )


def test_room_that_something_else_holds_is_told_apart_from_room_that_is_not_there() -> None:
    workers, nodes = Workers(count=2), [node(2), node(0)]
    held = describe_shortage(workers, nodes, free=[node(1), node(0)])
    assert held == (
        "2 workers need 2 x 1 CPU, and the cluster's 2 nodes have room for 2 (2 CPUs), but "
        "something else holds part of it: there is room for 1 now"
    )
    assert describe_shortage(workers, nodes, free=nodes).endswith("have room for 2 (2 CPUs)")


def test_a_share_of_a_gpu_is_told_as_such() -> None:
    assert describe_shortage(Workers(gpus=1), [node(4), node(4)], gpu_share=0.25) == (
        "1 worker needs 1 x 1 CPU and 0.25 GPUs, and the cluster's 2 nodes have room for 0 "
        "(8 CPUs, 0 GPUs)"
    )


DRIVER = """
import os, signal, sys
from cluster.ray_runtime import ray_cluster
from jobs.spec import Workers

signal.signal(signal.SIGTERM, lambda *_: print("asked to end"))
with ray_cluster(Workers()):
    os.kill(os.getpid(), signal.SIGTERM)
    print("goes on")
"""


SHARED_CLUSTER = """
import time
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from cluster.ray_runtime import free_on_nodes, room_for
from jobs.spec import Workers

def soon(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, (free_on_nodes(), free_on_nodes(own=own))
        time.sleep(0.05)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False)
try:
    own = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
    another = placement_group([{"CPU": 1}])
    assert own.wait(60) and another.wait(60)
    soon(lambda: room_for(Workers(), free_on_nodes()) == 1)
    assert room_for(Workers(), free_on_nodes(own=own)) == 3
    (held,) = ray.util.placement_group_table(another)["bundles_to_node_id"].values()
    lost, = (node for node in nodes if node.node_id != held)
    cluster.remove_node(lost)
    soon(lambda: (room_for(Workers(), free_on_nodes(own=own)), len(free_on_nodes())) == (1, 2))
    remove_placement_group(own)
    soon(lambda: room_for(Workers(), free_on_nodes()) == 1)
    assert room_for(Workers(), free_on_nodes(own=own)) == 1
finally:
    ray.shutdown()
    cluster.shutdown()
print("counted")
"""


def test_room_is_what_others_do_not_hold_on_nodes_that_live() -> None:
    """On a real cluster: with a group of one's own over two nodes, and another's."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SHARED_CLUSTER],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.stdout.splitlines()[-1:] == ["counted"], done.stdout + done.stderr


def test_a_driver_that_is_asked_to_end_decides_itself_what_it_does() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-2:] == ["asked to end", "goes on"]


def test_a_driver_hears_once_that_its_own_node_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    heard = threading.Event()
    looks = iter([ConnectionError("the cluster is away"), False, True])

    def look() -> bool:
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    def tell() -> None:
        told.append("taken")
        heard.set()

    monkeypatch.setattr(ray_runtime, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(ray_runtime, "_own_node_is_draining", look)
    with ray_runtime.own_node_watched(tell):
        assert heard.wait(20)
    assert told == ["taken"]
    assert next(looks, None) is None


def test_this_machine_must_hold_the_fewest_workers_only() -> None:
    has = {"CPU": 4.0, "memory": 8.0 * GIB}
    refuse_too_small(Workers(count=8, min=2, cpus=2), has)
    with pytest.raises(ClusterError) as refused:
        refuse_too_small(Workers(count=8, min=3, cpus=2), has)
    (problem,) = refused.value.problems
    assert problem.message == "3 workers need 6 CPUs, but this machine has 4"
    assert (problem.hint or "").startswith("lower workers.min or workers.cpus")
