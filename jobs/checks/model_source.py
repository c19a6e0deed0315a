"""Where `model.source` points: found as trainers.pretrained finds it, but not fetched."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from cluster.storage import ObjectMissing, Store, is_s3, split_uri
from jobs.checks.finding import (
    ENVIRONMENT_EXIT_CODE,
    Finding,
    not_checked,
    ok,
    problem,
    problems_of,
    warning,
)
from jobs.checks.stores import Stores
from jobs.errors import EnvironmentFault, Problem, ShoalError, SpecError
from jobs.record import Manifest, RunPaths
from jobs.spec import JobSpec, StoreAccess
from trainers.records import read_result

PART = "model"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MOST_FILES = 5_000
_HUB_SECONDS = 3.0


@dataclass(frozen=True)
class ModelFolder:
    """The files of a pretrained model, wherever they are."""

    shown: str
    """Its place, for messages."""
    store: Store
    files: dict[str, int]
    """Bytes of each file right in the folder."""


def find_model(spec: JobSpec, stores: Stores) -> tuple[list[Finding], ModelFolder | None]:
    """What `model.source` names, and its files; None where there is none to look at."""
    try:
        return _find(spec, stores)
    except ShoalError as error:
        return problems_of(PART, error), None


def _find(spec: JobSpec, stores: Stores) -> tuple[list[Finding], ModelFolder | None]:
    source = spec.model.source
    if is_s3(source) or "://" in source:
        store = stores.open(source, spec.data.access)
        if store.head(RunPaths("").spec) is None:
            return _in_folder(source, store, spec)
        parent, run_id = split_uri(source)
        same = parent == spec.store.uri.rstrip("/")
        runs = stores.open(parent, spec.store.access if same else spec.data.access)
        return _in_run(runs, run_id)
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / RunPaths("").spec).is_file():
            return _in_run(stores.open(str(path.parent), StoreAccess()), path.name)
        return _in_folder(source, stores.open(str(path), StoreAccess()), spec)
    if "/" not in source:
        runs = stores.open(spec.store.uri, spec.store.access)
        try:
            is_run = runs.head(RunPaths(source).spec) is not None
        except ValueError:  # no name that a store could have
            is_run = False
        if is_run:
            return _in_run(runs, source)
    if not _HUB_NAME.fullmatch(source) or source.startswith((".", "/", "~")):
        raise SpecError(
            Problem(
                f"model.source is {source}, but there is no such folder",
                "name a local folder, s3://bucket/folder, a run, or a model of the hub",
            )
        )
    return _on_hub(source, spec.model.revision, spec, stores)


def _in_folder(shown: str, store: Store, spec: JobSpec) -> tuple[list[Finding], ModelFolder | None]:
    heads = list(islice(store.list(), _MOST_FILES))
    if not heads:
        raise SpecError(
            Problem(
                f"model.source is {shown}, but nothing is there",
                "copy the folder that save_pretrained wrote to this place",
            )
        )
    files = {head.key: head.num_bytes for head in heads if "/" not in head.key}
    findings = []
    if spec.model.revision is not None:
        findings.append(
            warning(
                PART,
                f"model.revision is {spec.model.revision}, without effect on {shown}",
                "remove model.revision: it belongs to models of the hub",
            )
        )
    return findings, ModelFolder(shown, store, files)


def _in_run(runs: Store, run_id: str) -> tuple[list[Finding], ModelFolder | None]:
    """The best model of a run that has ended."""
    uri = f"{runs.uri}/{run_id}"
    result = read_result(runs, RunPaths(run_id))
    folder = result and (result.best_checkpoint or result.last_checkpoint)
    if not folder:
        raise SpecError(
            Problem(
                f"model.source is the run {run_id}, which has no model yet",
                f"wait until it ends, or look at it with: shoal status {uri}",
            )
        )
    checkpoint = runs.within(run_id).within(folder.rstrip("/"))
    try:
        manifest = Manifest.model_validate_json(checkpoint.read("manifest.json"))
    except (ObjectMissing, ValidationError) as error:
        raise EnvironmentFault(
            Problem(
                f"model.source is the run {run_id}, but its checkpoint {folder} is gone or damaged",
                f"see what is left with: shoal checkpoints {uri}",
            )
        ) from error
    if manifest.has_adapter and not manifest.has_model:
        return [
            not_checked(
                PART,
                f"{uri}: step {manifest.step} has an adapter only; the run merges it with its base",
                "make the plain folder, and name that: shoal checkpoints "
                f"{uri} --consolidate {manifest.step}",
            )
        ], None
    if not manifest.has_model:
        return [
            not_checked(
                PART,
                f"{uri}: the weights of step {manifest.step} are cut; the run puts them together",
                "make the plain folder, and name that: shoal checkpoints "
                f"{uri} --consolidate {manifest.step}",
            )
        ], None
    files = {
        part.name.removeprefix("model/"): part.bytes
        for part in manifest.parts
        if part.name.startswith("model/")
    }
    found = ok(PART, f"{uri}: its checkpoint of step {manifest.step}")
    return [found], ModelFolder(f"{uri}, step {manifest.step}", checkpoint.within("model"), files)


# ---------------------------------------------------------------------------------------- the hub


def _on_hub(
    name: str, revision: str | None, spec: JobSpec, stores: Stores
) -> tuple[list[Finding], ModelFolder | None]:
    """A model of the hub: its files where this machine has them, else only whether it is there."""
    if revision is None:
        raise SpecError(
            Problem(
                f"model.source is {name}, a model of the hub, but model.revision is missing",
                "write revision: with the commit from the model's page, so that the run can be "
                "repeated; or name a folder if you meant one",
            )
        )
    if importlib.util.find_spec("huggingface_hub") is None:
        return [
            not_checked(
                PART,
                f"{name}: a model of the hub, and huggingface_hub is not installed here",
                'run: pip install "shoal[train]"',
            )
        ], None
    from huggingface_hub import try_to_load_from_cache

    held = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(held, str):
        folder = stores.open(str(Path(held).parent), StoreAccess())
        without_revision = spec.model_copy(
            update={"model": spec.model.model_copy(update={"revision": None})}
        )
        return _in_folder(f"{name} at {revision}", folder, without_revision)
    elsewhere = spec.cluster.kind != "local" or bool(os.environ.get("RAY_ADDRESS"))
    return [_asked_hub(name, revision, elsewhere=elsewhere)], None


def _asked_hub(name: str, revision: str, *, elsewhere: bool) -> Finding:
    """What the hub says; `elsewhere`: other machines fetch the model, not this one."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if HF_HUB_OFFLINE:
        if elsewhere:
            return not_checked(
                PART, f"{name}: HF_HUB_OFFLINE is set, and this machine does not hold the model"
            )
        return problem(
            PART,
            f"model.source is {name}, a model of the hub that this machine does not hold, and "
            "HF_HUB_OFFLINE is set",
            "fetch it beforehand, or put its folder into the store and name that",
            exit_code=ENVIRONMENT_EXIT_CODE,
        )
    try:
        found = HfApi().model_info(name, revision=revision, timeout=_HUB_SECONDS)
    except GatedRepoError:
        return problem(PART, f"{name} is gated", "accept its terms on the hub and set HF_TOKEN")
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return problem(
            PART,
            f"the hub has no model {name} at revision {revision}",
            "check the name and the revision, or name a folder if you meant one; private models "
            "need HF_TOKEN",
        )
    except Exception as error:
        # Which HTTP library the hub's client has, and so its errors, depends on its version.
        return not_checked(
            PART,
            f"{name}: the hub does not answer ({type(error).__name__}), and this machine does not "
            "hold the model",
            "try again, or put its folder into the store and name that",
        )
    names = [sibling.rfilename for sibling in found.siblings or ()]
    if not any(n.endswith(".safetensors") and "/" not in n for n in names):
        return problem(
            PART,
            f"{name} at {revision} has no safetensors weights",
            "load it with transformers and call save_pretrained, then name that folder",
        )
    return not_checked(
        PART,
        f"{name}: the hub has it; its files are fetched when the run starts, so its tokenizer and "
        "limits were not looked at",
    )
