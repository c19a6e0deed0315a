"""What happens in a study, as its log holds it: one JSON object a line.

The log is the study. Whoever drives it appends an event before acting on it, so a driver that is
killed at any moment is followed by one that knows as much.

A trial's progress is told as a *fraction* of its full budget: steps done, divided by the steps that
its job plans. It makes trials comparable whose batch size or number of epochs differ.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from jobs.record import Failure

Values = dict[str, Any]
"""Dotted path of the job file to the value that a trial has for it."""


class StudyEvent(BaseModel):
    """One line of the log; keys of later versions are kept out of the way."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    at: float = 0.0
    """Unix seconds by the driver's clock; what is decided by it is the end of `budget.hours`."""


class Donor(BaseModel):
    """The checkpoint that a cloned trial begins with."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    trial: int
    step: int


class Resumed(StudyEvent):
    """Another driver goes on with the study; since the event before it nobody has worked on it."""

    kind: Literal["resumed"] = "resumed"


class Asked(StudyEvent):
    """A trial exists, with its values. Trials are numbered from 0 in the order of these events."""

    kind: Literal["asked"] = "asked"
    trial: int
    values: Values
    """Of the active keys of the space: a key whose condition does not hold is absent."""
    repeat: int = 0
    """Which of the repetitions of these values over seeds this is; see `Search.repeats`."""
    repeats: int | None = None
    """Number of the trial whose values this one repeats; None: its own."""
    donor: Donor | None = None
    until: float = 1.0
    """Fraction of the budget at which it is first to report."""
    bracket: int = 0
    """Of the scheduler; of a clone the round after which it begins; 0 where it has neither."""
    purpose: Literal["search", "finalist"] = "search"


class Started(StudyEvent):
    """A slot begins a leg of a trial: an uninterrupted stretch of it."""

    kind: Literal["started"] = "started"
    trial: int
    leg: int
    """Counts the legs of this trial, from 1."""
    slot: str
    until: float
    """Fraction of the budget at which the trial is to report and wait for a decision."""


class Cloned(StudyEvent):
    """A clone's folder holds the checkpoint with which it begins; its donor may go on."""

    kind: Literal["cloned"] = "cloned"
    trial: int


class Reported(StudyEvent):
    """A trial has evaluated its model at or past the fraction that it was to report at."""

    kind: Literal["reported"] = "reported"
    trial: int
    step: int
    fraction: float
    epochs: float
    """Epochs of training that the trial has had by now."""
    value: float | None
    """The study's metric at this step; None where it is no finite number."""
    best: float | None
    """The best of the trial's evaluations up to this step."""
    seconds: float = 0.0
    """Wall seconds of this trial on slots since its last report."""


class Decided(StudyEvent):
    """What the study made of a report, or of a trial that was waiting."""

    kind: Literal["decided"] = "decided"
    trial: int
    decision: Literal["continue", "pause", "stop", "finish"]
    """continue: go on until `until`. pause: the state is saved; it may go on later. stop: it is not
    to go on. finish: it has had its full budget."""
    until: float | None = None
    reason: str = ""
    """For people."""


class Recalled(StudyEvent):
    """The trial has come once more to where it was told to pause or to finish, or its clones begin
    there: its slot is to leave it."""

    kind: Literal["recalled"] = "recalled"
    trial: int


class Left(StudyEvent):
    """The slot has left the trial as it was decided; what was to be saved of it is durable."""

    kind: Literal["left"] = "left"
    trial: int


class Lost(StudyEvent):
    """The leg of a trial ended by no decision: its process died, or the driver did."""

    kind: Literal["lost"] = "lost"
    trial: int
    cause: str
    counts: bool
    """Whether the trial's retries pay for it; not where the driver was killed, or a node ended."""


class Failed(StudyEvent):
    """A trial ended with a failure that a retry would meet again, or whose retries are used up."""

    kind: Literal["failed"] = "failed"
    trial: int
    failure: Failure


class Closed(StudyEvent):
    """The search asks for no more trials, and ends those that are under way at their next report;
    what comes after the search goes on."""

    kind: Literal["closed"] = "closed"
    reason: str


class Extended(StudyEvent):
    """The study was given more trials, and perhaps another space."""

    kind: Literal["extended"] = "extended"
    trials: int
    """The number of search trials that the study is to have from now on."""
    space: dict[str, Any] | None = None
    """As in the job file; None: as before."""
    request: int | None = None
    """Number of the request to the study that is met with this; None: nobody has asked for it."""


class Refused(StudyEvent):
    """The study cannot have the trials that a request asks for."""

    kind: Literal["refused"] = "refused"
    request: int
    """Its number among the requests to the study."""
    reason: str


class Measured(StudyEvent):
    """What the first trial has measured where the job leaves it open: trials that begin from now on
    are given it, so that all of them cut their micro-batches alike."""

    kind: Literal["measured"] = "measured"
    max_tokens_per_microbatch: int | None = None
    """As in the job file; None: the job says it."""
    launch_tokens: int | None = None
    """As in the job file; None: the job says it."""


Event = Annotated[
    Resumed
    | Asked
    | Started
    | Cloned
    | Reported
    | Decided
    | Recalled
    | Left
    | Lost
    | Failed
    | Closed
    | Extended
    | Refused
    | Measured,
    Field(discriminator="kind"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
