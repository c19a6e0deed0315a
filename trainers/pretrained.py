"""Where a pretrained model comes from: a folder, a store, another run, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import re
from functools import partial
from pathlib import Path

from cluster.storage import Store, is_s3, open_store, read_whole, split_uri
from jobs.errors import EnvironmentFault, Problem, SpecError
from jobs.parse import recorded_spec
from jobs.record import ADAPTER_FOLDER, Manifest, Part, RunPaths
from jobs.spec import JobSpec
from trainers import watchdog
from trainers.consolidation import complete_weights
from trainers.layout import LAYOUT_NAME, WEIGHTS, shard_stem
from trainers.local_copy import TICKING, local_copy
from trainers.records import read_result

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_LEGACY_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def pretrained_folder(spec: JobSpec, *, cache_folder: Path) -> Path:
    """A local folder with config, tokenizer and safetensors weights of `model.source`.

    Raises SpecError where there is no such model, EnvironmentFault where its place is not reached.
    """
    source = spec.model.source
    runs = open_store(spec.store.uri, spec.store.access, transfer=TICKING)
    if is_s3(source) or "://" in source:
        place = open_store(source, spec.data.access, transfer=TICKING)
        found = _in_store(place, spec, cache_folder)
        return found or _in_run(*_run_of_uri(source, spec), cache_folder)
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / RunPaths("").spec).is_file():
            return _in_run(open_store(path.parent), path.name, cache_folder)
        _require_weights([p.name for p in path.iterdir()], str(path))
        return path
    if "/" not in source and runs.head(RunPaths(source).spec) is not None:
        return _in_run(runs, source, cache_folder)
    if not _HUB_NAME.fullmatch(source) or source.startswith((".", "/", "~")):
        raise SpecError(
            Problem(
                f"model.source is {source}, but there is no such folder",
                "name a local folder, s3://bucket/folder, a run, or a model of the hub",
            )
        )
    return _on_hub(source, spec.model.revision)


def _in_store(store: Store, spec: JobSpec, cache_folder: Path) -> Path | None:
    """A model folder of a store; None where the folder is a run's."""
    heads = list(store.list())
    names = [head.key for head in heads]
    if RunPaths("").spec in names:
        return None
    if not names:
        raise SpecError(
            Problem(
                f"model.source is {spec.model.source}, but nothing is there",
                "copy the folder that save_pretrained wrote to this place",
            )
        )
    files = [h for h in heads if "/" not in h.key and not h.key.endswith(_LEGACY_WEIGHTS)]
    _require_weights([h.key for h in files], spec.model.source, legacy=names)
    identity = repr([(store.uri, h.key, h.etag, h.num_bytes) for h in files])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:24]
    parts = [Part(name=h.key, bytes=h.num_bytes, sha256="", xxh3="") for h in files]
    return local_copy(store, parts, cache_folder / "models" / digest)


def _run_of_uri(uri: str, spec: JobSpec) -> tuple[Store, str]:
    parent, run_id = split_uri(uri)
    same = parent == spec.store.uri.rstrip("/")
    access = spec.store.access if same else spec.data.access
    return open_store(parent, access, transfer=TICKING), run_id


def _in_run(runs: Store, run_id: str, cache_folder: Path) -> Path:
    """The best model of a run that has ended, each file verified."""
    paths = RunPaths(run_id)
    result = read_result(runs, paths)
    folder = result and (result.best_checkpoint or result.last_checkpoint)
    if not folder:
        raise SpecError(
            Problem(
                f"model.source is the run {run_id}, which has no model yet",
                f"wait until it ends, or look at it with: shoal status {runs.uri}/{run_id}",
            )
        )
    checkpoint = runs.within(run_id).within(folder.rstrip("/"))
    manifest = read_whole(
        checkpoint,
        "manifest.json",
        Manifest.model_validate_json,
        hint=f"see what is left with: shoal checkpoints {runs.uri}/{run_id}",
    )
    spec = recorded_spec(runs.read(paths.spec)) if manifest.has_adapter else None
    return model_of_checkpoint(checkpoint, manifest, spec, cache_folder)


def model_of_checkpoint(
    checkpoint: Store, manifest: Manifest, spec: JobSpec | None, cache_folder: Path
) -> Path:
    """The `model/` folder of a checkpoint on this node, verified by its manifest, and whole.

    `spec` is the job of the checkpoint's run, needed where there is an adapter only: it says how
    the store of the adapter's model is reached.
    """
    wanted = ["model/"]
    if not manifest.has_model:
        wanted += [ADAPTER_FOLDER] if manifest.has_adapter else [LAYOUT_NAME, shard_stem(WEIGHTS)]
    parts = [p for p in manifest.parts if p.name.startswith(tuple(wanted))]
    digest = hashlib.sha256(repr([(p.name, p.sha256) for p in parts]).encode()).hexdigest()[:24]
    folder = local_copy(checkpoint, parts, cache_folder / "models" / digest)
    if manifest.has_adapter and not manifest.has_model:
        from trainers.adapted_folder import whole_folder  # torch, which others here do not need

        assert spec is not None
        find_base = partial(pretrained_folder, cache_folder=cache_folder)
        whole = cache_folder / "models" / f"{digest}-whole"
        return whole_folder(folder, whole, find_base, spec)
    complete_weights(folder, parts)
    return folder / "model"


def _on_hub(name: str, revision: str | None) -> Path:
    """A model of the hub, pinned by its revision; HF_HUB_OFFLINE and HF_TOKEN are heeded."""
    if revision is None:
        raise SpecError(
            Problem(
                f"model.source is {name}, a model of the hub, but model.revision is missing",
                "write revision: with the commit from the model's page, so that the run can be "
                "repeated; or name a folder if you meant one",
            )
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        # The hub's client bounds its own waits, and shows how far it is.
        with watchdog.suspended("fetches the model from the hub"):
            folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
    except HFValidationError as error:
        raise SpecError(
            Problem(
                f"model.source is {name}, which is no name of the hub: {error}",
                "check the name; or name a folder if you meant one",
            )
        ) from error
    except GatedRepoError as error:
        raise SpecError(
            Problem(f"{name} is gated", "accept its terms on the hub and set HF_TOKEN")
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise SpecError(
            Problem(
                f"the hub has no model {name} at revision {revision}",
                "check the name and the revision; private models need HF_TOKEN",
            )
        ) from error
    except Exception as error:  # the hub's client lets errors of its transport through
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        raise EnvironmentFault(
            Problem(
                f"the model {name} cannot be fetched from the hub"
                + (" (HF_HUB_OFFLINE is set)" if offline else f": {error}"),
                "fetch it beforehand, or put its folder into the store and name that",
            )
        ) from error
    path = Path(folder)
    _require_weights([p.name for p in path.iterdir()], name)
    return path


def _require_weights(names: list[str], where: str, *, legacy: list[str] | None = None) -> None:
    """Raises SpecError unless the names are those of a model with safetensors weights."""
    if "config.json" not in names:
        raise SpecError(
            Problem(
                f"{where} has no config.json, so it is no model folder",
                "name the folder that save_pretrained wrote",
            )
        )
    if not any(name.endswith(_WEIGHTS) for name in names):
        old = [n for n in (legacy or names) if n.endswith(_LEGACY_WEIGHTS)]
        raise SpecError(
            Problem(
                f"{where} has no safetensors weights"
                + (
                    f", only {', '.join(sorted(old)[:3])}, which can run code on load"
                    if old
                    else ""
                ),
                "load it with transformers and call save_pretrained, then name that folder",
            )
        )
