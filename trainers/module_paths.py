"""Names of a model's modules and parameters, as the job file's patterns match them. Needs no torch.

A pattern is a dotted path that matches whole parts: `layer.0` matches `encoder.layer.0.output`, and
not `layer.01`. In a part, * stands for any text and ? for any character.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

_NEAR = 0.65
"""As difflib measures it; 1: equal."""


def is_under(path: str, pattern: str) -> bool:
    """Whether the pattern matches neighbouring parts of the path, wherever they are."""
    parts, wanted = path.split("."), pattern.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(_match(parts[start : start + len(wanted)], wanted) for start in starts)


def ends_with(path: str, pattern: str) -> bool:
    """Whether the pattern matches the last parts of the path."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and _match(parts[-len(wanted) :], wanted)


def _match(parts: list[str], wanted: list[str]) -> bool:
    return all(map(fnmatchcase, parts, wanted))


def nearest(pattern: str, paths: Iterable[str], *, most: int = 3) -> list[str]:
    """Names that were probably meant by a pattern that matches none of the paths, the nearest
    first: as many last parts of them as the pattern has, or a single part."""
    paths = list(paths)
    count = pattern.count(".") + 1
    ends = {".".join(path.split(".")[-count:]) for path in paths}
    parts = {part for path in paths for part in path.split(".") if not part.isdigit()}
    for known in (ends, parts):
        if found := difflib.get_close_matches(pattern, sorted(known), n=most, cutoff=_NEAR):
            return found
    return []
