"""What the parts of the job file have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class SpecPart(BaseModel):
    """A frozen part of the job file that refuses unknown keys and values of another type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class UnfitError(ValueError):
    """A value that its key cannot take; `hint` says what to type instead.

    `shows_value` is false where the value may be a secret, which no message repeats.
    """

    def __init__(self, message: str, hint: str, *, shows_value: bool = True) -> None:
        super().__init__(message)
        self.hint = hint
        self.shows_value = shows_value


Text = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Metric = Literal[
    "validation/loss",
    "validation/accuracy",
    "validation/f1",
    "validation/precision",
    "validation/recall",
]
"""What an evaluation measures; f1, precision and recall are means over the classes."""
Mode = Literal["min", "max"]
"""Whether smaller or larger is better."""
