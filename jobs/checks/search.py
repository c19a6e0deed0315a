"""What a search amounts to before it begins: space, rungs, trials at a time, epochs. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

from jobs.checks.finding import (
    Finding,
    not_checked,
    ok,
    warning,
)
from jobs.checks.machine import Machine, trials_at_once
from jobs.checks.schedule import Totals
from jobs.search_spec import ASHA, PB2, PBT, Hyperband, MedianStopping, Search, num_combinations
from jobs.spec import JobSpec, format_bytes
from jobs.study.schedulers.hyperband import bracket_plans
from jobs.study.schedulers.rungs import rung_fractions
from jobs.study.space import Choices, Range, Space, space_of
from jobs.study_view import over_text

_CLOSE = 1e-9


@dataclass(frozen=True)
class SearchPlan:
    """A search in numbers; None where one is not known before it runs."""

    keys: dict[str, str]
    """How each searched key is drawn."""
    algorithm: str
    scheduler: str
    rungs: tuple[float, ...]
    """Fractions of a trial's budget at which the scheduler may end it, 1.0 last."""
    evaluations: int | None
    """Of a trial with its full budget; of the one that has the fewest."""
    combinations: int | None
    """Of a grid; None for other algorithms."""
    trials: int
    """With repeats and the baseline, without finalists."""
    finalists: int
    """Runs of them, at most: the baseline may be among the best."""
    at_a_time: int | None
    """Trials that this machine has room for at once."""
    search_epochs: float
    """About, in all trials; at most where `epochs_are_most`."""
    finalist_epochs: float
    epochs_are_most: bool
    epochs_in_a_row: float | None
    """Epochs of the job itself, one after the other, that take about as long as the whole; None
    where it is not known how many trials run at a time."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_search(spec: JobSpec, totals: Totals, machine: Machine | None) -> SearchPlan | None:
    """What the search of a job amounts to; None for a job that has none."""
    search = spec.search
    if search is None:
        return None
    space = space_of(spec)
    combinations = num_combinations(search.space) if search.algorithm.kind == "grid" else None
    configurations = _num_configurations(search, combinations)
    trials = configurations * search.repeats
    seeds = search.finalists.seeds if search.finalists is not None else 0
    num_finalists = search.most_finalists(configurations) * seeds
    evaluations = _fewest_evaluations(spec, space, totals)
    search_epochs = _num_budgets(search, trials, evaluations) * spec.train.epochs
    if (limit := search.budget.epochs) is not None:
        search_epochs = min(search_epochs, limit)
    at_a_time = _at_a_time(spec, trials, machine)
    in_a_row = None
    if at_a_time:
        rounds = math.ceil(num_finalists / at_a_time)
        longest = min(search_epochs, spec.train.epochs)
        in_a_row = max(search_epochs / at_a_time, longest) + rounds * spec.train.epochs
    return SearchPlan(
        keys={path: over_text(over) for path, over in search.space.items()},
        algorithm=search.algorithm.kind,
        scheduler=search.scheduler.kind,
        rungs=_rungs(search),
        evaluations=evaluations,
        combinations=combinations,
        trials=trials,
        finalists=num_finalists,
        at_a_time=at_a_time,
        search_epochs=search_epochs,
        finalist_epochs=float(num_finalists * spec.train.epochs),
        epochs_are_most=isinstance(search.scheduler, MedianStopping) or search.patience is not None,
        epochs_in_a_row=in_a_row,
    )


def check_search(
    spec: JobSpec, plan: SearchPlan, totals: Totals, machine: Machine | None
) -> Iterator[Finding]:
    """What a search is going to do, and whether its scheduler can do its part."""
    for path, text in plan.keys.items():
        yield ok("search.space", f"{path}: {text}")
    yield ok("search", _trials_text(spec, plan))
    yield from _check_grid(spec, plan)
    yield from _check_rungs(spec, plan, totals)
    yield from _check_concurrency(spec, plan, machine)
    if plan.at_a_time != 0:  # else `check_workers` refuses it
        yield ok("search", _time_text(plan))


def _check_grid(spec: JobSpec, plan: SearchPlan) -> Iterator[Finding]:
    """Whether all combinations are tried."""
    wanted = spec.search.trials if spec.search is not None else 0
    if plan.combinations is not None and wanted < plan.combinations:
        yield warning(
            "search.trials",
            f"search.trials is {wanted}, but the grid has {plan.combinations:,} combinations, of "
            f"which {plan.combinations - wanted:,} are not tried",
            f"remove search.trials, or set it to {plan.combinations}",
        )


def _check_concurrency(
    spec: JobSpec, plan: SearchPlan, machine: Machine | None
) -> Iterator[Finding]:
    """How many trials run at a time on this machine, with the sum."""
    workers, number = spec.workers, plan.at_a_time
    held = [_counted(workers.cpus, "core")]
    share = spec.search and spec.search.gpu_share
    if workers.gpus:
        held.append("a GPU" if share is None else f"{share:g} of a GPU")
    if workers.memory_gib:
        held.append(format_bytes(int(workers.memory_gib * 2**30)))
    each = f"{_counted(workers.count, 'worker')} with {_listed(held)}"
    if machine is None or number is None:
        yield not_checked(
            "search",
            f"how many trials, each of {each}, run at a time: the cluster was not asked",
        )
        return
    shown = max(1, number)
    sums = [f"{shown * workers.count * workers.cpus} of this machine's {machine.cores} cores"]
    if workers.gpus:
        sums.append(f"{shown * spec.gpus_held:g} of its {machine.gpus} GPUs")
    if workers.memory_gib:
        need = format_bytes(shown * workers.count * workers.memory_gib * 2**30)
        sums.append(f"{need} of its {format_bytes(machine.memory_bytes)} free")
    if number:  # else `check_workers` says so
        text = f"{_counted(number, 'trial')} at a time, each of {each}: {', '.join(sums)}"
        yield ok("search", text)


def _num_configurations(search: Search, combinations: int | None) -> int:
    """Those of the search; a grid may have fewer combinations than are asked for."""
    spare = 0 if combinations is None else max(0, search.trials - combinations)
    return search.configurations - spare


def _rungs(search: Search) -> tuple[float, ...]:
    match search.scheduler:
        case ASHA() | Hyperband() as halving:
            return rung_fractions(halving)
        case MedianStopping(first=first):
            return (first, 1.0)
        case PBT(every=every) | PB2(every=every):
            rounds = math.ceil(1 / every - _CLOSE)
            return (*(every * number for number in range(1, rounds)), 1.0)
        case _:
            return (1.0,)


def _num_budgets(search: Search, trials: int, evaluations: int | None) -> float:
    """Full budgets that the trials take together, if as many go on as the scheduler means to."""
    match search.scheduler:
        case ASHA() as halving:
            eta = halving.reduction_factor
            return _halved(trials, _rungs(search), eta, evaluations)
        case Hyperband() as halving:
            eta = halving.reduction_factor
            total, left = 0.0, trials
            for bracket in cycle(bracket_plans(halving)):
                if left <= 0:
                    break
                number = min(left, bracket.num_trials)
                total += _halved(number, bracket.fractions, eta, evaluations)
                left -= number
            return total
        case _:
            return float(trials)


def _halved(
    trials: int, rungs: tuple[float, ...], reduction_factor: int, evaluations: int | None
) -> float:
    """Full budgets of successive halving, of which at least one trial comes to each rung."""
    total, before = 0.0, 0.0
    for number, rung in enumerate(rungs):
        reached = _evaluation_at(rung, evaluations) / evaluations if evaluations else rung
        total += max(1.0, trials / reduction_factor**number) * (reached - before)
        before = reached
    return total


def _evaluation_at(rung: float, evaluations: int) -> int:
    """The first evaluation, from 1, at or past a fraction of the budget."""
    return max(1, math.ceil(rung * evaluations - _CLOSE))


def _fewest_evaluations(spec: JobSpec, space: Space, totals: Totals) -> int | None:
    """Of a trial with its full budget, where the largest batches leave the fewest steps."""
    steps = _fewest_steps(spec, space, totals)
    if steps is None:
        return None
    in_all, each_epoch = steps
    return math.ceil(in_all / (spec.train.evaluate_every_steps or each_epoch))


def _fewest_steps(spec: JobSpec, space: Space, totals: Totals) -> tuple[int, int] | None:
    """(steps in all, steps of an epoch) of such a trial."""
    if not totals.rows:
        return None
    ends = {key.path: _ends(key.over) for key in space.keys}
    batch = max(ends.get("batching.global_batch_size", (0, spec.batching.global_batch_size)))
    epochs = min(ends.get("train.epochs", (spec.train.epochs,)))
    each = math.ceil(totals.rows / max(1, batch))
    return int(each * epochs), each


def _ends(over: Range | Choices) -> tuple[Any, ...]:
    return over.values if isinstance(over, Choices) else over.ends


def _check_rungs(spec: JobSpec, plan: SearchPlan, totals: Totals) -> Iterator[Finding]:
    """A trial is compared at evaluations: rungs that fall on one evaluation are one rung."""
    if plan.evaluations is None or len(plan.rungs) == 1:
        return
    at = [_evaluation_at(rung, plan.evaluations) for rung in plan.rungs]
    where = f"{plan.scheduler} compares trials at {_percents(plan.rungs)} of their budget"
    if len(set(at)) == len(at):
        yield ok(
            "search.scheduler",
            f"{where}: after {_listed([str(n) for n in at])} of {plan.evaluations} evaluations",
        )
        return
    steps = _fewest_steps(spec, space_of(spec), totals)
    assert steps is not None
    every = max(1, int(min(_gaps(plan.rungs)) * steps[0] + _CLOSE))
    given = spec.train.evaluate_every_steps
    hint = f"set train.evaluate_every_steps to {every}" + (" or less" if every > 1 else "")
    if given is not None and given <= every:
        hint = "raise train.epochs, or compare trials at fewer places"
    yield warning(
        "search.scheduler",
        f"{where}, but a trial is evaluated {_counted(plan.evaluations, 'time')} only, so that it "
        f"is compared at {_counted(len(set(at)), 'evaluation')} instead of {len(at)}",
        hint,
    )


def _gaps(rungs: tuple[float, ...]) -> Iterator[float]:
    before = 0.0
    for rung in rungs:
        yield rung - before
        before = rung


def _at_a_time(spec: JobSpec, trials: int, machine: Machine | None) -> int | None:
    """None where it is not this machine that they run on."""
    return None if machine is None else min(trials, trials_at_once(spec, machine))


def _trials_text(spec: JobSpec, plan: SearchPlan) -> str:
    """`64 trials, algorithm tpe, scheduler asha: about 70 epochs; then at most 12 runs of finalists
    on the full budget: 36 epochs more, about 106 in all`."""
    about = _about(plan)
    text = f"{_counted(plan.trials, 'trial')}, algorithm {plan.algorithm}"
    text += f", scheduler {plan.scheduler}: {about} {plan.search_epochs:.3g} epochs"
    if not plan.finalists:
        return text
    budget = spec.search and spec.search.budget
    is_bounded = budget and any(limit is not None for limit in budget.model_dump().values())
    return (
        f"{text}; then at most {_counted(plan.finalists, 'run')} of finalists on the full budget: "
        f"{plan.finalist_epochs:.3g} epochs more"
        + (", which search.budget does not bound" if is_bounded else "")
        + f", {about} {plan.search_epochs + plan.finalist_epochs:.3g} in all"
    )


def _time_text(plan: SearchPlan) -> str:
    """`takes about as long as 14 epochs of the job one after the other, at 8 trials at a time`, as
    the seconds of an epoch are not known before one has been trained."""
    epochs, at_a_time = plan.epochs_in_a_row, "divided by the number of trials at a time"
    if epochs is None or plan.at_a_time is None:
        epochs = plan.search_epochs + plan.finalist_epochs
    else:
        at_a_time = f"at {_counted(plan.at_a_time, 'trial')} at a time"
    return (
        f"takes {'at most ' if plan.epochs_are_most else ''}about as long as {epochs:.3g} epochs "
        f"of the job one after the other, {at_a_time}; shoal status tells the time that is left "
        "once a trial has ended"
    )


def _about(plan: SearchPlan) -> str:
    return "at most" if plan.epochs_are_most else "about"


def _percents(shares: tuple[float, ...]) -> str:
    return _listed([f"{share:.0%}" for share in shares])


def _listed(texts: list[str]) -> str:
    """`1, 2 and 9`; of many, the first and the last."""
    if len(texts) > 6:
        texts = [*texts[:3], "...", texts[-1]]
        return ", ".join(texts)
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")
