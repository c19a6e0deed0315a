"""What a checkpoint holds of a model in training: the tensors of its files, uncopied.

saved_state       all of them, or of a model that is cut over the ranks this rank's rows, or of one
                  that has an adapter what is trained
load_optimizer    puts an optimizer's state back, however many ranks have saved it
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from jobs.errors import Problem, SpecError
from jobs.record import ADAPTER_WEIGHTS
from trainers.adapters import (
    adapter_tensors,
    is_adapted,
    is_merged,
    merged_tensors,
    plain_state,
)
from trainers.layout import (
    LAYOUT_NAME,
    OPTIMIZER,
    WEIGHTS,
    Cut,
    Layout,
    Slice,
    cut_layout,
    num_rows,
    parse_layout,
    rows_of,
    shard_name,
)
from trainers.loop import Trainee
from trainers.optim import load_optimizer_tensors, optimizer_tensors
from trainers.parallel import is_sharded, local_part, plain
from trainers.tensor_file import Form

Tensors = dict[str, torch.Tensor]

EXPORTED_ADAPTER = f"model/{ADAPTER_WEIGHTS}"
"""In a `model/` folder: an adapter that cannot be merged, and without which it is another model."""

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class SavedState:
    """What this rank saves of a state."""

    files: dict[str, Tensors]
    """The tensors of each file; a file without any is left out."""
    layout: Layout | None = None
    """Of a model that is cut, on the first rank: where the rows of all ranks lie."""
    merged: Iterable[tuple[str, torch.Tensor]] = ()
    """What an adapter makes of some of the weights, one at a time, in place of what they are."""


def saved_state(trainee: Trainee, *, whole: bool = False) -> SavedState:
    """This rank's files. Talks to no other rank.

    `whole`: of a model with an adapter also all that its `model/` folder needs to be loaded.
    """
    model = plain(trainee.model)
    if is_adapted(model):
        return _adapted_state(model, trainee.optimizer, whole=whole)
    tensors = {
        WEIGHTS: saved_weights(model),
        OPTIMIZER: optimizer_tensors(trainee.optimizer),
    }
    if is_sharded(model):
        return _shard(model, tensors)
    return SavedState({name: own for name, own in tensors.items() if own})


def _adapted_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, whole: bool
) -> SavedState:
    files = {ADAPTER_WEIGHTS: adapter_tensors(model), OPTIMIZER: optimizer_tensors(optimizer)}
    if whole:
        files[WEIGHTS] = saved_weights(model)
        if not is_merged(model):
            files[EXPORTED_ADAPTER] = files[ADAPTER_WEIGHTS]
    merged = merged_tensors(model) if whole else ()
    return SavedState({name: own for name, own in files.items() if own}, merged=merged)


def _shard(model: nn.Module, tensors: Mapping[str, Tensors]) -> SavedState:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    whole_shapes = _shapes_of_states(model, tensors[OPTIMIZER])
    files: dict[str, Tensors] = {}
    cuts: dict[str, dict[str, Cut]] = {}
    for whole, named in tensors.items():
        shapes = whole_shapes if whole == OPTIMIZER else {}
        cuts[whole], own = {}, {}
        for name, form in forms_of(named).items():
            held = local_part(named[name])
            is_cut = isinstance(named[name], DTensor) or name in shapes
            cuts[whole][name] = Cut(Form(form.dtype, shapes.get(name, form.shape)), is_cut)
            if (len(held) > 0) if is_cut else rank == 0:
                own[name] = held
        if own:
            files[shard_name(whole, rank=rank, world_size=world_size)] = own
    layout = cut_layout(cuts, world_size=world_size) if rank == 0 else None
    return SavedState(files, layout)


def _shapes_of_states(model: nn.Module, states: Tensors) -> dict[str, tuple[int, ...]]:
    """Shapes over all ranks of those states of an optimizer that are cut as their parameters."""
    parameters = dict(model.named_parameters())
    shapes = {}
    for name, state in states.items():
        parameter = parameters[name.rpartition("/")[0]]
        if isinstance(parameter, DTensor) and state.shape == local_part(parameter).shape:
            shapes[name] = tuple(parameter.shape)
    return shapes


def saved_weights(model: Any) -> Tensors:
    """A Hugging Face model's tensors under the names that its `save_pretrained` writes, uncopied.

    As there (transformers/modeling_utils.py): without the keys that are not to be saved, one of
    each group of tied weights, and with the conversions undone that were made on loading. An
    adapter is left out.
    """
    state = plain_state(model)
    for key in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(key, None)
    with warnings.catch_warnings():
        # Of DTensors it asks for storages in a way that torch is about to give up.
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        untied = remove_tied_weights_from_state_dict(state, model)
    reverted: Tensors = revert_weight_conversion(model, untied)
    return reverted


def refuse_converted(model: nn.Module) -> None:
    """SpecError for a model whose weights are saved in another form than it computes with, such as
    experts that are joined on loading: rows of the one are not rows of the other."""
    own = {(tensor.data_ptr(), tensor.shape) for tensor in model.state_dict().values()}
    for name, tensor in saved_weights(model).items():
        if (tensor.data_ptr(), tensor.shape) not in own:
            raise SpecError(
                Problem(
                    f"workers.strategy is fsdp, but this model joins weights on loading, such as "
                    f"{name}, and such a model is not cut",
                    "set workers.strategy to ddp",
                )
            )


def forms_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Form]:
    """What a file says of these tensors; of a DTensor, what it would say of all its rows.

    Raises ValueError for a type that the format, as far as it is known here, has not.
    """
    unknown = sorted({str(t.dtype) for t in tensors.values()} - set(map(str, _TYPE_NAMES)))
    if unknown:
        raise ValueError(f"tensors of {', '.join(unknown)} cannot be saved")
    return {name: Form(_TYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


# ---------------------------------------------------------------------------------------- back


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts the optimizer's state back from a checkpoint's local copy.

    Of a model that is cut only this rank's rows are read. Raises SpecError where the state is
    another optimizer's.
    """
    parameters = dict(model.named_parameters())
    tensors: Tensors = {}
    with ExitStack() as files:
        stored = _Stored(folder, OPTIMIZER, files)
        for name, shape in stored.shapes.items():
            parameter = parameters.get(name.rpartition("/")[0])
            start, stop = 0, num_rows(shape)
            if isinstance(parameter, DTensor) and shape == tuple(parameter.shape):
                start, stop = rows_of(stop, rank=dist.get_rank(), world_size=dist.get_world_size())
            tensors[name] = stored.rows(name, start, stop)
        load_optimizer_tensors(optimizer, tensors)


class _Stored:
    """The tensors of one file of a checkpoint's local copy, or of what its ranks have of it."""

    def __init__(self, folder: Path, whole: str, files: ExitStack) -> None:
        self._folder, self._whole, self._files = folder, whole, files
        self._open: dict[str, Any] = {}
        self._layout: Layout | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        if (folder / LAYOUT_NAME).is_file():
            self._layout = parse_layout((folder / LAYOUT_NAME).read_bytes())
            self.shapes = {n: t.shape for n, t in self._layout.files[whole].items()}
        elif (folder / whole).is_file():
            file = self._file(whole)
            self.shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor; a scalar has one."""
        slices = [Slice(self._whole, start, stop)]
        if self._layout is not None:
            slices = self._layout.slices(self._whole, name, start=start, stop=stop)
            some = self._layout.files[self._whole][name].pieces[0].file
            slices = slices or [Slice(some, 0, 0)]  # no row, of the right type
        if not self.shapes[name]:
            scalar: torch.Tensor = self._file(slices[0].file).get_tensor(name)
            return scalar
        return torch.cat([self._file(s.file).get_slice(name)[s.start : s.stop] for s in slices])

    def _file(self, name: str) -> Any:
        if name not in self._open:
            opened = safe_open(self._folder / name, framework="pt")
            self._open[name] = self._files.enter_context(opened)
        return self._open[name]
