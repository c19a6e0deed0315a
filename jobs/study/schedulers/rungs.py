"""Fractions of the budget at which trials are compared."""

from __future__ import annotations

from jobs.search_spec import ASHA, Hyperband


def rung_fractions(given: ASHA | Hyperband) -> tuple[float, ...]:
    """The fractions reduction_factor**-k that are not below `first`, the smallest first; 1.0 last.

    Each is the float nearest to its value, as is a number of steps divided by the steps planned: a
    trial that evaluates after a third of its steps has reached the rung at one third.
    """
    eta = given.reduction_factor
    first = 1 / eta**2 if given.first is None else given.first
    fractions = [1.0]
    while (fraction := 1 / eta ** len(fractions)) >= first:
        fractions.append(fraction)
    return tuple(reversed(fractions))
