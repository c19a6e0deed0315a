"""The job file's `optimizer`: how weights are changed, and how the learning rate goes on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

from jobs.spec_parts import Fraction, SpecPart, UnfitError

IMPORT_PATH = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+"
_ImportPath = Annotated[
    str,
    Field(pattern=f"^{IMPORT_PATH}$"),
    WithJsonSchema(
        {"type": "string", "pattern": f"^{IMPORT_PATH}$", "format": "import-path"},
    ),
]
_Scalar = bool | int | float | str | None
_FOREIGN = {
    "adamw": {"momentum", "options"},
    "sgd": {"betas", "epsilon", "options"},
    "adafactor": {"betas", "epsilon", "momentum", "options"},
}
_OWNERS = {"momentum": "sgd", "betas": "adamw", "epsilon": "adamw"}
_KNOWN_ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "params": "model.freeze",
}
"""Arguments of optimizers that have a key of their own."""


class Plateau(SpecPart):
    """When `schedule: plateau` lowers the learning rate."""

    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What the learning rate is multiplied by each time."""
    patience: PositiveInt = 2
    """Evaluations in a row without improvement after which it is lowered."""
    min_delta: NonNegativeFloat = 0.0
    """Smallest change that counts as improvement."""


class Optimizer(SpecPart):
    """The optimizer and its learning-rate schedule."""

    kind: Literal["adamw", "sgd", "adafactor"] | _ImportPath = "adamw"
    """AdamW (Loshchilov and Hutter, 2019), SGD with momentum, Adafactor (Shazeer and Stern, 2018),
    whose learning rate is relative to the size of the weights, or the import path of any other
    torch optimizer, such as torch.optim.NAdam."""
    learning_rate: PositiveFloat = 3e-5
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled for adamw and adafactor, L2 for sgd; not applied to biases and normalisation
    weights."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of adamw's two moments."""
    epsilon: PositiveFloat = 1e-8
    """Added to adamw's denominator."""
    momentum: Fraction = 0.9
    """Momentum of sgd."""
    options: dict[str, _Scalar | tuple[_Scalar, ...]] = Field(default_factory=dict)
    """Further arguments of an optimizer that is named by its import path."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each repeated block of the model to the one before it: the
    head has all of it, the last block has this part of it, and so on down to the embeddings
    (Clark et al., 2020)."""
    schedule: Literal[
        "constant", "linear", "cosine", "cosine-restarts", "one-cycle", "inverse-sqrt", "plateau"
    ] = "linear"
    """Shape of the learning rate after warmup. linear, cosine and cosine-restarts end at 0 at the
    last step; one-cycle rises from 1/25 and ends at 1/250000 of it; inverse-sqrt falls as
    1 / sqrt(step); plateau is lowered when evaluations bring no improvement."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0. Of one-cycle, the steps over which
    it rises; 0: three tenths of all."""
    cycles: PositiveInt = 4
    """Cosines of cosine-restarts, of equal length."""
    plateau: Plateau = Plateau()
    """When `schedule: plateau` lowers the learning rate: by what the best checkpoint is chosen."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Global gradient norm to which gradients are clipped; null: no clipping."""

    def __hash__(self) -> int:
        """Of frozen values too, which pydantic's own does not do for `options`."""
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _only_own_keys(self) -> Optimizer:
        foreign = _FOREIGN.get(self.kind, {"betas", "epsilon", "momentum"})
        differing = [key for key in sorted(foreign) if self._differs(key)]
        if differing:
            raise UnfitError(
                f"has {' and '.join(differing)}, without effect on {self.kind}",
                self._instead(differing[0]),
            )
        for key, schedule in (("cycles", "cosine-restarts"), ("plateau", "plateau")):
            if self.schedule != schedule and self._differs(key):
                raise UnfitError(
                    f"has {key}, without effect on schedule {self.schedule}",
                    f"remove optimizer.{key}, or write optimizer.schedule: {schedule}",
                )
        return self

    @model_validator(mode="after")
    def _options_have_no_key_of_their_own(self) -> Optimizer:
        for name, path in _KNOWN_ELSEWHERE.items():
            if name in self.options:
                raise UnfitError(f"has {name} in options", f"set {path} instead")
        return self

    def _differs(self, key: str) -> bool:
        default = type(self).model_fields[key].get_default(call_default_factory=True)
        return bool(getattr(self, key) != default)

    def _instead(self, key: str) -> str:
        if key == "options":
            return "remove optimizer.options, or name the optimizer by its import path"
        if self.kind not in _FOREIGN:
            return f"write it as the optimizer calls it: optimizer.options: {{{key}: ...}}"
        return f"remove optimizer.{key}, or write optimizer.kind: {_OWNERS[key]}"
