"""ASHA and Hyperband, beside their papers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from simulated_study import FAILURE, Study

from jobs import search_spec
from jobs.search_spec import ASHA
from jobs.study.events import Asked, Decided, Event, Extended, Failed, Reported
from jobs.study.schedulers import Asha, Hyperband, Objective
from jobs.study.schedulers.rungs import rung_fractions

BEST = Objective(mode="max", score="best")


def asha(trials: int, *, score: Objective = BEST) -> Asha:
    return Asha(ASHA(reduction_factor=3, first=0.11), objective=score, trials=trials)


def hyperband(trials: int, *, first: float = 1 / 81) -> Hyperband:
    given = search_spec.Hyperband(reduction_factor=3, first=first)
    return Hyperband(given, objective=BEST, trials=trials)


def test_rungs_are_the_powers_that_are_not_below_the_first() -> None:
    def rungs(reduction_factor: int, first: float | None) -> tuple[float, ...]:
        given = ASHA(reduction_factor=reduction_factor, first=first)
        other = search_spec.Hyperband(reduction_factor=reduction_factor, first=first)
        assert rung_fractions(given) == rung_fractions(other)
        return rung_fractions(given)

    assert rungs(3, 1 / 9) == (1 / 9, 1 / 3, 1.0)
    assert rungs(3, 0.11) == (1 / 9, 1 / 3, 1.0)
    assert rungs(3, 0.12) == (1 / 3, 1.0)
    assert rungs(4, 0.25) == (0.25, 1.0)
    for eta in (2, 3, 7, 49):
        assert rungs(eta, None) == (1 / eta**2, 1 / eta, 1.0)
    for exponent in range(9):
        assert 3 ** (8 - exponent) / 3**8 == rungs(3, 1e-9)[-1 - exponent]


class Algorithm2:
    """Algorithm 2 of Li et al. 2018 as it is written: get_job with lists that are sorted anew.

    A failed trial has the worst of all scores, and can not be promoted.
    """

    def __init__(self, eta: int, fractions: tuple[float, ...]) -> None:
        self.eta = eta
        self.fractions = fractions
        self.rungs: list[dict[int, float]] = [{} for _ in fractions]
        self.promoted: list[set[int]] = [set() for _ in fractions]
        self.target: dict[int, int] = {}
        self.failed: set[int] = set()

    def get_job(self) -> int | None:
        for k in reversed(range(len(self.rungs) - 1)):
            if promotable := self.promotable(k):
                return promotable[0]
        return None

    def promotable(self, k: int) -> list[int]:
        ranked = sorted(self.rungs[k], key=lambda trial: (-self.rungs[k][trial], trial))
        candidates = ranked[: len(ranked) // self.eta]
        return [t for t in candidates if t not in self.promoted[k] and t not in self.failed]

    def observe(self, event: Event) -> None:
        if isinstance(event, Asked):
            self.target[event.trial] = 0
        elif isinstance(event, Reported):
            score = float("-inf") if event.best is None else event.best
            self.rungs[self.target[event.trial]][event.trial] = score
        elif isinstance(event, Failed):
            self.failed.add(event.trial)
            self.rungs[self.target[event.trial]][event.trial] = float("-inf")
        elif isinstance(event, Decided) and event.decision == "continue":
            self.promoted[self.target[event.trial]].add(event.trial)
            self.target[event.trial] += 1


@pytest.mark.parametrize("slots", [1, 2, 9])
@pytest.mark.parametrize("seed", range(4))
def test_promotions_of_asha_are_those_of_algorithm_2(slots: int, seed: int) -> None:
    study = Study(
        make=lambda: asha(40), trials=40, slots=slots, seed=seed, failures=0.05, losses=0.05
    ).run()
    paper = Algorithm2(3, (1 / 9, 1 / 3, 1.0))
    promotions = 0
    before: Event | None = None
    for event in study.log:
        if isinstance(event, Asked):
            assert paper.get_job() is None
        elif isinstance(event, Decided):
            has_just_reported = isinstance(before, Reported)
            rung = paper.target[event.trial]
            if event.decision == "continue" and has_just_reported:
                assert event.trial in paper.promotable(rung)
            elif event.decision == "continue":
                assert event.trial == paper.get_job()
            elif event.decision == "pause":
                assert event.trial not in paper.promotable(rung)
            elif event.decision == "stop":
                assert paper.get_job() is None
            if event.decision == "continue":
                assert event.until == paper.fractions[rung + 1]
                promotions += 1
        paper.observe(event)
        before = event
    assert paper.get_job() is None
    assert promotions >= 40 // 3 + 40 // 9


def told(
    trial: int, fraction: float, value: float | None, *, best: float | None = None
) -> Reported:
    return Reported(
        trial=trial,
        step=round(fraction * 900),
        fraction=fraction,
        epochs=fraction,
        value=value,
        best=value if best is None else best,
    )


def ask(scheduler: Asha | Hyperband, count: int) -> None:
    ask_more(scheduler, range(count))


def ask_more(scheduler: Asha | Hyperband, trials: Iterable[int]) -> None:
    for trial in trials:
        scheduler.observe(Asked(trial=trial, values={}, bracket=scheduler.bracket()))


def tell(scheduler: Asha | Hyperband, report: Reported) -> Decided:
    scheduler.observe(report)
    decided = scheduler.decide(report.trial)
    scheduler.observe(decided)
    return decided


def test_a_trial_that_may_be_promoted_when_it_reports_goes_on_in_place() -> None:
    scheduler = asha(9)
    ask(scheduler, 3)
    assert tell(scheduler, told(0, 1 / 9, 0.5)).decision == "pause"
    assert tell(scheduler, told(1, 1 / 9, 0.4)).decision == "pause"
    decided = tell(scheduler, told(2, 1 / 9, 0.6))
    assert (decided.decision, decided.until) == ("continue", 1 / 3)
    assert scheduler.next() is None


def test_of_equal_scores_the_earlier_trial_wins() -> None:
    scheduler = asha(9)
    ask(scheduler, 3)
    for trial in (2, 1, 0):
        decided = tell(scheduler, told(trial, 1 / 9, 0.5))
    assert (decided.trial, decided.decision) == (0, "continue")


@pytest.mark.parametrize(("score", "wins"), [("best", 0), ("last", 1)])
def test_the_score_is_the_best_or_the_last_of_a_trials_evaluations(score: str, wins: int) -> None:
    scheduler = asha(9, score=Objective(mode="max", score=score))  # type: ignore[arg-type]
    ask(scheduler, 3)
    tell(scheduler, told(2, 1 / 9, 0.1))
    tell(scheduler, told(0, 1 / 9, 0.2, best=0.9))
    last = tell(scheduler, told(1, 1 / 9, 0.5))
    waiting = scheduler.next()
    assert (1 if last.decision == "continue" else waiting and waiting.trial) == wins


def test_smaller_is_better_where_the_mode_is_min() -> None:
    scheduler = asha(9, score=Objective(mode="min"))
    ask(scheduler, 3)
    tell(scheduler, told(0, 1 / 9, 0.9))
    tell(scheduler, told(1, 1 / 9, None))
    assert tell(scheduler, told(2, 1 / 9, 0.1)).decision == "continue"


def test_a_failed_trial_counts_as_the_worst_of_its_rung() -> None:
    scheduler = asha(9)
    ask(scheduler, 3)
    tell(scheduler, told(0, 1 / 9, 0.1))
    scheduler.observe(Failed(trial=1, failure=FAILURE))
    assert scheduler.next() is None
    scheduler.observe(Failed(trial=2, failure=FAILURE))
    waiting = scheduler.next()
    assert waiting is not None
    assert (waiting.trial, waiting.decision) == (0, "continue")


def test_free_slots_go_to_the_topmost_rung_first() -> None:
    scheduler = asha(30)
    ask(scheduler, 9)
    for trial in range(9):
        tell(scheduler, told(trial, 1 / 9, 0.9 - trial / 10))
    for trial in (0, 1):
        promoted = scheduler.next()
        assert promoted is not None
        assert (promoted.trial, promoted.until) == (trial, 1 / 3)
        scheduler.observe(promoted)
        tell(scheduler, told(trial, 1 / 3, 0.9 - trial / 10))
    # Trial 2 may be promoted at the first rung; a failure makes trial 0 one at the second.
    lowest = scheduler.next()
    assert lowest is not None
    assert lowest.trial == 2
    scheduler.observe(lowest)
    ask_more(scheduler, range(9, 12))
    for trial in range(9, 12):
        tell(scheduler, told(trial, 1 / 9, 0.0))
    scheduler.observe(Failed(trial=2, failure=FAILURE))
    untils = []
    for _ in range(2):
        promoted = scheduler.next()
        assert promoted is not None
        untils.append((promoted.trial, promoted.until))
        scheduler.observe(promoted)
    assert untils == [(0, 1.0), (3, 1 / 3)]


def test_a_report_past_several_rungs_counts_in_each() -> None:
    scheduler = asha(9)
    ask(scheduler, 3)
    tell(scheduler, told(0, 0.5, 0.1))
    tell(scheduler, told(1, 0.5, 0.2))
    decided = tell(scheduler, told(2, 0.5, 0.3))
    assert (decided.decision, decided.until) == ("continue", 1.0)


def test_asha_stops_what_can_not_be_promoted_any_more_only_when_all_have_reported() -> None:
    scheduler = asha(4)
    ask(scheduler, 4)
    for trial in range(3):
        tell(scheduler, told(trial, 1 / 9, 0.5 - trial / 10))
    promoted = scheduler.next()
    assert promoted is not None
    assert (promoted.trial, promoted.decision) == (0, "continue")
    scheduler.observe(promoted)
    assert scheduler.next() is None
    assert tell(scheduler, told(3, 1 / 9, 0.0)).decision == "pause"
    stopped = []
    while (decided := scheduler.next()) is not None:
        assert "no other trial comes to it" in decided.reason
        stopped.append((decided.trial, decided.decision))
        scheduler.observe(decided)
    assert stopped == [(3, "stop"), (2, "stop"), (1, "stop")]


def test_asha_goes_on_promoting_when_a_study_is_extended() -> None:
    study = Study(make=lambda: asha(9), trials=9).run()
    study.append(Extended(trials=60))
    study.trials = 60
    study.go_on()
    assert study.over == set(range(60))
    late = {e.trial for e in study.log if isinstance(e, Decided) and e.decision == "finish"}
    assert any(trial >= 9 for trial in late)


TABLE = {
    # bracket: (trials, epochs of 81) of each rung; Li et al. 2017, table 1
    0: [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
    1: [(34, 3), (11, 9), (3, 27), (1, 81)],
    2: [(15, 9), (5, 27), (1, 81)],
    3: [(8, 27), (2, 81)],
    4: [(5, 81)],
}


@pytest.mark.parametrize("slots", [1, 8])
def test_hyperband_allocates_as_the_table_of_its_paper(slots: int) -> None:
    trials = 81 + 34 + 15 + 8 + 5
    study = Study(
        make=lambda: hyperband(trials), trials=trials, slots=slots, evaluations=(81,)
    ).run()
    bracket = {e.trial: e.bracket for e in study.log if isinstance(e, Asked)}
    found = Counter(
        (bracket[e.trial], round(e.fraction * 81)) for e in study.log if isinstance(e, Reported)
    )
    assert found == {(b, epochs): n for b, rungs in TABLE.items() for n, epochs in rungs}
    assert [*bracket] == sorted(bracket, key=lambda trial: (bracket[trial], trial))


def test_the_bracket_after_the_last_is_as_the_first() -> None:
    scheduler = hyperband(1000, first=1 / 9)
    sizes = [9, 5, 3, 9]
    ask(scheduler, sum(sizes))
    assert scheduler.bracket() == 4
    assert [scheduler.first(b) for b in range(4)] == [1 / 9, 1 / 3, 1.0, 1 / 9]


def test_a_rung_goes_on_with_the_best_of_all_its_trials_and_the_others_stop() -> None:
    study = Study(make=lambda: hyperband(9, first=1 / 9), trials=9, slots=4).run()
    scores = {
        e.trial: e.best or 0 for e in study.log if isinstance(e, Reported) if e.fraction < 0.2
    }
    best = sorted(scores, key=lambda trial: -scores[trial])[:3]
    decided = [e for e in study.log if isinstance(e, Decided)]
    assert {e.trial for e in decided if e.until == 1 / 3} == set(best)
    assert {e.trial for e in decided if e.decision == "stop"} >= set(scores) - set(best)


@pytest.mark.parametrize("trials", [1, 2, 10, 83, 86])
def test_a_bracket_that_is_cut_short_ends_with_a_trial_that_had_its_full_budget(
    trials: int,
) -> None:
    study = Study(make=lambda: hyperband(trials), trials=trials, evaluations=(81,)).run()
    assert study.over == set(range(trials))
    last = max(e.bracket for e in study.log if isinstance(e, Asked))
    members = {e.trial for e in study.log if isinstance(e, Asked) and e.bracket == last}
    finished = {e.trial for e in study.log if isinstance(e, Decided) and e.decision == "finish"}
    assert len(members & finished) == 1


def test_a_bracket_that_was_decided_gets_no_trial_of_an_extension() -> None:
    study = Study(make=lambda: hyperband(10), trials=10, evaluations=(81,)).run()
    study.append(Extended(trials=50))
    study.trials = 50
    study.go_on()
    assert study.over == set(range(50))
    size = Counter(e.bracket for e in study.log if isinstance(e, Asked))
    assert size == {0: 10, 1: 34, 2: 6}


def test_a_rung_does_not_wait_for_failed_trials() -> None:
    scheduler = hyperband(3, first=1 / 3)
    ask(scheduler, 3)
    assert tell(scheduler, told(0, 1 / 3, 0.1)).decision == "pause"
    scheduler.observe(Failed(trial=1, failure=FAILURE))
    assert scheduler.next() is None
    scheduler.observe(Failed(trial=2, failure=FAILURE))
    waiting = scheduler.next()
    assert waiting is not None
    assert (waiting.trial, waiting.decision, waiting.until) == (0, "continue", 1.0)


def test_failed_trials_count_in_the_size_of_a_rung() -> None:
    scheduler = hyperband(9, first=1 / 9)
    ask(scheduler, 9)
    for trial in range(4):
        scheduler.observe(Failed(trial=trial, failure=FAILURE))
    for trial in range(4, 9):
        scheduler.observe(told(trial, 1 / 9, trial / 10))
    decisions = {trial: scheduler.decide(trial).decision for trial in range(4, 9)}
    assert decisions == {4: "stop", 5: "stop", 6: "continue", 7: "continue", 8: "continue"}
    # All of them are still to be decided on where they reported.
    assert scheduler.next() is None
    scheduler.observe(scheduler.decide(7))
    assert scheduler.next() is None


def test_a_trial_that_ended_early_keeps_its_place_in_the_rungs_above() -> None:
    scheduler = hyperband(9, first=1 / 9)
    ask(scheduler, 9)
    assert tell(scheduler, told(8, 1.0, 0.9)).decision == "finish"
    for trial in range(8):
        tell(scheduler, told(trial, 1 / 9, trial / 10))
    going = []
    while (decided := scheduler.next()) is not None:
        scheduler.observe(decided)
        if decided.decision == "continue":
            going.append(decided.trial)
    assert going == [6]
    # The reporter that made the rung complete went on in place; of the three one had ended.
    assert tell(scheduler, told(6, 1 / 3, 0.6)).decision == "pause"
    assert tell(scheduler, told(7, 1 / 3, 0.7)).decision == "stop"
    stopped = scheduler.next()
    assert stopped is not None
    assert (stopped.trial, stopped.decision) == (6, "stop")
