"""The job file's `search:`: which values are tried, how they are chosen, and how long each goes on.

What a space means for its job is in `jobs.study.space`; `space: recommended` is expanded in
`jobs.study.recommended`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from jobs.spec_parts import Metric, Mode, SpecPart, UnfitError

Scalar = bool | int | float | str | None
Choice = Scalar | tuple[Scalar, ...]
"""A value as the job file may hold it for one key."""
Number = int | float
InsideFraction = Annotated[float, Field(gt=0, lt=1)]

_ABSENT = object()

RECOMMENDED = "recommended"
DEFAULT_TRIALS = 64
MAX_SLOTS = 1024
"""Trials at a time, whatever the job says."""
RANGES = ("uniform", "loguniform", "quniform", "qloguniform", "integer", "log-integer")
"""The ways to draw a number from a range."""
LISTS = ("choice", "grid")
"""The ways to list values."""

CLONE_KEYS = (
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.betas",
    "optimizer.epsilon",
    "optimizer.momentum",
    "optimizer.max_grad_norm",
    "optimizer.layer_decay",
    "model.dropout",
    "model.adapter.dropout",
    "task.label_smoothing",
)
"""Keys that may change in the middle of a run, as a clone's do: neither the shape of what a
checkpoint holds nor the order of rows nor the number of steps depends on them."""


class Distribution(SpecPart):
    """The values that one key may have: one way to draw them, and `when`, for some trials only."""

    model_config = ConfigDict(serialize_by_alias=True)

    uniform: tuple[float, float] | None = None
    """[low, high]: a number between them."""
    loguniform: tuple[float, float] | None = None
    """[low, high], low above 0: a number between them whose logarithm is uniform."""
    quniform: tuple[Number, Number, Number] | None = None
    """[low, high, step]: one of low, low + step and so on up to high; whole where all three are."""
    qloguniform: tuple[Number, Number, Number] | None = None
    """[low, high, step], low above 0: as loguniform, then the nearest that quniform has."""
    integer: tuple[int, int] | None = None
    """[low, high]: a whole number, both ends included."""
    log_integer: tuple[int, int] | None = Field(default=None, alias="log-integer")
    """[low, high], low at least 1: a whole number whose logarithm is about uniform."""
    choice: Annotated[tuple[Choice, ...], Field(min_length=1)] | None = None
    """One of these values."""
    grid: Annotated[tuple[Choice, ...], Field(min_length=1)] | None = None
    """Each of these values, for `algorithm: grid`, which tries all combinations."""
    when: dict[str, Scalar | tuple[Choice, ...]] | None = None
    """Other searched keys, each with the value or the list of values for which this key is
    searched; else it keeps what the job file has. null: always."""

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}

    @model_validator(mode="after")
    def _is_one_way_to_draw(self) -> Distribution:
        given = [way for way in (*RANGES, *LISTS) if self._values_of(way) is not None]
        if len(given) != 1:
            raise UnfitError(
                f"has {' and '.join(given)}" if given else "says nothing about its values",
                f"give one of {', '.join((*RANGES, *LISTS))}",
            )
        if self.way in LISTS:
            shown = [repr(value) for value in self.values]
            if twice := sorted({value for value in shown if shown.count(value) > 1}):
                raise UnfitError(f"lists {twice[0]} twice", "remove the second")
        else:
            self._check_range(*self.values)
        return self

    def _check_range(self, low: Number, high: Number, step: Number | None = None) -> None:
        if low >= high:
            raise UnfitError(
                f"has {self.way} from {low} to {high}, but the first must be below the second",
                f"write the lower end first, as in {self.way}: [{high}, {low}]"
                if low > high
                else "give it two ends, or set the key in the job itself",
            )
        if "log" in self.way and low <= 0:
            above = "at least 1" if self.way == "log-integer" else "above 0"
            linear = {"loguniform": "uniform", "qloguniform": "quniform", "log-integer": "integer"}
            raise UnfitError(
                f"has {self.way} from {low}, but numbers that have a logarithm are {above}",
                f"raise the lower end, or write {linear[self.way]}",
            )
        if step is not None and not 0 < step <= high - low:
            raise UnfitError(
                f"has {self.way} with a step of {step}, but it must be above 0 and at most "
                f"{high - low}, the width of the range",
                "change the third number",
            )

    @property
    def way(self) -> str:
        """How values are drawn: the name of the key that is given."""
        return next(way for way in (*RANGES, *LISTS) if self._values_of(way) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """What is given for `way`."""
        values: tuple[Any, ...] = self._values_of(self.way)
        return values

    def _values_of(self, way: str) -> Any:
        return getattr(self, way.replace("-", "_"))


class RandomSearch(SpecPart):
    """Values drawn independently of each other and of what is known (Bergstra and Bengio, 2012)."""

    kind: Literal["random"] = "random"
    """Each key from its distribution."""


class GridSearch(SpecPart):
    """Every combination of the values listed, once."""

    kind: Literal["grid"] = "grid"
    """The combinations in order, the last key changing fastest; as many as `search.trials` says."""


class TPESearch(SpecPart):
    """Tree-structured Parzen estimators (Bergstra et al., 2011), all keys drawn together."""

    kind: Literal["tpe"] = "tpe"
    """Values that are likelier among the best trials than among the others, by Optuna."""
    startup_trials: PositiveInt = 10
    """Trials with a score before which values are drawn at random."""
    candidates: PositiveInt = 24
    """Draws from the best trials' density, of which the most promising is taken."""


class GPSearch(SpecPart):
    """A Gaussian process and expected improvement, by Optuna; best for few keys and trials."""

    kind: Literal["gp"] = "gp"
    """Conditional keys are drawn at random."""
    startup_trials: PositiveInt = 10
    """Trials with a score before which values are drawn at random."""


class CMAESSearch(SpecPart):
    """CMA-ES (Hansen, 2016) over the numbers, restarted with twice the population when it has
    settled (Auger and Hansen, 2005)."""

    kind: Literal["cmaes"] = "cmaes"
    """Choices and conditional keys are drawn at random."""
    population: Annotated[int, Field(ge=4)] | None = None
    """Trials of one generation; null: 4 + 3 ln(number of keys)."""


class NoScheduler(SpecPart):
    """Every trial has its full budget."""

    kind: Literal["none"] = "none"
    """No trial is stopped."""


class ASHA(SpecPart):
    """Asynchronous successive halving (Li et al., 2020): a trial waits at each rung, and goes on
    when it is among the best of that rung."""

    kind: Literal["asha"] = "asha"
    """Rungs are decided as results come in; nothing waits for a rung to fill."""
    reduction_factor: Annotated[int, Field(ge=2)] = 4
    """One of so many trials goes on from a rung, for so many times the budget."""
    first: InsideFraction | None = None
    """Smallest fraction of a trial's budget at which it may wait: the rungs are at 1,
    1 / reduction_factor, 1 / reduction_factor² and so on, down to this. null:
    1 / reduction_factor²."""

    @model_validator(mode="after")
    def _has_rungs(self) -> ASHA:
        _refuse_a_single_rung(self)
        return self


class Hyperband(SpecPart):
    """Successive halving in rounds, over brackets that begin later and later (Li et al., 2018);
    with `algorithm: tpe` it is BOHB (Falkner et al., 2018)."""

    kind: Literal["hyperband"] = "hyperband"
    """A rung is decided when all of its trials have reported."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """One of so many trials goes on from a rung, for so many times the budget."""
    first: InsideFraction | None = None
    """Smallest fraction of a trial's budget at which it may wait: the rungs of the first bracket
    are at 1, 1 / reduction_factor, 1 / reduction_factor² and so on, down to this. null:
    1 / reduction_factor²."""

    @model_validator(mode="after")
    def _has_rungs(self) -> Hyperband:
        _refuse_a_single_rung(self)
        return self


def _refuse_a_single_rung(given: ASHA | Hyperband) -> None:
    eta = given.reduction_factor
    if given.first is not None and given.first > 1 / eta:
        raise UnfitError(
            f"has first {given.first:g}, but the last rung before the end of a trial's budget is "
            f"at 1 / reduction_factor ({1 / eta:.3g}), so that no trial would be stopped",
            "remove first, lower reduction_factor, or choose scheduler none",
        )


class MedianStopping(SpecPart):
    """A trial stops where its best is worse than the median of what the others had averaged by then
    (Golovin et al., 2017)."""

    kind: Literal["median"] = "median"
    """Compares trials at the same fraction of their budgets, after each evaluation."""
    first: InsideFraction = 0.2
    """Fraction of a trial's budget before which it is not stopped."""
    startup_trials: PositiveInt = 5
    """Others that must have come as far before a trial is stopped."""


class PBT(SpecPart):
    """Population based training (Jaderberg et al., 2017): in each round the worst trials end, and
    clones of the best go on with changed values."""

    kind: Literal["pbt"] = "pbt"
    """A clone's values are perturbed or drawn anew."""
    population: Annotated[int, Field(ge=2)] = 8
    """Trials of a round."""
    every: InsideFraction = 0.1
    """Fraction of a trial's budget in a round."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Part of the population that ends in a round, and part that is cloned."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability that a clone's value is drawn anew."""
    factors: tuple[PositiveFloat, PositiveFloat] = (0.8, 1.25)
    """By one of which a clone's number is multiplied otherwise."""


class PB2(SpecPart):
    """Population based bandits (Parker-Holder et al., 2020): as pbt, with the clones' numbers
    chosen by a Gaussian process of how scores have changed."""

    kind: Literal["pb2"] = "pb2"
    """A clone's choices are drawn anew with a probability of 0.25, as with pbt, and kept
    otherwise."""
    population: Annotated[int, Field(ge=2)] = 4
    """Trials of a round."""
    every: InsideFraction = 0.1
    """Fraction of a trial's budget in a round."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Part of the population that ends in a round, and part that is cloned."""


def _kind_from_text(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


def _scheduler_from_text(value: object) -> object:
    return {"kind": "none"} if value is None else _kind_from_text(value)


Algorithm = Annotated[
    RandomSearch | GridSearch | TPESearch | GPSearch | CMAESSearch,
    Field(discriminator="kind"),
    BeforeValidator(_kind_from_text),
]
Scheduler = Annotated[
    NoScheduler | ASHA | Hyperband | MedianStopping | PBT | PB2,
    Field(discriminator="kind"),
    BeforeValidator(_scheduler_from_text),
]


class Finalists(SpecPart):
    """The best trials' values, trained again on the full budget, beyond what `search.budget` says;
    and the job's own, where they were the baseline and are not among the best."""

    count: PositiveInt = 3
    """Trials whose values are trained again; all of them where there are fewer."""
    seeds: PositiveInt = 3
    """Seeds with which each is trained; the best mean over them wins."""


class Budget(SpecPart):
    """What the search's trials may use together; when one is used up, no new trial begins, and
    those under way end at their next report. Finalists come on top: see `search.finalists`."""

    epochs: PositiveFloat | None = None
    """Epochs of training; null: not limited."""
    gpu_hours: PositiveFloat | None = None
    """Hours of GPUs that trials hold up to what they report: what is lost with a process is not
    counted. null: not limited."""
    hours: PositiveFloat | None = None
    """Hours of wall clock while a driver works on the study; null: not limited."""


def _mode_of(given: dict[str, Any]) -> Mode:
    return "min" if given.get("metric") == "validation/loss" else "max"


def num_combinations(space: Mapping[str, Distribution]) -> int:
    """Of the values that a grid lists; a key that is not searched beside others multiplies
    nothing."""
    return _num_combinations(space, {})


def _num_combinations(space: Mapping[str, Distribution], known: Mapping[str, Any]) -> int:
    """Of the keys that are not known yet. Keys on which no other depends are counted as a whole."""
    left = [path for path in space if path not in known]
    if not left:
        return 1
    path = next((p for p in left if not any(q in left for q in space[p].when or ())), left[0])
    if not _is_searched(space[path], known):
        return _num_combinations(space, {**known, path: _ABSENT})
    values = space[path].values
    if not any(path in (other.when or ()) for other in space.values()):
        return len(values) * _num_combinations(space, {**known, path: values[0]})
    return sum(_num_combinations(space, {**known, path: value}) for value in values)


def _is_searched(over: Distribution, known: Mapping[str, Any]) -> bool:
    return all(
        any(
            is_same(known.get(path, _ABSENT), value)
            for value in (wanted if isinstance(wanted, tuple) else (wanted,))
        )
        for path, wanted in (over.when or {}).items()
    )


def is_same(one: object, other: object) -> bool:
    """Equality as JSON has it: true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _trials_of(given: dict[str, Any]) -> int:
    scheduler, algorithm = given.get("scheduler"), given.get("algorithm")
    if isinstance(scheduler, PBT | PB2):
        return scheduler.population
    if isinstance(algorithm, GridSearch) and given.get("space"):
        return num_combinations(given["space"])
    return DEFAULT_TRIALS


def _baseline_of(given: dict[str, Any]) -> bool:
    return not isinstance(given.get("scheduler"), PBT | PB2)


def _finalists_of(given: dict[str, Any]) -> Finalists | None:
    return None if isinstance(given.get("scheduler"), PBT | PB2) else Finalists()


class Search(SpecPart):
    """Many trials of the job with other values, of which the best is wanted."""

    metric: Metric = "validation/loss"
    """What trials are compared by; not given: what train.early_stopping watches, or
    validation/loss. A trial's best checkpoint is the best by it."""
    mode: Mode = Field(default_factory=_mode_of)
    """Whether smaller or larger is better; not given: min for validation/loss, max for others."""
    score: Literal["best", "last"] = "best"
    """Which of a trial's evaluations counts."""
    space: dict[str, Distribution] = Field(default_factory=dict)
    """Which keys are searched, as dotted paths (`optimizer.learning_rate`), and over what.
    `recommended`: the keys that matter most, over ranges that suit the job."""
    algorithm: Algorithm = TPESearch()
    """How the next trial's values are chosen: a kind, or its group of keys."""
    scheduler: Scheduler = ASHA()
    """How long a trial goes on: a kind, or its group of keys; null: every trial to its end."""
    trials: PositiveInt = Field(
        default_factory=_trials_of, json_schema_extra={"default": DEFAULT_TRIALS}
    )
    """Trials at most, repeats, clones and finalists not counted, and for a grid not that of the
    baseline either; not given: 64, for pbt and pb2 their population, which it is, and for a grid
    all combinations."""
    seed: NonNegativeInt = 0
    """Seed of everything that the search draws at random."""
    repeats: PositiveInt = 1
    """Seeds with which each trial's values are trained; their score is the mean. More than 1 is for
    scheduler none: seeds of which some were stopped would be compared by how far they came."""
    finalists: Finalists | None = Field(default_factory=_finalists_of)
    """The best values trained again at the end, with other seeds; not given: the best 3, with 3
    seeds each, but none for pbt and pb2. null: none."""
    baseline: bool = Field(default_factory=_baseline_of)
    """The first trial has the job's own values, and takes part in what the best are put to at the
    end: what the search has gained is told by it. Not given: true, but false for pbt and pb2."""
    budget: Budget = Budget()
    """Limits besides the number of trials."""
    patience: PositiveInt | None = None
    """Trials in a row that do not improve the best, after which no new one begins; null: no limit.
    A trial improves it where none had as good a score with as much of its budget, or with less; it
    counts once, however often it is promoted, and so does each repeat."""
    max_concurrent: PositiveInt | Literal["auto"] = "auto"
    """Trials at a time, at most; `auto`: as many as the cluster has room for. On Kubernetes the
    cluster has room for so many from the start; with `auto` for one at first, and grows."""
    gpu_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """How much of a GPU a trial with one worker holds, and of its memory may fill: with 0.5 two of
    them share one. null: workers.gpus."""
    retries: NonNegativeInt = 2
    """Restarts of one trial from its last checkpoint after its process has died; workers of a trial
    with several are started again `retries.worker_failures` times before that counts as one."""

    @property
    def configurations(self) -> int:
        """Values that the search is to try: as many as `trials`, but all of a grid and the job's
        own."""
        return self.trials + (self.baseline and self.algorithm.kind == "grid")

    def most_at_once(self, configurations: int) -> int:
        """Trials of so many configurations that are under way at a time at most, however much room
        there is."""
        most = configurations * self.repeats
        return most if self.max_concurrent == "auto" else min(most, self.max_concurrent)

    def most_finalists(self, configurations: int) -> int:
        """Configurations, of so many, that are trained again at most: the best, and the job's own
        values where they are not among these."""
        if self.finalists is None:
            return 0
        return min(self.finalists.count + self.baseline, configurations)

    @property
    def clones(self) -> bool:
        """Whether trials begin in the middle of others."""
        return isinstance(self.scheduler, PBT | PB2)

    @model_validator(mode="after")
    def _grids_are_for_grid_search(self) -> Search:
        whole = self.algorithm.kind == "grid"
        for path, distribution in self.space.items():
            if whole != (distribution.way == "grid"):
                raise UnfitError(
                    f"has algorithm {self.algorithm.kind}, but {path} is given by "
                    f"{distribution.way}: grids are for algorithm grid, which takes nothing else",
                    f"give {path} as grid: [...], or choose algorithm tpe"
                    if whole
                    else f"give {path} as choice: [...], or choose algorithm grid for all keys",
                )
        return self

    @model_validator(mode="after")
    def _cmaes_has_numbers(self) -> Search:
        numbers = [d for d in self.space.values() if d.way in RANGES and not d.when]
        if self.algorithm.kind == "cmaes" and self.space and not numbers:
            raise UnfitError(
                "has algorithm cmaes, which searches numbers, but the space has none that every "
                "trial has",
                "choose algorithm tpe, or add a key with a range and without when",
            )
        return self

    @model_validator(mode="after")
    def _repeats_come_equally_far(self) -> Search:
        if self.repeats > 1 and isinstance(self.scheduler, ASHA | Hyperband | MedianStopping):
            raise UnfitError(
                f"has repeats {self.repeats}, but scheduler {self.scheduler.kind} would stop each "
                "seed by itself, so that the mean over seeds would tell how far they came",
                "remove search.repeats: search.finalists trains the best values with several "
                "seeds; or choose scheduler none",
            )
        return self

    @model_validator(mode="after")
    def _clones_can_go_on(self) -> Search:
        if not isinstance(self.scheduler, PBT | PB2):
            return self
        kind, population = self.scheduler.kind, self.scheduler.population
        for path in self.space:
            if path not in CLONE_KEYS:
                raise UnfitError(
                    f"has scheduler {kind} and searches {path}, but a clone goes on in the middle "
                    f"of another trial, where {path} cannot change",
                    f"search {', '.join(CLONE_KEYS)} alone, or choose scheduler asha",
                )
        if self.algorithm.kind == "grid":
            raise UnfitError(
                f"has scheduler {kind}, which changes the values of trials, but algorithm grid, "
                "which is to try each combination",
                "choose algorithm random, or scheduler asha",
            )
        if kind == "pb2" and self.space and all(d.way in LISTS for d in self.space.values()):
            raise UnfitError(
                "has scheduler pb2, which chooses numbers, but the space has choices alone",
                "choose scheduler pbt, or give a key a range",
            )
        if self.trials != population:
            raise UnfitError(
                f"has {self.trials} trials, but the population of {kind} is {population}, and all "
                "other trials are its clones",
                f"remove search.trials, or set search.scheduler.population to {self.trials}",
            )
        for key, given, other in (
            ("repeats", self.repeats > 1, "none"),
            ("finalists", bool(self.finalists), "asha"),
            ("baseline", self.baseline, "asha"),
        ):
            if given:
                raise UnfitError(
                    f"has scheduler {kind} and {key}, but a clone's values are only the last part "
                    "of how it was trained, which no other trial repeats",
                    f"remove search.{key}, or choose scheduler {other}",
                )
        return self
