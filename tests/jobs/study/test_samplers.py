"""The samplers: what they ask for follows from the log alone, and they learn from it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from pydantic import TypeAdapter

from jobs.parse import parse_spec
from jobs.record import Failure, State
from jobs.search_spec import Distribution, Search, num_combinations
from jobs.spec import JobSpec
from jobs.study.events import (
    EVENT,
    Asked,
    Decided,
    Donor,
    Event,
    Failed,
    Lost,
    Reported,
    Started,
    Values,
)
from jobs.study.samplers import Sampler, make_sampler
from jobs.study.score import WORST, score_of
from jobs.study.space import Space, space_from, space_of
from jobs.study.tried import History

ROOT = Path(__file__).parent.parent.parent.parent
RATE = "optimizer.learning_rate"
FLAT = {RATE: {"loguniform": [1e-6, 1e-2]}, "model.dropout": {"uniform": [0, 0.5]}}
MIXED = {
    "optimizer.momentum": {"uniform": [0.8, 0.99], "when": {"optimizer.kind": "sgd"}},
    "optimizer.kind": {"choice": ["adamw", "sgd"]},
    RATE: {"loguniform": [1e-6, 1e-2]},
    "model.dropout": {"quniform": [0, 0.4, 0.1]},
    "model.freeze": {"choice": [[], ["embeddings"], ["embeddings", "encoder"]]},
    "optimizer.warmup_steps": {"log-integer": [1, 400]},
    "batching.global_batch_size": {"qloguniform": [8, 64, 8]},
    "train.epochs": {"integer": [1, 3], "when": {"model.freeze": [[]]}},
}
GRID = {
    "optimizer.kind": {"grid": ["adamw", "sgd"]},
    RATE: {"grid": [1e-5, 1e-4]},
    "optimizer.momentum": {"grid": [0.8, 0.9, 0.95], "when": {"optimizer.kind": "sgd"}},
}
# GP fits a model in each ask, so it gets few of them.
ALGORITHMS: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({"kind": "random"}, MIXED, 40),
    ({"kind": "tpe", "startup_trials": 4}, FLAT, 30),
    ({"kind": "tpe", "startup_trials": 4}, MIXED, 30),
    ({"kind": "gp", "startup_trials": 2}, {key: MIXED[key] for key in (*MIXED,)[:3]}, 6),
    ({"kind": "cmaes"}, FLAT, 60),
    ({"kind": "cmaes", "population": 4}, MIXED, 60),
]
NAMES = ["random", "tpe", "tpe-mixed", "gp-mixed", "cmaes", "cmaes-mixed"]


def study(space: dict[str, Any], algorithm: Any, **search: Any) -> tuple[JobSpec, Space]:
    tree = {
        "name": "a",
        "task": {"labels": ["x", "y"]},
        "model": {"source": "m"},
        "data": {"train": "t", "validation": "v"},
        "store": "runs",
        "search": {"space": space, "algorithm": algorithm, "scheduler": None, **search},
    }
    spec = parse_spec(tree, where="test")
    return spec, space_of(spec)


def sampler_of(space: dict[str, Any], algorithm: Any, *, seed: int = 0, **search: Any) -> Sampler:
    spec, parsed = study(space, algorithm, **search)
    assert spec.search is not None
    return make_sampler(spec.search, parsed, seed)


def reported(trial: int, value: float | None, *, fraction: float = 1.0) -> Reported:
    return Reported(
        trial=trial, step=100, fraction=fraction, epochs=fraction, value=value, best=value
    )


def failed(trial: int, state: State) -> Failed:
    return Failed(trial=trial, failure=Failure(state=state, problems=(("broken", None),)))


def loss(values: Values) -> float:
    """Least at a learning rate of 1e-4 and no dropout."""
    return abs(math.log10(values[RATE]) + 4) + 2 * values.get("model.dropout", 0.0)


def random_study(
    sampler: Sampler, trials: int, seed: int, *, repeats: int = 1
) -> Iterator[tuple[list[Event], Event, Values | None]]:
    """A study whose trials take their time: (events before it, event, what was asked for)."""
    random = np.random.default_rng(seed)
    log: list[Event] = []
    running: dict[int, tuple[float, Values]] = {}
    number = 0

    def happens(event: Event, values: Values | None = None) -> tuple[list[Event], Event, Any]:
        event = EVENT.validate_json(event.model_dump_json())
        before = list(log)
        log.append(event)
        sampler.observe(event)
        return before, event, values

    while number < trials or running:
        if number < trials and (len(running) < 3 or random.random() < 0.3):
            values = sampler.ask(number)
            assert values is not None
            first = number
            for repeat in range(repeats):
                of = first if repeat else None
                asked = Asked(trial=number, values=values, repeat=repeat, repeats=of)
                yield happens(asked, None if repeat else values)
                yield happens(Started(trial=number, leg=1, slot="a", until=0.3))
                running[number] = (0.0, values)
                number += 1
            continue
        trial = int(random.choice(list(running)))
        fraction, values = running[trial]
        fraction = min(1.0, fraction + random.choice([0.3, 0.4]))
        chance = random.random()
        if chance < 0.1:
            yield happens(Lost(trial=trial, cause="gone", counts=True))
        elif chance < 0.2:
            state = State.FAILED_USER if chance < 0.15 else State.FAILED_INFRA
            yield happens(failed(trial, state))
            del running[trial]
        else:
            value = None if chance > 0.95 else loss(values) / fraction
            yield happens(reported(trial, value, fraction=fraction))
            ways = ["continue", "continue", "pause", "stop"] if fraction < 1 else ["finish"]
            decision = str(random.choice(ways))
            yield happens(Decided(trial=trial, decision=decision))
            running[trial] = (fraction, values)
            if decision in ("stop", "finish"):
                del running[trial]


@pytest.mark.parametrize(
    ("algorithm", "space", "trials", "repeats"),
    [*((*case, 1) for case in ALGORITHMS), *((*ALGORITHMS[at], 2) for at in (2, 5))],
    ids=[*NAMES, "tpe-repeats", "cmaes-repeats"],
)
def test_whoever_has_seen_the_same_log_asks_for_the_same(
    algorithm: dict[str, Any], space: dict[str, Any], trials: int, repeats: int
) -> None:
    _, parsed = study(space, algorithm, repeats=repeats)
    asks = 0
    sampler = sampler_of(space, algorithm, seed=5, repeats=repeats)
    for before, event, values in random_study(sampler, trials, seed=3, repeats=repeats):
        if values is None:
            continue
        assert isinstance(event, Asked)
        assert parsed.holds(values)
        assert {type(v) for v in values.values()} <= {int, float, str, list}
        asks += 1
        if asks % 5 and asks < trials - 4:
            continue  # each replay begins from nothing
        replayed = sampler_of(space, algorithm, seed=5, repeats=repeats)
        for earlier in before:
            replayed.observe(earlier)
        assert replayed.ask(event.trial) == values
    assert asks * repeats >= trials


@pytest.mark.parametrize(("algorithm", "space", "trials"), ALGORITHMS, ids=NAMES)
def test_trials_that_run_at_a_time_differ_and_so_do_studies(
    algorithm: dict[str, Any], space: dict[str, Any], trials: int
) -> None:
    sampler = sampler_of(space, algorithm)
    seen: list[Values | None] = []
    for trial in range(6):
        values = sampler.ask(trial)
        assert values is not None
        sampler.observe(Asked(trial=trial, values=values))
        if trial < 4:
            sampler.observe(reported(trial, loss(values)))
            sampler.observe(Decided(trial=trial, decision="finish"))
        seen.append(values)
    seen.append(sampler_of(space, algorithm, seed=1).ask(0))
    assert len({json.dumps(values) for values in seen}) == 7


def run(
    sampler: Sampler,
    trials: int,
    end: Callable[[int, Values], list[Event]],
) -> list[Values]:
    """Values of each trial, one at a time; `end` says what happens to it."""
    seen = []
    for trial in range(trials):
        values = sampler.ask(trial)
        assert values is not None
        for event in (Asked(trial=trial, values=values), *end(trial, values)):
            sampler.observe(event)
        seen.append(values)
    return seen


def finished(trial: int, values: Values) -> list[Event]:
    return [reported(trial, loss(values)), Decided(trial=trial, decision="finish")]


def stopped(trial: int, values: Values) -> list[Event]:
    return [reported(trial, loss(values), fraction=0.2), Decided(trial=trial, decision="stop")]


@pytest.mark.parametrize(("algorithm", "trials"), [("tpe", 80), ("cmaes", 120)])
@pytest.mark.parametrize("end", [finished, stopped])
def test_what_learns_comes_nearer_to_the_best_than_random_search(
    algorithm: Any, trials: int, end: Callable[[int, Values], list[Event]]
) -> None:
    learned = [loss(v) for v in run(sampler_of(FLAT, algorithm), trials, end)]
    random = [loss(v) for v in run(sampler_of(FLAT, "random"), 200, end)]
    assert np.median(learned[-trials // 4 :]) < 0.5 * np.median(random)


@pytest.mark.parametrize("end", [finished, stopped])
def test_a_gaussian_process_finds_a_good_place_in_few_trials(
    end: Callable[[int, Values], list[Event]],
) -> None:
    sampler = sampler_of(FLAT, {"kind": "gp", "startup_trials": 6})
    learned = [loss(v) for v in run(sampler, 12, end)]
    random = [loss(v) for v in run(sampler_of(FLAT, "random"), 600, end)]
    best_of_six = np.min(np.reshape(random, (100, 6)), axis=1)
    assert min(learned[6:]) < np.quantile(best_of_six, 0.25)


def test_larger_may_be_better() -> None:
    def end(trial: int, values: Values) -> list[Event]:
        return [reported(trial, -loss(values)), Decided(trial=trial, decision="finish")]

    sampler = sampler_of(FLAT, "tpe", metric="validation/f1")
    learned = [loss(v) for v in run(sampler, 80, end)]
    assert np.median(learned[-20:]) < 0.5 * np.median(learned[:10])


def test_tpe_avoids_what_fails() -> None:
    def end(trial: int, values: Values) -> list[Event]:
        if values[RATE] > 1e-4:
            return [failed(trial, State.FAILED_USER)]
        distance = abs(math.log10(values[RATE]) + 5)
        return [reported(trial, distance), Decided(trial=trial, decision="finish")]

    rates = [v[RATE] for v in run(sampler_of(FLAT, "tpe"), 50, end)]
    assert sum(rate > 1e-4 for rate in rates[:10]) >= 3
    assert sum(rate > 1e-4 for rate in rates[-20:]) <= 2


def test_cmaes_starts_anew_when_it_has_settled() -> None:
    space = {RATE: FLAT[RATE]}
    values = run(sampler_of(space, {"kind": "cmaes", "population": 4}), 700, finished)
    places = np.log10([v[RATE] for v in values])
    settled = [np.ptp(places[at : at + 8]) < 1e-3 for at in range(len(places) - 8)]
    first = settled.index(True)
    assert np.ptp(places[first:]) > 0.3


def test_a_grid_is_every_combination_once_in_order() -> None:
    sampler = sampler_of(GRID, "grid")
    values = run(sampler, 8, finished)
    assert [(v["optimizer.kind"], v[RATE], v.get("optimizer.momentum")) for v in values] == [
        ("adamw", 1e-5, None),
        ("adamw", 1e-4, None),
        *(("sgd", rate, m) for rate in (1e-5, 1e-4) for m in (0.8, 0.9, 0.95)),
    ]
    assert sampler.ask(8) is None
    assert sampler.ask(9) is None


@pytest.mark.parametrize(
    "space",
    [
        GRID,
        {"model.dropout": {"grid": [0, 0.1, 0.2]}, RATE: {"grid": [1e-5, 1e-4]}},
        # Beside one of two values, and beside what is itself searched now and then only.
        {
            "optimizer.max_grad_norm": {
                "grid": [1, 2, 3],
                "when": {"optimizer.momentum": [0.8, 0.9]},
            },
            **GRID,
        },
        # Lists, and a value that is no number though it equals one.
        {
            "model.freeze": {"grid": [[], ["embeddings"]]},
            "model.dropout": {"grid": [0.1, 0.2], "when": {"model.freeze": [["embeddings"]]}},
            "train.shuffle": {"grid": [True, False]},
            RATE: {"grid": [1e-5, 1e-4], "when": {"train.shuffle": 1}},
        },
    ],
)
def test_the_number_of_combinations_is_known_beforehand(space: dict[str, Any]) -> None:
    given = TypeAdapter(dict[str, Distribution]).validate_json(json.dumps(space))
    sampler = make_sampler(Search(algorithm="grid"), space_from(space), 0)  # type: ignore[arg-type]
    number = 0
    while (values := sampler.ask(number)) is not None:
        sampler.observe(Asked(trial=number, values=values))
        number += 1
    assert num_combinations(given) == number


def test_a_larger_grid_leaves_out_what_was_tried() -> None:
    wider = {**GRID, RATE: {"grid": [1e-6, 1e-5, 1e-4]}}
    sampler = sampler_of(wider, "grid")
    for trial, values in enumerate(run(sampler_of(GRID, "grid"), 8, finished)):
        sampler.observe(Asked(trial=trial, values=values))
    left = []
    while (values := sampler.ask(8 + len(left))) is not None:
        left.append(values)
        sampler.observe(Asked(trial=7 + len(left), values=values))
    assert len(left) == 4
    assert {v[RATE] for v in left} == {1e-6}


@pytest.mark.parametrize("algorithm", ["tpe", {"kind": "gp", "startup_trials": 3}, "cmaes"])
def test_another_space_keeps_of_the_log_what_it_holds(algorithm: Any) -> None:
    sampler = sampler_of({RATE: {"loguniform": [1e-5, 1e-3]}}, algorithm)
    for trial, rate in enumerate([1e-6, 2e-5, 3e-5, 1e-4, 2e-4, 1e-2]):
        values = {RATE: rate} if trial % 2 else {RATE: rate, "model.dropout": 0.1}
        sampler.observe(Asked(trial=trial, values=values))
        for event in finished(trial, values):
            sampler.observe(event)
    values = sampler.ask(6)
    assert values is not None
    assert 1e-5 <= values[RATE] <= 1e-3


def test_asks_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "import json\n"
        "from tests.jobs.study.test_samplers import *\n"
        "sampler = sampler_of(MIXED, {'kind': 'tpe', 'startup_trials': 4})\n"
        "print(json.dumps(run(sampler, 12, finished)))\n"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert not done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_optuna_is_told_of_a_bounded_number_of_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[optuna.trial.FrozenTrial]] = []
    create = optuna.create_study

    def noting(*, storage: Any, **rest: Any) -> optuna.Study:
        study = create(storage=storage, **rest)
        told.append(study.trials)
        return study

    monkeypatch.setattr(optuna, "create_study", noting)
    sampler = sampler_of(FLAT, "tpe")
    sampler.observe(Asked(trial=0, values={RATE: 1e-4, "model.dropout": 0.0}))
    rates = np.random.default_rng(0).uniform(1e-5, 1e-3, 1500)
    for trial, rate in enumerate(rates, start=1):
        values = {RATE: float(rate), "model.dropout": 0.25}
        for event in (Asked(trial=trial, values=values), *finished(trial, values)):
            sampler.observe(event)
    assert sampler.ask(1501) == sampler.ask(1501)
    numbers = [trial.number for trial in told[0]]
    assert numbers == sorted(numbers)
    assert len(numbers) <= 1001
    best = np.argsort([loss({RATE: rate}) for rate in rates])[:100]
    # The one that runs, the best of all, and the newest.
    assert {1, *(int(at) + 2 for at in best), *range(603, 1502)} <= set(numbers)


# ------------------------------------------------------------------------------------- history


def history_of(**search: Any) -> History:
    spec, space = study(FLAT, "random", **search)
    assert spec.search is not None
    return History(spec.search, space)


VALUES = {RATE: 1e-4, "model.dropout": 0.1}


def test_a_trial_counts_once_with_its_newest_score() -> None:
    history = history_of()
    for event in (
        Asked(trial=0, values=VALUES),
        reported(0, 3.0, fraction=0.1),
        Decided(trial=0, decision="pause"),
        reported(0, 2.0, fraction=0.3),
        Decided(trial=0, decision="continue"),
    ):
        history.observe(event)
    (tried,) = history.tried.values()
    assert (tried.score, tried.fraction, tried.is_finished) == (-2.0, 0.3, False)
    history.observe(reported(0, 1.0, fraction=1.0))
    history.observe(Decided(trial=0, decision="finish"))
    assert (tried.score, tried.fraction, tried.is_finished) == (-1.0, 1.0, True)


def test_repeats_count_as_one_with_their_mean() -> None:
    history = history_of(repeats=2)
    history.observe(Asked(trial=0, values=VALUES))
    history.observe(Asked(trial=1, values=VALUES, repeat=1, repeats=0))
    history.observe(reported(1, 2.0, fraction=0.5))
    (tried,) = history.tried.values()
    assert (tried.score, tried.fraction) == (-2.0, 0.5)
    history.observe(reported(0, 1.0))
    history.observe(Decided(trial=0, decision="finish"))
    assert (tried.score, tried.fraction, tried.is_finished) == (-1.5, 0.5, False)
    history.observe(failed(1, State.FAILED_USER))
    assert tried.score == WORST


@pytest.mark.parametrize("state", [State.FAILED_INFRA, State.FAILED_RESOURCES])
def test_a_trial_that_the_platform_has_taken_is_forgotten(state: State) -> None:
    history = history_of()
    history.observe(Asked(trial=0, values=VALUES))
    history.observe(reported(0, 1.0))
    history.observe(failed(0, state))
    history.observe(reported(0, 1.0))
    assert not history.tried


def test_clones_and_finalists_teach_nothing() -> None:
    history = history_of()
    history.observe(Asked(trial=0, values=VALUES, donor=Donor(trial=3, step=10)))
    history.observe(Asked(trial=1, values=VALUES, purpose="finalist", repeats=0))
    history.observe(reported(1, 1.0))
    assert not history.tried


@pytest.mark.parametrize(
    ("search", "score"),
    [
        ({}, -0.25),
        ({"score": "last"}, -0.5),
        ({"metric": "validation/f1"}, 0.25),
        ({"metric": "validation/f1", "score": "last", "mode": "min"}, -0.5),
    ],
)
def test_a_score_is_the_best_or_the_last_and_larger_is_better(
    search: dict[str, Any], score: float
) -> None:
    spec, _ = study(FLAT, "random", **search)
    event = Reported(trial=0, step=1, fraction=0.1, epochs=0.1, value=0.5, best=0.25)
    assert spec.search is not None
    assert score_of(event, spec.search) == score
    for nothing in (None, math.nan, math.inf):
        broken = event.model_copy(update={"value": nothing, "best": nothing})
        assert score_of(broken, spec.search) == WORST
