"""The job file's `model.adapter`: few new weights that are trained in place of the model's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jobs.spec_parts import Fraction, SpecPart, Text, UnfitError

_Modules = Annotated[tuple[Text, ...], Field(min_length=1)]


class LoraAdapter(SpecPart):
    """Low-rank updates of linear layers (Hu et al., 2021), or DoRA (Liu et al., 2024), which trains
    the lengths of the layers' weights besides."""

    kind: Literal["lora", "dora"]
    """lora, or dora: a little better at small ranks, slower."""
    rank: PositiveInt = 8
    """Rank of each update."""
    alpha: PositiveFloat = 16.0
    """An update counts alpha / rank times."""
    dropout: Fraction = 0.0
    """Dropout before each update."""
    target_modules: Literal["auto", "all-linear"] | _Modules = "auto"
    """The linear layers that are adapted: ends of their names, as query or attention.self.query;
    all-linear: all but those of the head; auto: the attention's query and value."""


class Ia3Adapter(SpecPart):
    """Factors for what layers give (Liu et al., 2022): the fewest weights of all."""

    kind: Literal["ia3"]
    """ia3."""
    target_modules: Literal["auto"] | _Modules = "auto"
    """The linear layers that are scaled: ends of their names; auto: the attention's key and value,
    and the second layer of each feed-forward network."""
    feedforward_modules: tuple[Text, ...] = ()
    """Those of `target_modules` whose inputs are scaled in place of their outputs; auto has its
    own."""

    @model_validator(mode="after")
    def _scaled_inputs_are_targets(self) -> Ia3Adapter:
        if self.target_modules == "auto":
            if self.feedforward_modules:
                raise UnfitError(
                    "has feedforward_modules, without effect on target_modules auto",
                    "name target_modules too, or remove feedforward_modules",
                )
            return self
        others = [name for name in self.feedforward_modules if name not in self.target_modules]
        if others:
            raise UnfitError(
                f"has {others[0]} in feedforward_modules, but not in target_modules",
                f"add {others[0]} to target_modules",
            )
        return self


class PromptAdapter(SpecPart):
    """Virtual tokens before each text, whose embeddings are trained (Lester et al., 2021), or whose
    keys and values in each layer are (prefix tuning, Li and Liang, 2021)."""

    kind: Literal["prompt-tuning", "prefix-tuning"]
    """prompt-tuning, or prefix-tuning, which has more weights."""
    virtual_tokens: PositiveInt = 20
    """Virtual tokens before each text; they count against the tokens that the model can read."""


Adapter = Annotated[LoraAdapter | Ia3Adapter | PromptAdapter, Field(discriminator="kind")]
