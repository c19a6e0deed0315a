"""bench/search_chaos.py: what is called right."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from jobs.record import State
from jobs.study.events import Asked, Donor, Reported


def test_triples_tell_clones_apart(bench: Callable[[str], ModuleType]) -> None:
    chaos = bench("search_chaos")
    told = [
        Reported(trial=trial, step=step, fraction=step / 4, epochs=1, value=value, best=value)
        for trial, step, value in ((0, 1, 0.5), (1, 1, 0.6), (1, 2, None))
    ]
    asked = [Asked(trial=0, values={"a": 1}), Asked(trial=1, values={"a": 1})]
    first, second, third = chaos.triples([*asked, *told])
    assert first[0] == second[0]
    assert (second[1:], third[1:]) == ((0.25, 0.6), (0.5, None))
    clone = Asked(trial=1, values={"a": 1}, donor=Donor(trial=0, step=1))
    first, second, _ = chaos.triples([asked[0], clone, *told])
    assert first[0] != second[0]


def test_ends_that_differ_are_counted(bench: Callable[[str], ModuleType]) -> None:
    chaos = bench("search_chaos")
    calm = {0: "stopped", 1: "finished", 2: "paused"}
    assert chaos.other_ends(calm, {0: "stopped", 1: "finished"}) == 1
    assert chaos.other_ends({0: "stopped"}, {0: "finished"}) == 1
    assert chaos.other_ends(calm, calm) == 1, "a trial that has no end"
    assert [state for state in State if chaos.is_end(state)] == [State.SUCCEEDED, State.PRUNED]
