"""What the experiments call right, and what not, by results that are made up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any


def broken(result: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The result with one value changed; a path is `a/b/0/c`."""
    changed = copy.deepcopy(result)
    *above, last = path.split("/")
    node: Any = changed
    for key in above:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[last] = value
    return changed


def test_faults(bench: Callable[[str], ModuleType]) -> None:
    faults = bench("faults")
    hit = {"found": 3, "accepted": 0, "requests": 9, "requests_hit": 3, "objects": 3}
    right = {
        "is_small": False,
        "share": 0.1,
        "outages_seconds": [20.0, 75.0],
        "run": {
            "injected": {"away": 9, **dict.fromkeys((*faults.SICK, *faults.FLIPS), 1)},
            "requests": 9 + 10 * len((*faults.SICK, *faults.FLIPS)),
            "refused_in_outages": [4, 5],
            "same_weights": True, "same_batches": True, "rows_lost": 0, "rows_repeated": 0,
            "waits_told": 1, "saves_repeated": 0,
        },
        "bodies": {"rows read": hit | {"objects_hit": 2}},
        "stored": {"shards": {"found": 5, "harmless": 1}},
    }  # fmt: skip
    assert faults.is_right(right)
    for path, value in (
        ("run/same_weights", False),
        ("run/rows_lost", 1),
        ("run/refused_in_outages", [4, 0]),
        ("run/refused_in_outages", [9]),
        ("run/waits_told", 0),
        ("run/requests", 1_000),
        ("run/injected", {"away": 9, "late": 50}),
        ("bodies/rows read/accepted", 1),
        ("bodies/rows read/objects_hit", 1),
        ("stored/shards", {"harmless": 6, "found": 0}),
    ):
        assert not faults.is_right(broken(right, path, value)), path


def test_elastic(bench: Callable[[str], ModuleType]) -> None:
    elastic = bench("elastic")
    attempts = [
        {"workers": workers, "gave_way": gave_way, "steps_lost": 0 if gave_way else 7}
        for workers, gave_way in ((1, True), (2, False), (1, True), (1, True))
    ]
    right = {
        "attempts": attempts,
        "steps": 165,
        "are_all_steps_there": True,
        "global_batches_that_differ": 0,
        "loss_difference_max": 1e-7,
        "rows": {"lost": 0, "repeated": 0},
        "evaluations": {"shared": 7, "not_each_row_once": 0, "loss_difference_max": 1e-7},
        "polling_share_of_a_step": 0.004,
    }
    assert elastic.is_right(right, elastic.SMALL)
    assert not elastic.is_right(right, elastic.FULL)
    for path, value in (
        ("attempts/0/gave_way", False),
        ("attempts/1/gave_way", True),
        ("attempts/2/steps_lost", 1),
        ("attempts/1/workers", 1),
        ("are_all_steps_there", False),
        ("loss_difference_max", 1e-3),
        ("evaluations/loss_difference_max", 1e-3),
        ("evaluations/shared", 6),
        ("polling_share_of_a_step", 0.006),
    ):
        assert not elastic.is_right(broken(right, path, value), elastic.SMALL), path


def test_chaos(bench: Callable[[str], ModuleType]) -> None:
    chaos = bench("chaos")
    right = {
        "runs": [{"is_right": True}, {"is_right": True}],
        "moments": {"step": 20, "evaluation": 5, "upload": 8, "parts": 9, "driver": 6, "node": 2},
        "kills": [{}] * 50,
    }
    assert chaos.is_right(right, kills=50, is_small=False)
    for path, value in (
        ("runs/1/is_right", False),
        ("kills", [{}] * 49),
        ("moments/upload", 4),
        ("moments/driver", 1),
        ("moments/node", 0),
    ):
        assert not chaos.is_right(broken(right, path, value), kills=50, is_small=False), path


def test_recovery(bench: Callable[[str], ModuleType]) -> None:
    ratios = {"worker_seconds": 1.1, "worker_steps_lost": 0.2, "node_steps_lost": 0.1}
    recovery = bench("recovery")
    assert recovery.is_right({"ratios": ratios})
    for name, value in (
        ("worker_seconds", 1.2),
        ("worker_steps_lost", 1.0),
        ("node_steps_lost", 1.0),
    ):
        assert not recovery.is_right({"ratios": ratios | {name: value}}), name


def test_checkpoint(bench: Callable[[str], ModuleType]) -> None:
    right = {
        "still_share_of_ray_sync": 0.09,
        "copy_ratio": 1.1,
        "upload_ratio": 0.86,
        "restore_ratio": {"on disk": 0.85, "in memory": 0.83},
    }
    checkpoint = bench("checkpoint")
    assert checkpoint.is_right(right)
    for path, value in (
        ("still_share_of_ray_sync", 0.11),
        ("copy_ratio", 1.6),
        ("upload_ratio", 0.79),
        ("restore_ratio/on disk", 0.79),
        ("restore_ratio/in memory", 0.79),
    ):
        assert not checkpoint.is_right(broken(right, path, value)), path


def test_growth(bench: Callable[[str], ModuleType]) -> None:
    rounds = [{"rows": 20, "tokens": 90}, {"rows": 20, "tokens": 90}]
    right = {"rows_read": 20, "ranks": {"1": rounds, "2": copy.deepcopy(rounds)}}
    growth = bench("growth")
    assert growth.is_right(right)
    for path, value in (("ranks/2/1/rows", 19), ("ranks/1/0/tokens", 91), ("rows_read", 21)):
        assert not growth.is_right(broken(right, path, value)), path


def test_search_quality(bench: Callable[[str], ModuleType]) -> None:
    quality = bench("search_quality")
    for asha, plain, expected in (
        (10.0, 40.0, True),
        (10.1, 40.0, False),
        (None, 40.0, False),
        (10.0, None, False),
    ):
        pairs = {quality.JUDGED: {"median": asha}, quality.PLAIN: {"median": plain}}
        result = {"pairs": pairs, "share": quality.share({"pairs": pairs})}
        assert quality.is_right(result) is expected, (asha, plain)


def test_search_overhead(bench: Callable[[str], ModuleType]) -> None:
    overhead = bench("search_overhead")
    right = {
        "is_small": False,
        "trials": {"share_of_nested": 0.05},
        "driver": {
            "random, S3": {"memory_growth": 1.5, "event_growth": 1.5, "own_growth": 1.5},
        },
        "real": {"trials": 200, "finished": 50, "stopped": 150},
    }
    assert overhead.is_right(right)
    for path, value in (
        ("trials/share_of_nested", 0.051),
        ("driver/random, S3/memory_growth", 1.51),
        ("driver/random, S3/event_growth", 1.51),
        ("driver/random, S3/own_growth", 1.51),
        ("real/stopped", 149),
    ):
        assert not overhead.is_right(broken(right, path, value)), path
    small = right | {"is_small": True, "trials": {"share_of_nested": 0.2}}
    assert overhead.is_right(small)
    assert not overhead.is_right(broken(small, "real/finished", 49))


def test_search_chaos(bench: Callable[[str], ModuleType]) -> None:
    chaos = bench("search_chaos")
    right = {
        "studies": [{"is_right": True}, {"is_right": True}],
        "kills": [{"of": "slot"}] * 14 + [{"of": "driver"}] * 6,
    }
    assert chaos.is_right(right, kills=20)
    for path, value in (
        ("studies/1/is_right", False),
        ("kills", right["kills"][1:]),
        ("kills", [{"of": "slot"}] * 15 + [{"of": "driver"}] * 5),
        ("kills", [{"of": "driver"}] * 20),
    ):
        assert not chaos.is_right(broken(right, path, value), kills=20), path
    verdict = chaos.Verdict(
        study="asha",
        trials=8,
        reports=14,
        legs_lost=3,
        same_configurations=True,
        reports_missing=0,
        reports_added=0,
        reports_twice=0,
        other_ends=0,
        ended_twice=0,
    )
    assert verdict.is_right
    for name, value in (
        ("same_configurations", False),
        ("reports_missing", 1),
        ("reports_added", 1),
        ("reports_twice", 1),
        ("other_ends", 1),
        ("ended_twice", 1),
    ):
        assert not replace(verdict, **{name: value}).is_right, name
