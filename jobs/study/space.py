"""What a study varies: its keys, their values, and the job that a trial's values make.

    space_of(spec)                    -> Space     what `search.space` says
    job_with(spec, values, seed=...)  -> JobSpec   a trial's job

Each key's values lie on a unit interval (`at` and `unit`), on which equal lengths are equally
likely: what draws, perturbs or models values needs to know no more of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic import TypeAdapter

from jobs.errors import SpecError
from jobs.problems import Sources
from jobs.search_spec import LISTS, Distribution, is_same
from jobs.spec import JobSpec
from jobs.study.events import Values
from jobs.tree import job_of, value_at, with_value

_ABSENT = object()
_GIVEN: TypeAdapter[dict[str, Distribution]] = TypeAdapter(dict[str, Distribution])


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    """Distance of neighbours; None: every number between the ends."""

    def at(self, unit: float) -> float:
        """The number at a place between 0 and 1; whole (an int) where low and step are."""
        if self.step is not None and not self.log:
            return self.nth(min(int(unit * self.count), self.count - 1))
        low, high = self._edges()
        value = low + unit * (high - low)
        return self.nearest(math.exp(value) if self.log else value)

    def unit(self, value: float) -> float:
        """The place of a number, so that `at` gives it back; of a step, the middle of its part."""
        value = self.nearest(value)
        if self.step is not None and not self.log:
            return (self.index(value) + 0.5) / self.count
        low, high = self._edges()
        place = math.log(value) if self.log else value
        return min(max((place - low) / (high - low), 0.0), 1.0)

    def nearest(self, value: float) -> float:
        """The number of the range that is nearest to any number."""
        if self.step is None:
            return min(max(value, self.low), self.high)
        return self.nth(min(max(self.index(value), 0), self.count - 1))

    def holds(self, value: object) -> bool:
        """Whether a value of a job file is one of these."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.nearest(value) == value

    def index(self, value: float) -> int:
        """The place, from 0, of a number among those of a range that has a step."""
        assert self.step is not None
        return math.floor((value - self.low) / self.step + 0.5)

    def nth(self, index: int) -> float:
        """The number at a place, from 0, among those of a range that has a step."""
        assert self.step is not None
        if isinstance(self.low, int) and isinstance(self.step, int):
            return self.low + index * self.step
        # In decimals, as the job file writes them: 0.1 + 2 * 0.1 is 0.3.
        return float(Decimal(repr(self.low)) + index * Decimal(repr(self.step)))

    @property
    def count(self) -> int:
        """Number of values of a range that has a step."""
        low, high, step = (Decimal(repr(n)) for n in (self.low, self.high, self.step))
        return int((high - low) // step) + 1

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest value and the largest."""
        return self.nearest(self.low), self.nearest(self.high)

    def _edges(self) -> tuple[float, float]:
        """The ends on the scale of the draw, half a step wider: so the ends get their share."""
        if not self.log:
            return self.low, self.high
        if self.step is None:
            return math.log(self.low), math.log(self.high)
        low = max(self.low - self.step / 2, self.low / 2)
        return math.log(low), math.log(self.nth(self.count - 1) + self.step / 2)


@dataclass(frozen=True)
class Choices:
    """Values in the order of the job file, as JSON holds them."""

    values: tuple[Any, ...]

    def at(self, unit: float) -> Any:
        """The value at a place between 0 and 1."""
        return self.values[min(int(unit * len(self.values)), len(self.values) - 1)]

    def unit(self, value: object) -> float:
        """The middle of a value's part, so that `at` gives it back; ValueError for another one."""
        return (self.index(value) + 0.5) / len(self.values)

    def index(self, value: object) -> int:
        """The place of a value among them; ValueError for another one."""
        for index, held in enumerate(self.values):
            if is_same(held, value):
                return index
        raise ValueError(f"{value!r} is none of {self.values}")

    def holds(self, value: object) -> bool:
        """Whether a value of a job file is one of these."""
        return any(is_same(held, value) for held in self.values)


@dataclass(frozen=True)
class Key:
    """One searched key of the job file."""

    path: str
    over: Range | Choices
    when: tuple[tuple[str, Choices], ...] = ()
    """Other searched keys and the values of each for which this one is searched."""

    def is_active(self, values: Values) -> bool:
        """Whether a trial with these values has a value for this key.

        Values of the keys in `when` must be there already, if those are active themselves.
        """
        return all(wanted.holds(values.get(path, _ABSENT)) for path, wanted in self.when)


@dataclass(frozen=True)
class Space:
    """All searched keys, each after those that decide whether it is searched."""

    keys: tuple[Key, ...]

    def fill(self, choose: Callable[[Key], Any]) -> Values:
        """Values of one trial: `choose` is asked once for each active key, in their order."""
        values: Values = {}
        for key in self.keys:
            if key.is_active(values):
                values[key.path] = choose(key)
        return values

    def holds(self, values: Values) -> bool:
        """Whether these are values that a trial of this space could have."""
        active = [key for key in self.keys if key.is_active(values)]
        return {key.path for key in active} == values.keys() and all(
            key.over.holds(values[key.path]) for key in active
        )

    def own_values(self, values: Values, job: Mapping[str, Any]) -> Values | None:
        """Values with which a trial of this space would be the trial that has `values`, which may
        be of another space; None where none would.

        `job` is the study's job as a tree: what one of the spaces leaves to it is the same there.
        """
        own = self.fill(lambda key: values.get(key.path, value_at(job, key.path)))
        rest = ((path, value) for path, value in values.items() if path not in own)
        if all(is_same(value_at(job, path), value) for path, value in rest) and self.holds(own):
            return own
        return None


def space_of(spec: JobSpec) -> Space:
    """The space of a job that has a search."""
    assert spec.search is not None
    return _space(spec.search.space)


def space_from(tree: Mapping[str, Any]) -> Space:
    """The space of plain values, as `search.space` of a job that was accepted holds it."""
    return _space(distributions_from(tree))


def distributions_from(tree: Mapping[str, Any]) -> dict[str, Distribution]:
    """`search.space` from plain values, as `space_from` takes them."""
    return _GIVEN.validate_json(json.dumps(tree))


def _space(given: Mapping[str, Distribution]) -> Space:
    order, _ = parents_first(given)
    return Space(tuple(_key(path, given[path]) for path in order))


def parents_first(space: Mapping[str, Distribution]) -> tuple[list[str], list[str]]:
    """The paths, each after those of its `when`, otherwise as given; and those in a circle."""
    order: list[str] = []
    left = list(space)
    while ready := [p for p in left if not any(q in left for q in space[p].when or ())]:
        # One at a time, so that a key stays where it stands if it can.
        order.append(ready[0])
        left.remove(ready[0])
    return order, left


def trial_seed(spec: JobSpec, repeat: int) -> int:
    """`data.seed` of the trials of one repeat: the same for all values, which are so compared on
    the same order of rows. Repeat 0 has the job's own."""
    # numpy is heavy, and every command that reads a job imports this module.
    from jobs.study.keyed import keyed_seed

    assert spec.search is not None
    if repeat == 0:
        return spec.data.seed
    return keyed_seed(spec.search.seed, "data.seed", spec.data.seed, repeat)


def job_with(spec: JobSpec, values: Values, *, seed: int) -> JobSpec:
    """The job of one trial: a run like any other, whose best checkpoint is by the study's metric.

    `seed` is that of `trial_seed`. Raises SpecError where the values cannot go together.
    """
    search = spec.search
    assert search is not None
    tree = spec.model_dump(mode="json", exclude={"search"})
    own: Values = {"data.seed": seed, "checkpoint.keep_last": 1, "checkpoint.keep_best": 1}
    if (search.metric, search.mode) != spec.best[:2]:
        watched = {"metric": search.metric, "mode": search.mode, "patience": None}
        own["train.early_stopping"] = watched
    for path, value in {**values, **own}.items():
        tree = with_value(tree, path, value)
    job, problems = job_of(tree, Sources("a trial's job"))
    if job is None:
        raise SpecError(*problems)
    return job


def _key(path: str, given: Distribution) -> Key:
    when = tuple((other, conditions(wanted)) for other, wanted in (given.when or {}).items())
    return Key(path, _over(given), when)


def conditions(wanted: object) -> Choices:
    """The values that `when` names for one key: a list of them, or a single one."""
    return Choices(_plain(wanted) if isinstance(wanted, tuple) else (wanted,))


def _over(given: Distribution) -> Range | Choices:
    if given.way in LISTS:
        return Choices(_plain(given.values))
    low, high, *step = given.values
    if given.way in ("uniform", "loguniform"):
        low, high = float(low), float(high)
    if given.way in ("integer", "log-integer"):
        step = [1]
    return Range(low, high, log="log" in given.way, step=step[0] if step else None)


def _plain(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Lists of the job file, which the spec holds as tuples, as JSON holds them."""
    return tuple(list(value) if isinstance(value, tuple) else value for value in values)
