"""Sick storage: a run through a store that fails, and bits that are flipped on the way and at rest.

    python bench/faults.py [--share 0.1] [--outages 20 75] [--seed S] [--small] [--json FILE]

1. A run goes through a proxy that does something wrong with a share of all requests (503, 429,
   500, resets and cuts in the middle of a body, late answers, answers that are lost, flipped bits
   in both directions, bodies that come byte by byte) and drops all of them during the outages. It
   must end with the weights and the batches of a calm run: no row lost, none used twice.
2. Bits are flipped in the bodies of single requests: what is read or stored must be right all the
   same.
3. Bits are flipped in the stored objects of the newest checkpoint and in shards: the checkpoint
   must be passed over, the rows refused. A bit that nothing reads is harmless.

Exit code 1 where anything wrong is accepted, or where the run has not met each of the faults and
outages that it was to meet. `--small`: ranks that are no workers of Ray, and fewer faults.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lab
from rich.table import Table

from cluster.storage import Store, Transfer, open_store
from jobs.record import RunPaths
from jobs.runs import RunReader
from jobs.spec import JobSpec
from tests.evidence import final_weights, global_batches, rows_by_epoch
from tests.faulty_proxy import SICK, FaultyProxy, Kind, proxy_to
from tests.tiny import tiny_job, tiny_model, tiny_reviews

FLIPS: tuple[Kind, ...] = ("corrupt answer", "corrupt request")
SLOW_BODIES = 2
"""Bodies of row groups that would take hours; each costs the minute after which it is given up."""
WORKERS = 2
SURE_WAIT_SECONDS = 1.5 * Transfer().retry_seconds
"""An outage that is longer cannot be bridged by repeating single requests."""
LEAST_OF_SHARE = 0.8
"""Of the share of requests that was asked for: faults are drawn, and an answer that has no body,
such as that of an object that is not there, cannot be cut."""
ENDPOINT = "AWS_ENDPOINT_URL_S3"


@dataclass(frozen=True)
class Arena:
    """A job, the store of its runs and that of its data, and how large all of it is."""

    spec: JobSpec
    runs: Store
    data: Store
    is_small: bool
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--share", type=float, default=0.1, help="of requests that fail")
    parser.add_argument(
        "--outages", type=float, nargs="*", metavar="SECONDS", help="default: 20 75; small: 3"
    )
    parser.add_argument("--seed", type=int, help="default: another each time")
    arguments = lab.arguments_of(parser)
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().getrandbits(32)
    outages = arguments.outages
    if outages is None:
        outages = [3.0] if arguments.small else [20.0, 75.0]
    print(f"seed {seed}", file=sys.stderr)
    with lab.place() as place, lab.object_store(place) as bucket:
        arena = build(place, bucket, is_small=arguments.small, seed=seed)
        with proxy_to(os.environ[ENDPOINT]) as proxy:
            result = {
                "seed": seed,
                "share": arguments.share,
                "outages_seconds": outages,
                "is_small": arguments.small,
                "run": sick_run(arena, proxy, share=arguments.share, outages=outages),
                "bodies": flip_bodies(arena, proxy, flips=4 if arguments.small else 30),
            }
        result["stored"] = flip_stored(arena, flips=24 if arguments.small else 200)
    result["is_right"] = is_right(result)
    lab.tell("faults", result, tables=tables(result), json_file=arguments.json)
    sys.exit(0 if result["is_right"] else 1)


def build(place: Path, bucket: str, *, is_small: bool, seed: int) -> Arena:
    """Model and data in the store, and the job."""
    rows = 96 if is_small else 2000
    root = open_store(f"{bucket}/faults")
    model = root.within("model")
    for path in tiny_model(place / "model", hidden=64).iterdir():
        model.upload(path.name, path)
    data = tiny_reviews(
        f"{root.uri}/data", rows=rows, rows_per_group=16, rows_per_shard=rows // 3, held_out=40
    )
    spec = tiny_job(
        model.uri,
        {**data, "lanes": 2},
        f"{root.uri}/runs",
        train={"epochs": 2, "log_rows": True, "evaluate_every_steps": 12 if is_small else 50},
        checkpoint={"every_steps": 6 if is_small else 20, "keep_last": 2},
        workers={"count": WORKERS},
        tracking=["tensorboard"],
    )
    return Arena(spec, open_store(spec.store.uri), root.within("data/train"), is_small, seed)


# ------------------------------------------------------------------------------------ a sick run


def sick_run(
    arena: Arena, proxy: FaultyProxy, *, share: float, outages: list[float]
) -> dict[str, Any]:
    """Runs the job twice, calm and through the proxy; how the second differs, and what it met."""
    calm_seconds = run(arena, "calm")
    proxy.storm(share, (*SICK, *FLIPS), seed=arena.seed)
    if not arena.is_small:
        proxy.fail("trickle", "GET", "/train/shard", times=SLOW_BODIES)
    refused: list[int] = []
    ended = threading.Event()
    away = threading.Thread(
        target=take_away, args=(arena, proxy, outages, refused, ended), daemon=True
    )
    away.start()
    sick_seconds = run(arena, "sick", endpoint=proxy.url)
    ended.set()
    away.join()
    proxy.storm(0.0, (), seed=arena.seed)
    proxy.faults.clear()
    rows = rows_by_epoch(arena.runs, "sick")
    expected = {epoch: set(counts) for epoch, counts in rows_by_epoch(arena.runs, "calm").items()}
    events = list(RunReader(arena.runs, "sick").events())
    messages = [str(event.get("message")) for event in events]
    return {
        "calm_seconds": round(calm_seconds, 1),
        "sick_seconds": round(sick_seconds, 1),
        "requests": len(proxy.requests),
        "injected": dict(proxy.injected.most_common()),
        "refused_in_outages": refused,
        "same_weights": final_weights(arena.runs, "sick") == final_weights(arena.runs, "calm"),
        "same_batches": global_batches(arena.runs, "sick") == global_batches(arena.runs, "calm"),
        "rows_lost": sum(len(expected[epoch] - set(rows.get(epoch, {}))) for epoch in expected),
        "rows_repeated": sum(n - 1 for counts in rows.values() for n in counts.values()),
        "attempts": len(RunReader(arena.runs, "sick").attempts()),
        "waits_told": sum("for the store" in m for m in messages),
        "saves_repeated": sum("could not be stored" in m for m in messages),
        "told": [m for m in messages if "the store" in m],
    }


def take_away(
    arena: Arena,
    proxy: FaultyProxy,
    outages: list[float],
    refused: list[int],
    ended: threading.Event,
) -> None:
    """The outages, each with the first save after another checkpoint is there; adds how many
    requests met each. Those for which the run `ended` too early are left out."""
    seen = 0
    for seconds in outages:
        while (found := newest_step(arena.runs)) <= seen:
            if ended.wait(0.2):
                return
        seen, before = found, proxy.injected["away"]
        began = proxy.outage(seconds, method="PUT", part="/checkpoints/")
        while not began.wait(0.2):
            if ended.is_set():
                return
        time.sleep(seconds)
        refused.append(proxy.injected["away"] - before)


def newest_step(runs: Store) -> int:
    manifests = RunReader(runs, "sick").live_manifests()
    return manifests[-1].step if manifests else 0


def run(arena: Arena, run_id: str, *, endpoint: str | None = None) -> float:
    """Seconds that the job takes, by a way to the store of its own; it must succeed."""
    before, cache = os.environ[ENDPOINT], os.environ["SHOAL_CACHE"]
    os.environ[ENDPOINT] = endpoint or before
    os.environ["SHOAL_CACHE"] = f"{cache}-{run_id}"
    began = time.monotonic()
    try:
        (on_ranks if arena.is_small else on_ray)(arena.spec, run_id)
    finally:
        os.environ[ENDPOINT], os.environ["SHOAL_CACHE"] = before, cache
    return time.monotonic() - began


def on_ranks(spec: JobSpec, run_id: str) -> None:
    from tests.ranks import assignment_of, run_ranks

    outcome = run_ranks(assignment_of(spec, run_id), world_size=WORKERS)
    assert outcome is not None
    assert outcome.failure is None, outcome.failure


def on_ray(spec: JobSpec, run_id: str) -> None:
    from jobs.foreground import kill_tree
    from jobs.submit import submit_job

    process = submit_job(spec, run_id=run_id, foreground=True).process
    assert process is not None
    try:
        code = process.wait()
    finally:
        kill_tree(process.pid)
    if code != 0:
        raise SystemExit(f"the driver of {run_id} ended with exit code {code}")


# --------------------------------------------------------------------------------- bits, flipped


def flip_bodies(arena: Arena, proxy: FaultyProxy, *, flips: int) -> dict[str, dict[str, int]]:
    """What becomes of requests one bit of whose body differs, by what they are for.

    Each use makes some requests, of which one after the other is hit, in an order that is drawn.
    """
    dice = random.Random(arena.seed)
    access = arena.spec.store.access.model_copy(update={"endpoint_url": proxy.url})
    data, runs = open_store(arena.data.uri, access), open_store(arena.runs.uri, access)
    newest = RunReader(arena.runs, "calm").live_manifests()[-1]
    manifest_key = RunPaths("calm").manifest(newest.name)
    payload = arena.runs.read(manifest_key)
    truth = read_groups(arena.data)
    model = model_files(arena.spec)
    data_there = arena.spec.data.model_copy(update={"access": access})
    proxy.storm(0.0, (), seed=arena.seed)  # bits to flip are drawn from the seed

    def an_object() -> bool:
        return runs.read(manifest_key) == payload

    def a_write() -> bool:
        runs.write("flipped", payload)
        return arena.runs.read("flipped") == payload

    def rows() -> bool:
        return read_groups(data) == truth

    def a_checkpoint() -> bool:
        return restored(runs) == (newest, True)

    def a_model() -> bool:
        return model_files(arena.spec.model_copy(update={"data": data_there})) == model

    ways: dict[str, tuple[Kind, str, str, Callable[[], bool]]] = {
        "objects read": ("corrupt answer", "GET", manifest_key, an_object),
        "objects written": ("corrupt request", "PUT", "flipped", a_write),
        "rows read": ("corrupt answer", "GET", "/train/shard", rows),
        "checkpoints restored": ("corrupt answer", "GET", newest.name.folder, a_checkpoint),
        "models fetched": ("corrupt answer", "GET", "/model/", a_model),
    }
    counts: dict[str, dict[str, int]] = {}
    for name, (kind, method, part, use) in ways.items():
        asked_before = len(proxy.requests)
        assert use(), f"{name}: wrong without a fault"
        asked = [r for r in proxy.requests[asked_before:] if r.startswith(method) and part in r]
        spoilt_before = len(proxy.spoilt)
        found = Counter({"found": 0, "accepted": 0})
        # Each request by its object, and which of that object's it is: several are under way at a
        # time, and come in any order.
        seen: Counter[str] = Counter()
        places = []
        for request in asked:
            places.append((request.split(" ", 1)[1], seen[request]))
            seen[request] += 1
        order = dice.sample(places, len(places))
        for path, place in itertools.islice(itertools.cycle(order), flips):
            spoilt = len(proxy.spoilt)
            proxy.fail(kind, method, path, after=place)
            found["found" if use() else "accepted"] += 1
            assert len(proxy.spoilt) == spoilt + 1, f"no bit was flipped in {name}"
        objects = set(asked)
        hit = {f"{method} {path}" for path in proxy.spoilt[spoilt_before:]}
        counts[name] = dict(found) | {
            "requests": len(asked),
            "requests_hit": min(len(asked), flips),
            "objects": len(objects),
            "objects_hit": len(objects & hit),
        }
    arena.runs.delete(["flipped"])
    return counts


def flip_stored(arena: Arena, *, flips: int) -> dict[str, Counter[str]]:
    """What becomes of stored objects one bit of which differs."""
    dice = random.Random(arena.seed)
    newest = RunReader(arena.runs, "calm").live_manifests()[-1]
    folder = RunPaths("calm").checkpoint(newest.name)
    parts = [head.key for head in arena.runs.list(folder)]
    shards = [head.key for head in arena.data.list() if head.key.endswith(".parquet")]
    shards = [key for key in shards if not key.startswith("_")]
    truth = read_groups(arena.data)

    def checkpoint() -> str:
        found, is_newest = restored(arena.runs)
        if not is_newest:
            return "found"
        return "harmless" if found == newest else "accepted"

    def rows() -> str:
        from jobs.errors import DataError

        try:
            return "harmless" if read_groups(arena.data) == truth else "accepted"
        except DataError:
            return "found"

    counts: dict[str, Counter[str]] = {"checkpoints": Counter(), "shards": Counter()}
    for number in range(flips):
        name = list(counts)[number % 2]
        store, keys = (arena.runs, parts) if name == "checkpoints" else (arena.data, shards)
        key = dice.choice(keys)
        held = store.read(key)
        bit = dice.randrange(8 * len(held))
        changed = bytearray(held)
        changed[bit // 8] ^= 1 << bit % 8
        store.write(key, bytes(changed))
        counts[name][checkpoint() if name == "checkpoints" else rows()] += 1
        store.write(key, held)
    return counts


def restored(runs: Store) -> tuple[Any, bool]:
    """The manifest from which the calm run would go on, and whether it is the newest by name."""
    from trainers.restore import newest_restorable

    with tempfile.TemporaryDirectory() as cache:
        found, skipped = newest_restorable(runs, RunPaths("calm"), cache_folder=Path(cache))
    return found, not skipped


def model_files(spec: JobSpec) -> dict[str, bytes]:
    """The files of the job's pretrained model, fetched from its store."""
    from trainers.pretrained import pretrained_folder

    with tempfile.TemporaryDirectory() as cache:
        folder = pretrained_folder(spec, cache_folder=Path(cache))
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_groups(data: Store) -> list[Any]:
    """All row groups of a data set, verified, from the store itself."""
    from trainers.data.cache import NodeCache
    from trainers.data.index import open_index
    from trainers.data.reader import VerifiedReader

    index = open_index(data)
    with tempfile.TemporaryDirectory() as folder:
        reader = VerifiedReader(
            store=data,
            index=index,
            columns=["text", "label"],
            cache=NodeCache(Path(folder), limit_bytes=2**30),
        )
        return [reader.read(group) for group in range(index.num_groups)]


# ------------------------------------------------------------------------------------ the verdict


def is_right(result: dict[str, Any]) -> bool:
    went = result["run"]
    flipped = [*result["bodies"].values(), *result["stored"].values()]
    return (
        bool(went["same_weights"] and went["same_batches"])
        and went["rows_lost"] == went["rows_repeated"] == 0
        and not any(counts.get("accepted") for counts in flipped)
        and all(counts["found"] for counts in flipped)
        and all(hits_enough(counts) for counts in result["bodies"].values())
        and has_met_all(result)
    )


def hits_enough(counts: dict[str, int]) -> bool:
    """Whether bits were flipped in several objects, where one use reads several."""
    return counts["objects_hit"] >= min(2, counts["objects"])


def has_met_all(result: dict[str, Any]) -> bool:
    """Whether the run met each outage and, in full size, each kind of fault; and said that it
    waited where it had to."""
    went, outages = result["run"], result["outages_seconds"]
    met = went["injected"]
    if len(went["refused_in_outages"]) < len(outages) or not all(went["refused_in_outages"]):
        return False
    if result["is_small"]:
        return sum(met.values()) > met["away"]
    must_wait = max(outages, default=0) > SURE_WAIT_SECONDS
    has_waited = went["waits_told"] + went["saves_repeated"] > 0
    return (
        all(kind in met for kind in (*SICK, *FLIPS))
        and (has_waited or not must_wait)
        and spoilt_share(went) >= LEAST_OF_SHARE * result["share"]
    )


def spoilt_share(went: dict[str, Any]) -> float:
    """Of the requests that came outside the outages, those that met a fault."""
    met = went["injected"]
    away = met.get("away", 0)
    return (sum(met.values()) - away) / max(1, went["requests"] - away)


def tables(result: dict[str, Any]) -> list[Table]:
    went = result["run"]
    run_table = Table(
        "met", "times", title=f"a run through a sick store ({result['share']:.0%} of requests)"
    )
    for kind, times in went["injected"].items():
        run_table.add_row(kind, str(times))
    run_table.add_row("of the requests outside the outages", f"{spoilt_share(went):.1%}")
    run_table.add_section()
    for name in (
        "requests", "calm_seconds", "sick_seconds", "attempts", "waits_told", "saves_repeated",
        "same_weights", "same_batches", "rows_lost", "rows_repeated",
    ):  # fmt: skip
        run_table.add_row(name.replace("_", " "), str(went[name]))
    words = ("found", "harmless", "accepted")
    bits = Table("one bit differs in", *words, "requests hit", "objects hit", title="flipped bits")
    for name, counts in (result["bodies"] | result["stored"]).items():
        hit = [
            f"{counts[f'{what}_hit']} of {counts[what]}" if what in counts else "-"
            for what in ("requests", "objects")
        ]
        bits.add_row(name, *(str(counts.get(word, 0)) for word in words), *hit)
    return [run_table, bits]


if __name__ == "__main__":
    main()
