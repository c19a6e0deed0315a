"""Population based training (Jaderberg et al. 2017, "Population Based Training of Neural
Networks"), in synchronous rounds and with truncation selection."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from jobs.search_spec import PBT
from jobs.study.events import Asked, Decided, Donor, Event, Extended, Failed, Reported, Values
from jobs.study.keyed import keyed
from jobs.study.schedulers.scheduler import Objective, continued, finished, paused, stopped
from jobs.study.space import Key, Range


@dataclass(frozen=True, kw_only=True)
class Clone:
    """A trial to be made."""

    replaces: int
    """Trial whose place it takes."""
    donor: Donor
    values: Values
    """Of the donor."""
    round: int
    """That it begins after, counted from 1."""


class Pbt:
    """A Scheduler: at each multiple of `every` the worst members of the population stop, and
    for each a clone of one of the best begins at the donor's step, with other values.

    A round is decided when every member has reported. Members are compared by their newest value,
    whichever of a trial's values the study goes by: it is the newest state that is cloned. Every
    member is paused at a round, so that clones find the state there. Failed members count as the
    worst, and are replaced. One that ends early, as by early stopping, leaves the population, and
    is neither cloned nor replaced.

    A clone's `bracket` is the round that it begins after. The paper's populations have 20 to 80
    members; few budgets of fine-tuning do.
    """

    def __init__(
        self,
        given: PBT,
        *,
        objective: Objective,
        keys: Sequence[Key],
        seed: int,
        trials: int,
        explore: Callable[[Clone], Values] | None = None,
    ) -> None:
        """`keys` may change in clones; a clone has the donor's values for all others. Keys that
        another's condition depends on are to be left out. `trials` bounds the population. `explore`
        gives a clone's values, from nothing but what has been observed; None: `perturbed`."""
        self._given = given
        self._objective = objective
        self._keys = keys
        self._seed = seed
        self._trials = trials
        self._explore = explore or self.perturbed
        self._num_asked = 0
        self._next_trial = 0
        self._round = 1
        """That the population is on its way to."""
        self._members: dict[int, _Member] = {}
        self._num_missing = 0
        """Members that have not reported in this round."""
        self._failed: list[int] = []
        """Members to be replaced after this round."""
        self._undecided: dict[int, float] = {}
        """Fraction of each trial that has reported and was not yet decided on."""
        self._stopping: OrderedDict[int, str] = OrderedDict()
        self._clones: deque[Clone] = deque()
        self._going: OrderedDict[int, str] = OrderedDict()
        """What the last round made of the population, until the log has it; with reasons."""

    def observe(self, event: Event) -> None:
        if isinstance(event, Asked):
            self._next_trial = event.trial + 1
            if event.purpose == "search":
                self._join(event)
        elif isinstance(event, Reported) and event.trial in self._members:
            self._report(self._members[event.trial], event)
        elif isinstance(event, Decided):
            self._undecided.pop(event.trial, None)
            if event.decision == "continue":
                self._going.pop(event.trial, None)
            elif event.decision == "stop":
                self._stopping.pop(event.trial, None)
        elif isinstance(event, Failed):
            self._fail(event.trial)
        elif isinstance(event, Extended):
            self._trials = event.trials
            self._select()

    def bracket(self) -> int:
        return 0

    def first(self, bracket: int) -> float:
        return self._fraction(bracket + 1)

    def decide(self, trial: int) -> Decided:
        if self._undecided[trial] >= 1.0:
            return finished(trial)
        return paused(trial, reason="a round ends when all members have reported")

    def next(self) -> Decided | Asked | None:
        if self._undecided:
            return None
        for trial, reason in self._stopping.items():
            return stopped(trial, reason=reason)
        # Clones come before their donors go on, which need the donors' states of this round.
        for clone in self._clones:
            return Asked(
                trial=self._next_trial,
                values=self._explore(clone),
                donor=clone.donor,
                bracket=clone.round,
            )
        for trial, reason in self._going.items():
            return continued(trial, until=self._fraction(self._round), reason=reason)
        return None

    def takes_new(self) -> bool:
        return self._round == 1 and self._num_asked < min(self._given.population, self._trials)

    def perturbed(self, clone: Clone) -> Values:
        """The donor's values, each drawn anew or, if it is a number, multiplied by a factor."""
        rng = keyed(self._seed, "perturb", clone.replaces, clone.round)
        values = dict(clone.values)
        for key in self._keys:
            is_resampled = rng.random() < self._given.resample
            place = rng.random()
            factor = self._given.factors[int(rng.integers(2))]
            if key.path not in values:
                continue
            if is_resampled:
                values[key.path] = key.over.at(place)
            elif isinstance(key.over, Range):
                values[key.path] = _multiplied(key.over, values[key.path], factor)
        return values

    def _join(self, event: Asked) -> None:
        if event.donor is None:
            self._num_asked += 1
        else:
            self._clones.popleft()
        self._members[event.trial] = _Member(event.values)
        self._num_missing += 1

    def _report(self, member: _Member, event: Reported) -> None:
        self._undecided[event.trial] = event.fraction
        member.step, member.fraction = event.step, event.fraction
        member.cost = self._objective.cost_of(event.value)
        self._num_missing -= not member.has_reported
        member.has_reported = True
        if event.fraction >= 1.0:
            del self._members[event.trial]
        self._select()

    def _fail(self, trial: int) -> None:
        self._undecided.pop(trial, None)
        self._stopping.pop(trial, None)
        self._going.pop(trial, None)
        if (member := self._members.pop(trial, None)) is not None:
            self._num_missing -= not member.has_reported
            self._failed.append(trial)
            self._select()

    def _select(self) -> None:
        """Decide the round, if all members have reported: who stops, who is cloned, who goes on."""
        if self.takes_new() or self._clones or self._num_missing or not self._members:
            return
        ranked = sorted(self._members, key=lambda trial: (self._members[trial].cost, trial))
        size = len(ranked) + len(self._failed)
        num_cut = min(math.ceil(size * self._given.quantile), size // 2)
        num_stopped = max(0, num_cut - len(self._failed))
        survivors = ranked[: len(ranked) - num_stopped]
        losers = ranked[len(ranked) - num_stopped :]
        donors = survivors[: max(1, num_cut)]
        following = self._round_after(survivors)
        for replaced in [*losers, *self._failed]:
            rng = keyed(self._seed, "donor", replaced, self._round)
            donor = donors[int(rng.integers(len(donors)))]
            self._clones.append(
                Clone(
                    replaces=replaced,
                    donor=Donor(trial=donor, step=self._members[donor].step),
                    values=self._members[donor].values,
                    round=following - 1,
                )
            )
        for trial in losers:
            self._stopping[trial] = f"among the worst {num_cut} of {size} in round {self._round}"
            del self._members[trial]
        for trial in survivors:
            self._going[trial] = f"not among the worst {num_cut} of {size} in round {self._round}"
            self._members[trial].has_reported = False
        self._failed = []
        self._num_missing = len(survivors)
        self._round = following

    def _round_after(self, survivors: Sequence[int]) -> int:
        """The next one that no survivor has gone beyond, as those do that evaluate rarely."""
        furthest = max(self._members[trial].fraction for trial in survivors)
        following = self._round + 1
        while self._fraction(following) <= furthest:
            following += 1
        return following

    def _fraction(self, number: int) -> float:
        """Of the budget, at a round; the last one takes up a rest shorter than half a round.

        It is the float nearest to its value, as is a number of steps divided by those planned.
        """
        every = Fraction(self._given.every).limit_denominator(10_000)
        return 1.0 if 1 - number * every < every / 2 else float(number * every)


@dataclass(slots=True)
class _Member:
    """A trial of the population that is not over."""

    values: Values
    step: int = 0
    fraction: float = 0.0
    cost: float = math.inf
    has_reported: bool = False
    """In this round."""


def _multiplied(over: Range, value: float, factor: float) -> float:
    """The nearest number of the range; where that is the same one, its neighbour."""
    moved = over.nearest(value * factor)
    if moved == value and over.step is not None:
        return over.nearest(value + math.copysign(over.step, factor - 1))
    return moved
