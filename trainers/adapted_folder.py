"""Adapters and folders: the adapter of a folder put into its model, and the plain folder that an
adapter and its base make.

    adapt           gives a model that was built from a folder the job's adapter
    whole_folder    the `model/` folder of a checkpoint that holds an adapter only
    load_model      a `model/` folder as a transformers model, virtual tokens included
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from jobs.errors import EnvironmentFault, Problem, SpecError
from jobs.record import ADAPTER_FOLDER, ADAPTER_WEIGHTS, MODEL_WEIGHTS
from jobs.spec import Adapter, JobSpec, PromptAdapter
from trainers.adapter_record import adapter_record, read_adapter_record, refuse_other_base
from trainers.adapters import (
    CONFIG,
    adapter_config,
    adapter_tensors,
    add_adapter,
    is_merged,
    load_adapter,
    merged_tensors,
)
from trainers.positions import most_tokens
from trainers.state import saved_weights

_KINDS = {"PROMPT_TUNING": "prompt-tuning", "PREFIX_TUNING": "prefix-tuning"}


def adapt(model: nn.Module, spec: JobSpec, *, folder: Path, adapter_in: Path | None = None) -> None:
    """Adds the job's adapter to a model that was built from `folder`, as it is in the checkpoint
    `adapter_in`; without one as it begins: with the virtual tokens of `folder`, where it has some.

    Raises SpecError where the folder's virtual tokens are others than the job's.
    """
    adapter, exported = spec.model.adapter, exported_adapter(folder)
    if exported is not None and adapter != exported:
        raise SpecError(
            Problem(
                f"model.source {spec.model.source} is a model of {exported.virtual_tokens} virtual "
                f"tokens ({exported.kind}), without which it is another model",
                f"write model.adapter: {{kind: {exported.kind}, virtual_tokens: "
                f"{exported.virtual_tokens}}}, or name another model",
            )
        )
    if adapter is None:
        return
    _refuse_long_texts(model, spec)
    add_adapter(model, adapter, seed=spec.data.seed)
    if adapter_in is not None:
        load_adapter(model, adapter_in)
    elif exported is not None:
        load_adapter(model, folder)


def _refuse_long_texts(model: Any, spec: JobSpec) -> None:
    """SpecError where virtual tokens leave too few positions for the longest text."""
    config, adapter = model.config, spec.model.adapter
    if not isinstance(adapter, PromptAdapter):
        return
    limit = most_tokens(
        config.model_type,
        max_position_embeddings=getattr(config, "max_position_embeddings", None),
        pad_token_id=getattr(config, "pad_token_id", None),
    )
    if limit is not None and spec.task.max_tokens + adapter.virtual_tokens > limit:
        raise SpecError(
            Problem(
                f"task.max_tokens is {spec.task.max_tokens}, and model.adapter.virtual_tokens is "
                f"{adapter.virtual_tokens}, but this model reads at most {limit} tokens",
                f"write max_tokens: {limit - adapter.virtual_tokens}, or less",
            )
        )


def exported_adapter(folder: Path) -> PromptAdapter | None:
    """The adapter that lies in a model's folder, as it cannot be merged."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return PromptAdapter.model_validate(
            {"kind": _KINDS[config["peft_type"]], "virtual_tokens": config["num_virtual_tokens"]}
        )
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(
            Problem(
                f"{path} is no adapter that Shoal has left in a model's folder",
                "merge it with peft's merge_and_unload, and name the folder with the result",
            )
        ) from error


def load_model(folder: Path | str) -> Any:
    """The transformers model of a `model/` folder, float32, on the CPU, ready to predict.

    As `from_pretrained` of its architecture loads it, with the virtual tokens that it was trained
    with, which from_pretrained does not know.
    """
    folder = Path(folder)
    model = _plain_model(folder, folder)
    add_exported(model, folder)
    return model.eval()


def add_exported(model: nn.Module, folder: Path) -> None:
    """Adds to a model that was built from a `model/` folder the virtual tokens that lie there."""
    adapter = exported_adapter(folder)
    if adapter is not None:
        add_adapter(model, adapter, seed=0)
        load_adapter(model, folder)


def whole_folder(
    checkpoint: Path, folder: Path, find_base: Callable[[JobSpec], Path], spec: JobSpec
) -> Path:
    """`folder`, with the `model/` of the local copy of a checkpoint that holds an adapter only.

    `find_base` gives the folder of a job's model; `spec` is the job of the checkpoint's run, or of
    the study that it is a trial of. Processes of a node that ask at the same time make the folder
    once. Raises SpecError where the model is another one now, EnvironmentFault where the disk has
    no room.
    """
    saved = read_adapter_record(checkpoint)
    model = spec.model.model_copy(
        update={"source": saved.source, "revision": saved.revision, "adapter": saved.adapter}
    )
    spec = spec.model_copy(update={"model": model})
    base = find_base(spec)
    refuse_other_base(saved, adapter_record(spec, base))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                    made = Path(scratch, "model")
                    shutil.copytree(checkpoint / "model", made)
                    _add_weights(made, checkpoint, base, saved.adapter)
                    made.rename(folder)
    except OSError as error:
        raise EnvironmentFault(
            Problem(
                f"{folder} cannot hold the model: {error}",
                "free disk space there, or set SHOAL_CACHE to a folder on a larger disk",
            )
        ) from error
    return folder


def _add_weights(made: Path, checkpoint: Path, base: Path, adapter: Adapter) -> None:
    model = _plain_model(base, made)
    add_adapter(model, adapter, seed=0)
    load_adapter(model, checkpoint)
    weights = saved_weights(model) | dict(merged_tensors(model))
    _save(weights, made / MODEL_WEIGHTS.removeprefix("model/"))
    if not is_merged(model):
        (made / ADAPTER_FOLDER).mkdir()
        (made / CONFIG).write_bytes(adapter_config(model, source="..", revision=None))
        _save(adapter_tensors(model), made / ADAPTER_WEIGHTS)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(
        {name: t.detach().contiguous() for name, t in tensors.items()}, path, {"format": "pt"}
    )


def _plain_model(weights: Path, configured: Path) -> Any:
    """The model with the weights of one folder and the configuration of another, which names its
    class."""
    config = AutoConfig.from_pretrained(configured)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    return kind.from_pretrained(weights, config=config, dtype=torch.float32, use_safetensors=True)
