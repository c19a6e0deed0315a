"""What a trial's evaluation is worth."""

from __future__ import annotations

import math

from jobs.search_spec import Search
from jobs.study.events import Reported

WORST = -math.inf
"""The score of a trial that has failed, and of an evaluation that is no finite number."""


def score_of(reported: Reported, search: Search) -> float:
    """The score that counts after an evaluation; larger is better, whatever `search.mode` is."""
    value = reported.best if search.score == "best" else reported.value
    if value is None or not math.isfinite(value):
        return WORST
    return value if search.mode == "max" else -value
