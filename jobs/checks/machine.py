"""This machine: cores, memory and GPUs for the workers, and disk for what a node keeps."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.ray_runtime import room_for_trials
from cluster.storage import is_s3, local_path
from jobs.checks.data_sets import DataSetFacts
from jobs.checks.finding import (
    ENVIRONMENT_EXIT_CODE,
    Finding,
    not_checked,
    ok,
    problem,
    problems_of,
    warning,
)
from jobs.checks.model import ModelFacts
from jobs.checks.states import states_of
from jobs.checks.stores import nearest_existing
from jobs.checks.weights import Weights
from jobs.errors import EnvironmentFault
from jobs.spec import JobSpec, KubeRayCluster, Workers, format_bytes
from trainers.cpp_compiler import lacks_compiler
from trainers.data.cache import CACHE_VARIABLE, cache_folder, shared_by
from trainers.free_memory import free_bytes

_CGROUP = Path("/sys/fs/cgroup")
_NVIDIA = Path("/proc/driver/nvidia/gpus")
_NVIDIA_SMI_SECONDS = 3.0
_PROCESS_BYTES = 700 * 2**20
"""Memory of a worker before it has a model: Python with torch and transformers, and Ray's part."""
_COUNTS = "num_batches_tracked"
"""What BatchNorm counts, in a buffer."""
_TRAINING_PACKAGES = ("torch", "transformers", "ray", "datasets", "sklearn", "safetensors")


@dataclass(frozen=True)
class Machine:
    """What this machine has for Ray."""

    cores: int
    memory_bytes: int
    """Free now, within the limits of the container."""
    gpus: int


def look_at_machine(*, count_gpus: bool) -> Machine:
    """Cores and memory as Ray counts them (within the container's limits), and GPUs, if wanted."""
    return Machine(cores=_cores(), memory_bytes=free_bytes(), gpus=_num_gpus() if count_gpus else 0)


def check_workers(spec: JobSpec, machine: Machine | None) -> list[Finding]:
    """Whether the workers fit; `machine` is None where they run elsewhere (RAY_ADDRESS). Pure."""
    part, workers = "workers", spec.workers
    if isinstance(spec.cluster, KubeRayCluster):
        return []  # jobs.checks.kuberay asks the cluster
    if machine is None:
        return [
            not_checked(
                part,
                "whether the Ray cluster has room for the workers: RAY_ADDRESS is set, and it was "
                "not asked",
            )
        ]
    findings = list(_too_many(workers, workers.fewest, machine))
    if findings:
        return findings
    fits = next(n for n in reversed(workers.counts) if not list(_too_many(workers, n, machine)))
    return [
        ok(
            part,
            f"{_counted(fits, 'worker')} with {_counted(workers.cpus, 'core')} each: "
            f"{fits * workers.cpus} of this machine's {machine.cores}"
            + (f", and {fits} of its {machine.gpus} GPUs" if workers.gpus else "")
            + (f"; workers.count {workers.count} needs a larger one" * (fits < workers.count)),
        )
    ]


def trials_at_once(spec: JobSpec, machine: Machine) -> int:
    """How many trials of the job's search this machine has room for; 1 without a search. Pure."""
    if spec.search is None:
        return 1
    node = {"CPU": machine.cores, "GPU": machine.gpus, "memory": machine.memory_bytes}
    return min(spec.search.most_at_once(spec.search.configurations), room_for_trials(spec, [node]))


def check_strategy(spec: JobSpec, weights: Weights | None) -> Iterator[Finding]:
    """Whether the model can be cut over the workers, as far as the job and its files tell. Pure."""
    if spec.workers.strategy != "fsdp":
        return
    part, workers = "workers.strategy", spec.workers
    if workers.count == 1:
        yield warning(
            part,
            "workers.strategy is fsdp, without effect on workers.count 1: one worker holds all of "
            "the model",
            "set workers.count to 2 or more, or remove workers.strategy",
        )
        return
    shapes = weights.shapes if weights is not None else {}
    scalars = [n for n, shape in shapes.items() if not shape and not n.endswith(_COUNTS)]
    if scalars:
        yield warning(
            part,
            f"workers.strategy is fsdp, but {scalars[0]} of this model is a single number: if it "
            "is trained, and no buffer, the model cannot be cut",
            "set workers.strategy to ddp",
        )


def check_compiler(spec: JobSpec) -> list[Finding]:
    """Whether this machine can compile a model, where the job asks for it."""
    lacking = lacks_compiler() if spec.model.compile else None
    return problems_of("model.compile", EnvironmentFault(lacking)) if lacking else []


def _too_many(workers: Workers, number: int, machine: Machine) -> Iterator[Finding]:
    """What so many workers need and this machine has not: Ray would wait for it in vain."""
    elsewhere = "or run on a larger Ray cluster: export RAY_ADDRESS=ADDRESS"
    shown = _counted(number, "worker")
    key = "workers.count" if workers.min is None else "workers.min"
    if (cores := number * workers.cpus) > machine.cores:
        fitting = machine.cores // workers.cpus
        lower = f"set {key} to {fitting}" if fitting else "set workers.cpus to 1"
        yield problem(
            "workers",
            f"{shown} with workers.cpus {workers.cpus} need {_counted(cores, 'core')}, but this "
            f"machine has {machine.cores}",
            f"{lower}, {elsewhere}",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )
    if (gpus := number * workers.gpus) > machine.gpus:
        lower = f"set {key} to {machine.gpus}" if machine.gpus else "set workers.gpus to 0"
        yield problem(
            "workers",
            f"{shown} with workers.gpus 1 need {_counted(gpus, 'GPU')}, but this machine has "
            f"{machine.gpus or 'none'}",
            f"{lower}, {elsewhere}",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )
    memory = number * int((workers.memory_gib or 0) * 2**30)
    if memory > machine.memory_bytes:
        yield problem(
            "workers",
            f"{shown} with workers.memory_gib {workers.memory_gib:g} need {format_bytes(memory)}, "
            f"but this machine has {format_bytes(machine.memory_bytes)} free",
            f"lower workers.memory_gib or {key}, {elsewhere}",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )


def check_packages() -> list[Finding]:
    """Whether this machine could train, and whether the model was looked at as a whole."""
    missing = [name for name in _TRAINING_PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
        return []
    return [
        not_checked(
            "cluster",
            "whether the run starts here, and whether the model's weights fit its architecture: "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed here",
            'run: pip install "shoal[train]"',
        )
    ]


def check_memory(spec: JobSpec, machine: Machine | None, *, worker_bytes: int) -> list[Finding]:
    """Whether the workers' rows, weights and optimizer states fit into memory. Pure."""
    part = "workers.memory_gib"
    if spec.workers.gpus:
        return []
    reserved = spec.workers.memory_gib and int(spec.workers.memory_gib * 2**30)
    if reserved and worker_bytes > reserved:
        return [
            warning(
                part,
                f"workers.memory_gib is {spec.workers.memory_gib:g}, but a worker needs about "
                f"{format_bytes(worker_bytes)} for its program, model, optimizer and rows, without "
                "activations",
                f"set workers.memory_gib to {worker_bytes / 2**30 * 1.2:.1f} or more",
            )
        ]
    if machine is None:
        return []
    number = spec.workers.fewest * max(1, trials_at_once(spec, machine))
    need = worker_bytes * number
    if need > machine.memory_bytes:
        of_trials = "" if spec.search is None else " of trials"
        lower = "workers.count" if spec.search is None else "search.max_concurrent"
        return [
            warning(
                part,
                f"{_counted(number, 'worker')}{of_trials} need about {format_bytes(need)} for "
                "programs, models, optimizers and rows, without activations, but this machine has "
                f"{format_bytes(machine.memory_bytes)} free",
                f"lower {lower} or data.stream_memory, or free memory",
            )
        ]
    return []


def worker_bytes(*, training_bytes: int, stream_bytes: int) -> int:
    """About what one worker needs, without activations."""
    return _PROCESS_BYTES + training_bytes + stream_bytes


# ------------------------------------------------------------------------------------------- disk


@dataclass(frozen=True)
class DiskNeed:
    """What a node keeps on its disk in the course of a run."""

    rows_bytes: int
    """Fetched row groups, at most `data.cache_gib`."""
    checkpoint_bytes: int
    """A checkpoint that is being written, or restored."""
    model_bytes: int
    """The copy of a model that lies in a store."""

    @property
    def needed_bytes(self) -> int:
        """Without these a run fails; rows that find no room are only fetched again."""
        return self.checkpoint_bytes + self.model_bytes


def disk_need(spec: JobSpec, sets: Iterable[DataSetFacts], model: ModelFacts | None) -> DiskNeed:
    """What the job keeps on a node's disk."""
    limit = int(spec.data.cache_gib * 2**30)
    stored = sum(facts.index.record.bytes for facts in sets)
    weights = model.weights if model is not None else None
    if weights is None:
        return DiskNeed(min(limit, stored), 0, 0)
    assert model is not None
    trained = model.trained_parameters
    states = states_of(spec.optimizer) * (weights.num_parameters if trained is None else trained)
    return DiskNeed(
        rows_bytes=min(limit, stored),
        checkpoint_bytes=4 * (weights.num_parameters + states),
        model_bytes=weights.num_bytes if is_s3(spec.model.source) else 0,
    )


def check_disk(need: DiskNeed) -> list[Finding]:
    """Whether the cache folder of this machine can be written and has the room."""
    findings = _check_disk(need)
    if kind := shared_by(cache_folder()):
        findings.append(
            warning(
                "data.cache_gib",
                f"{cache_folder()} is in a file system that machines share ({kind}), so that rows, "
                "models and checkpoints that a node keeps go over the network again",
                f"set {CACHE_VARIABLE} to a folder on a local disk of each node",
            )
        )
    return findings


def _check_disk(need: DiskNeed) -> list[Finding]:
    part, folder = "data.cache_gib", cache_folder()
    above = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=above):
            free = shutil.disk_usage(above).free
    except OSError as error:
        return [
            problem(
                part,
                f"the cache folder {folder} cannot be written to: {error.strerror}",
                f"set {CACHE_VARIABLE} to a folder on a local disk that you may write to",
                exit_code=ENVIRONMENT_EXIT_CODE,
            )
        ]
    if need.needed_bytes > free:
        return [
            problem(
                part,
                f"{folder} has {format_bytes(free)} free, but a checkpoint and a copy of the model "
                f"take {format_bytes(need.needed_bytes)} there",
                f"free disk space, or set {CACHE_VARIABLE} to a folder on a larger disk",
                exit_code=ENVIRONMENT_EXIT_CODE,
            )
        ]
    held = _bytes_below(folder / "rows" / "blobs")
    if need.needed_bytes + need.rows_bytes > free + held:
        return [
            warning(
                part,
                f"{folder} has {format_bytes(free)} free, but up to "
                f"{format_bytes(need.rows_bytes)} of rows would be kept there; what finds no room "
                "is fetched again in each epoch",
                f"lower data.cache_gib, free disk space, or set {CACHE_VARIABLE} to a folder on a "
                "larger disk",
            )
        ]
    total = need.needed_bytes + need.rows_bytes
    return [ok(part, f"{folder}: {format_bytes(free)} free, at most {format_bytes(total)} needed")]


def check_run_disk(spec: JobSpec, need: DiskNeed) -> list[Finding]:
    """Whether a local folder of runs has room for the checkpoints that are kept."""
    if is_s3(spec.store.uri):
        return []
    folder = local_path(spec.store.uri)
    kept = spec.checkpoint.keep_last + spec.checkpoint.keep_best + 1
    wanted = kept * need.checkpoint_bytes
    free = shutil.disk_usage(nearest_existing(folder)).free
    if wanted <= free:
        return []
    return [
        warning(
            "store",
            f"{folder} has {format_bytes(free)} free, but {kept} checkpoints take about "
            f"{format_bytes(wanted)}",
            "free disk space, lower checkpoint.keep_last, or name another store",
        )
    ]


# ----------------------------------------------------------------------------------- what there is


def _cores() -> int:
    """Cores, within the container's share of them."""
    cores = os.cpu_count() or 1
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no such limit ("max")
        return cores


def _num_gpus() -> int:
    """NVIDIA GPUs that a process here would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        found = len(list(_NVIDIA.iterdir()))
    except OSError:
        found = _gpus_of_nvidia_smi()
    if visible is None:
        return found
    return min(found, len([device for device in visible.split(",") if device not in ("", "-1")]))


def _gpus_of_nvidia_smi() -> int:
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        listed = subprocess.run(  # noqa: S603 - found on the user's own path
            [program, "-L"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*") if path.is_file())


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
