"""From a job to a run that has started: run id, spec.json, then a driver. Also resume and stop."""

from __future__ import annotations

import importlib.util
import secrets
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.local import start_driver
from cluster.storage import ObjectExists, Store, join_uri, open_store
from jobs.errors import EnvironmentFault, Problem, SpecError
from jobs.parse import (
    apply_overrides,
    check_resume_overrides,
    parse_spec,
    with_absolute_paths,
)
from jobs.record import Amendment, Control, RunPaths, State
from jobs.runs import RunReader
from jobs.spec import MAX_RUN_ID_CHARACTERS, RUN_ID_PATTERN, RUN_ID_SUFFIX_CHARACTERS, JobSpec

_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"
"""Characters of a run id's suffix: none that looks like another."""
_MOST_NUMBERS_TRIED = 100


@dataclass(frozen=True)
class SubmittedRun:
    """A run whose driver has been started."""

    run_id: str
    uri: str
    process: subprocess.Popen[bytes] | None
    """The driver, where this process attends it; None in the background."""


def submit_job(spec: JobSpec, *, run_id: str | None = None, foreground: bool) -> SubmittedRun:
    """Records the job as a new run and starts its driver.

    Raises SpecError where the run id is not allowed or taken.
    """
    require_training()
    spec = with_absolute_paths(spec)
    run_id = check_run_id(run_id) if run_id is not None else new_run_id(spec.name)
    store = open_store(spec.store.uri, spec.store.access)
    try:
        store.write_if_absent(RunPaths(run_id).spec, spec.to_json().encode())
    except ObjectExists as error:
        uri = join_uri(store.uri, run_id)
        raise SpecError(
            Problem(
                f"the run {uri} exists",
                f"choose another --run-id, or go on with it: shoal resume {uri}",
            )
        ) from error
    return _start(store, spec, run_id, controls_seen=0, foreground=foreground)


def resume_run(
    store: Store, run_id: str, *, overrides: Sequence[str] = (), foreground: bool
) -> SubmittedRun:
    """Records what `--set` changes and starts a driver for a run that has ended.

    Raises SpecError where the run is done, or a key may not be changed by a resume.
    """
    require_training()
    reader = RunReader(store, run_id)
    spec = reader.spec()
    paths = RunPaths(run_id)
    if overrides:
        check_resume_overrides(overrides)
        changed = apply_overrides(spec.model_dump(mode="json"), overrides)
        spec = parse_spec(changed, where="--set")
        amendment = Amendment(overrides=tuple(overrides), made_at=time.time())
        _write_numbered(store, paths.amendments, paths.amendment, amendment.to_bytes())
    result = reader.result()
    if result is not None and result.state is State.SUCCEEDED and not overrides:
        raise SpecError(
            Problem(
                f"the run {reader.uri} has succeeded: all its epochs are done",
                "train longer with: shoal resume RUN --set train.epochs=N, or start a new run "
                f"with model.source: {reader.uri}",
            )
        )
    seen = _last_number(store, paths.control)
    return _start(store, spec, run_id, controls_seen=seen, foreground=foreground)


def request_stop(store: Store, run_id: str, *, by: str) -> None:
    """Asks the run to save its state and end; heard by its driver wherever that is."""
    paths = RunPaths(run_id)
    control = Control(kind="stop", requested_at=time.time(), by=by)
    _write_numbered(store, paths.control, paths.control_request, control.to_bytes())


def new_run_id(name: str) -> str:
    """`name` and a short random suffix."""
    suffix = "".join(secrets.choice(_ALPHABET) for _ in range(RUN_ID_SUFFIX_CHARACTERS))
    return f"{name}-{suffix}"


def check_run_id(run_id: str) -> str:
    """The run id, if it may name a run; raises SpecError."""
    if not RUN_ID_PATTERN.fullmatch(run_id) or len(run_id) > MAX_RUN_ID_CHARACTERS:
        raise SpecError(
            Problem(
                f"--run-id {run_id} is not allowed: at most {MAX_RUN_ID_CHARACTERS} lower-case "
                "letters, digits and hyphens, with a letter first and no hyphen last",
                "write for example --run-id sentiment-1",
            )
        )
    return run_id


def require_training() -> None:
    """Raises EnvironmentFault where the packages that train are not installed."""
    missing = [
        name
        for name in ("torch", "transformers", "ray", "datasets", "sklearn", "safetensors")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise EnvironmentFault(
            Problem(
                f"cluster.kind is local, so this machine would train, but {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not installed here",
                'run: pip install "shoal[train]"',
            )
        )


def _start(
    store: Store, spec: JobSpec, run_id: str, *, controls_seen: int, foreground: bool
) -> SubmittedRun:
    uri = join_uri(store.uri, run_id)
    process = start_driver(
        uri, access=spec.store.access, controls_seen=controls_seen, attended=foreground
    )
    return SubmittedRun(run_id, uri, process if foreground else None)


def _write_numbered(store: Store, folder: str, key_of: Callable[[int], str], data: bytes) -> None:
    """Writes the object with the next free number; several writers get several numbers."""
    number = _last_number(store, folder) + 1
    for candidate in range(number, number + _MOST_NUMBERS_TRIED):
        try:
            store.write_if_absent(key_of(candidate), data)
        except ObjectExists:
            continue
        return
    raise EnvironmentFault(f"{folder} is being written to by too many others at once")


def _last_number(store: Store, folder: str) -> int:
    last = 0
    for head in store.list(folder):
        name = head.key.rpartition("/")[2].removesuffix(".json")
        if name.isdigit():
            last = max(last, int(name))
    return last
