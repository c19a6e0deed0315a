"""What a checkpoint costs: how long training stands still, and how fast it is stored and restored.

    python bench/checkpoint.py [--small] [--rounds N] [--json FILE]

One process trains a BERT with AdamW, as a worker of Ray Train, on an S3 server of this machine that
gives way to it. The same steps are made without checkpoints, with Shoal's, and with
`ray.train.report` and its default upload, SYNC and ASYNC: a part of them without, a part with one
of these, a part without, and so on, in orders that take turns, as the speed of a machine changes
within minutes. A checkpoint is saved after the first step of a part, so that its upload goes on
beside the rest of them: training stands still for (seconds of the part with it - mean seconds of
the parts without before and after it). What is still under way at the end of a part is waited for,
and counts as well, as the next checkpoint would wait for it. Then the state alone: copied, uploaded
and restored by Shoal, and the same bytes copied, and moved by parallel PUTs and GETs that verify
nothing. A restore ends in files of the cache's folder; it is measured on the disk and in memory
(/dev/shm), each against GETs that end in files there too, and each at its second time. GETs whose
bytes are held and written nowhere are told beside them.

Exit code 1 where training stands still for more than a tenth of what SYNC costs, the copy takes
longer than 1.5 plain ones, or an upload or a restore has less than four fifths of the raw speed. In
the small size nothing is judged.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lab
from rich.table import Table
from saved_model import MIB, Shape, Sizes

if TYPE_CHECKING:
    from saved_model import Subject

SAVERS = ("shoal", "ray sync", "ray async")
SMALL = Sizes(Shape(hidden=64, layers=2, vocabulary=2000), steps=12, every=4, rounds=1, moves=1)
MOST_OF_SYNC, MOST_COPIES, LEAST_OF_RAW = 0.10, 1.5, 0.8
FULL = Sizes(Shape(hidden=384, layers=6, vocabulary=30522), steps=200, every=25, rounds=3, moves=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="how often all of it is measured")
    arguments = lab.arguments_of(parser)
    sizes = SMALL if arguments.small else FULL
    rounds = arguments.rounds or sizes.rounds
    with lab.place() as place, lab.object_store(place, gives_way=True) as bucket:
        found = measure_on_ray(sizes, rounds, bucket, place)
    result = summarize(found, sizes)
    result["is_right"] = arguments.small or is_right(result)
    lab.tell("checkpoint", result, tables=tables(result), json_file=arguments.json)
    sys.exit(0 if result["is_right"] else 1)


def measure_on_ray(sizes: Sizes, rounds: int, bucket: str, place: Path) -> dict[str, Any]:
    """All measurements, made by the one worker of a TorchTrainer."""
    import logging

    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from cluster.storage import open_store

    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local", num_cpus=2, num_gpus=0, object_store_memory=200 * MIB,
        logging_level=logging.ERROR, log_to_driver=False,
    )  # fmt: skip
    # Ray's own would end this process and leave the object store behind.
    signal.signal(signal.SIGTERM, on_sigterm)
    answer = place / "measured.json"
    store = open_store(f"{bucket}/ray")
    try:
        TorchTrainer(
            worker,
            train_loop_config={
                "sizes": asdict(sizes), "rounds": rounds, "bucket": bucket, "place": str(place),
                "answer": str(answer), "path": sys.path,
            },
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(
                name="bench",
                storage_path=store.filesystem_root,
                storage_filesystem=store.filesystem(),
            ),
        ).fit()  # fmt: skip
    finally:
        ray.shutdown()
    return json.loads(answer.read_text())


# --------------------------------------------------------------------------------- in the worker


def worker(config: dict[str, Any]) -> None:
    """Measures, and writes what it found to a file of this machine."""
    sys.path[:] = config["path"]
    import torch
    from saved_model import Shape, Sizes, Subject

    torch.set_num_threads(1)
    told = config["sizes"]
    sizes = Sizes(**told | {"shape": Shape(**told["shape"])})
    subject = Subject(sizes.shape, config["bucket"], Path(config["place"]))
    subject.steps(max(3, sizes.steps // 20), every=0, save=None)  # optimizer state, warm caches
    found: dict[str, Any] = {"bytes": subject.state_bytes, "parts": [], "state": []}
    savers: dict[str, Callable[[int], None]] = {
        "shoal": subject.save_with_shoal,
        "ray sync": subject.save_with_ray_sync,
        "ray async": subject.save_with_ray_async,
    }
    for name, save in savers.items():  # each once before it counts: buffers, connections, threads
        save(1)
        subject.settle(name)
    for number in range(config["rounds"]):
        before = _timed(subject, sizes.every)
        for part in range(sizes.steps // sizes.every):
            turn = (number + part) % len(SAVERS)
            for name in SAVERS[turn:] + SAVERS[:turn]:
                own = _timed(subject, sizes.every, name, savers[name])
                after = _timed(subject, sizes.every)
                found["parts"].append({"saver": name, "own": own, "calm": [before, after]})
                before = after
        found["state"] += [subject.measure_state() for _ in range(sizes.moves)]
    subject.close()
    Path(config["answer"]).write_text(json.dumps(found))


def _timed(
    subject: Subject, steps: int, name: str = "", save: Callable[[int], None] | None = None
) -> dict[str, Any]:
    os.sync()  # what was written before is not paid for here
    return subject.timed(name, save, steps=steps)


# --------------------------------------------------------------------------------------- results


def summarize(found: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """The figures: medians over the parts, each against what was measured beside it."""
    still: dict[str, list[float]] = {name: [] for name in SAVERS}
    slower: dict[str, list[float]] = {name: [] for name in SAVERS}
    first: dict[str, list[float]] = {name: [] for name in SAVERS}
    calm_seconds = []
    for part in found["parts"]:
        name, own, calm = part["saver"], part["own"], part["calm"]
        calm_seconds.append(statistics.fmean(each["seconds"] for each in calm))
        calm_step = statistics.median([s for each in calm for s in each["step_seconds"]])
        still[name].append(own["seconds"] + own["left"] - calm_seconds[-1])
        after = own["step_seconds"][1 : 1 + max(1, sizes.every // 5)]
        slower[name].append(statistics.median(after) / calm_step)
        first[name].append(own["step_seconds"][1] / calm_step)
    mib = found["bytes"] / MIB
    state = {name: [entry[name] for entry in found["state"]] for name in found["state"][0]}
    speeds = {
        name: lab.spread([mib / max(1e-9, seconds) for seconds in values])
        for name, values in state.items()
    }
    median = {name: lab.spread(values)["median"] for name, values in still.items()}
    return {
        "state_mib": mib,
        "checkpoints": len(still["shoal"]),
        "calm_seconds": lab.spread(calm_seconds),
        "still_seconds": {name: lab.spread(values) for name, values in still.items()},
        "still_share_of_ray_sync": median["shoal"] / median["ray sync"],
        "left_seconds": {
            name: lab.spread(
                [part["own"]["left"] for part in found["parts"] if part["saver"] == name]
            )
            for name in still
        },
        "step_during_upload": {name: lab.spread(values) for name, values in slower.items()},
        "first_step_after_save": {name: lab.spread(values) for name, values in first.items()},
        "mib_per_second": speeds,
        "state_seconds": state,
        "copy_ratio": ratio(state["shoal copy"], state["plain copy"]),
        "upload_ratio": ratio(state["raw put"], state["shoal upload"]),
        "restore_ratio": {
            place: ratio(state[f"raw get, {place}"], state[f"shoal restore, {place}"])
            for place in ("on disk", "in memory")
        },
        "restore_ratio_to_held": ratio(state["raw get, held"], state["shoal restore, in memory"]),
    }


def is_right(result: dict[str, Any]) -> bool:
    return (
        result["still_share_of_ray_sync"] <= MOST_OF_SYNC
        and result["copy_ratio"] <= MOST_COPIES
        and min(result["upload_ratio"], *result["restore_ratio"].values()) >= LEAST_OF_RAW
    )


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the rounds' ratios."""
    return lab.spread([a / b for a, b in zip(over, under, strict=True)])["median"]


def tables(result: dict[str, Any]) -> list[Table]:
    still = Table(
        title=f"Training stands still, for each checkpoint of {result['state_mib']:.0f} MiB "
        f"(median of {result['checkpoints']})",
        title_justify="left",
    )
    columns = (
        "", "seconds", "smallest", "largest",
        "of it after the last step", "the step after it", "a step during the upload",
    )  # fmt: skip
    for column in columns:
        still.add_column(column, justify="left" if not column else "right")
    for name, spread in result["still_seconds"].items():
        first = result["first_step_after_save"][name]["median"]
        slower = result["step_during_upload"][name]["median"]
        still.add_row(
            name,
            *(f"{spread[key]:.3f}" for key in ("median", "min", "max")),
            f"{result['left_seconds'][name]['median']:.2f}",
            f"{first:.2f} x",
            f"{slower:.2f} x",
        )
    state = Table(title="The state alone", title_justify="left")
    for column in ("", "shoal", "plain", "ratio"):
        state.add_column(column, justify="left" if not column else "right")
    speeds = result["mib_per_second"]
    for title, own, plain, value in (
        ("copy, MiB/s (ratio of seconds)", "shoal copy", "plain copy", result["copy_ratio"]),
        ("upload, hashed, MiB/s", "shoal upload", "raw put", result["upload_ratio"]),
        *(
            (
                f"restore, verified, {place}, MiB/s",
                f"shoal restore, {place}",
                f"raw get, {place}",
                value,
            )
            for place, value in result["restore_ratio"].items()
        ),
    ):
        state.add_row(
            title, f"{speeds[own]['median']:.0f}", f"{speeds[plain]['median']:.0f}", f"{value:.2f}"
        )
    held = result["restore_ratio_to_held"]
    state.add_row(
        "the last, to GETs written nowhere",
        "",
        f"{speeds['raw get, held']['median']:.0f}",
        f"{held:.2f}",
    )
    share = Table(show_header=False)
    share.add_row("Shoal's standstill, of Ray's SYNC", f"{result['still_share_of_ray_sync']:.1%}")
    return [still, share, state]


if __name__ == "__main__":
    main()
