"""The split of a source into train, validation and test: exact, stratified, from a seed.

    parse_split("train=0.8,validation=0.1,test=0.1") -> what was asked for
    quotas(...)                                      -> rows of each class in each part
    Assigner(...)                                    -> the part of each row, in order of the rows

All but `Assigner` are pure; it holds what is left of the quotas, so that memory depends on the
number of classes alone. The quotas need the number of rows of each class: a first pass counts
them, a second assigns.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from jobs.errors import DataError, Problem, SpecError
from trainers.data.columns import LabelValue

PARTS = ("train", "validation", "test")

_ROWS_AT_A_TIME = 512
_EXAMPLE = "write --split train=0.8,validation=0.1,test=0.1, or --split test=1000"
IntArray = npt.NDArray[np.int64]


def parse_split(text: str) -> dict[str, Fraction | int]:
    """Part -> share of the rows (Fraction) or number of rows (int), in the order of PARTS.

    `0.1` is a share, `1000` a number of rows; `train` gets what is left where it is not named.
    Raises SpecError.
    """
    given: dict[str, Fraction | int] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name not in PARTS:
            near = difflib.get_close_matches(name, PARTS, n=1, cutoff=0.2)
            hint = f"did you mean {near[0]}?" if near else _EXAMPLE
            raise SpecError(
                Problem(f"--split: {name or repr(item)} is none of {', '.join(PARTS)}", hint)
            )
        if name in given:
            raise SpecError(Problem(f"--split: {name} is given twice", _EXAMPLE))
        if not equals or not re.fullmatch(r"\d+|\d*\.\d+", value):
            raise SpecError(
                Problem(
                    f"--split: {name} is {value!r}, but a share such as 0.1 or a number of rows "
                    "such as 1000 is needed",
                    _EXAMPLE,
                )
            )
        given[name] = Fraction(value) if "." in value else int(value)
        if not given[name] > 0 or (isinstance(given[name], Fraction) and given[name] > 1):
            raise SpecError(Problem(f"--split: {name}={value} is not above 0 and up to 1.0"))
    shares = sum((v for v in given.values() if isinstance(v, Fraction)), Fraction(0))
    only_shares = all(isinstance(v, Fraction) for v in given.values())
    if shares > 1 or ("train" in given and only_shares and shares != 1):
        raise SpecError(
            Problem(
                f"--split: the shares add up to {float(shares):g}, not to 1",
                "leave train out to give it what is left",
            )
        )
    return {name: given[name] for name in PARTS if name in given}


def part_sizes(split: Mapping[str, Fraction | int], *, num_rows: int) -> dict[str, int]:
    """Rows of each part; together `num_rows`. Shares are of all rows, rounded by largest remainder.

    Raises DataError where a part would be empty or where the rows do not suffice.
    """
    exact = {name: v * num_rows if isinstance(v, Fraction) else v for name, v in split.items()}
    rest = num_rows - sum(exact.values())
    if "train" not in exact:
        exact = {"train": rest, **exact}
    elif rest != 0:
        raise DataError(
            Problem(
                f"--split: the parts add up to {float(sum(exact.values())):g} rows, the source "
                f"has {num_rows}",
                "leave train out to give it what is left",
            )
        )
    sizes = {name: int(v // 1) for name, v in exact.items()}
    missing = num_rows - sum(sizes.values())
    by_remainder = sorted(sizes, key=lambda name: (sizes[name] - exact[name], PARTS.index(name)))
    for name in by_remainder[:missing]:
        sizes[name] += 1
    empty = [name for name, size in sizes.items() if size < 1]
    if empty:
        raise DataError(
            Problem(
                f"--split: {empty[0]} would get no row of the {num_rows} of the source",
                "ask for a larger share, or for fewer rows in the other parts",
            )
        )
    return sizes


def quotas(counts: Sequence[int], sizes: Sequence[int]) -> IntArray:
    """Rows of each class in each part; shape [classes, parts].

    Row sums are `counts`, column sums are `sizes`, and each number differs from its exact share
    count * size / total by at most one (controlled rounding: the shares rounded down, and what is
    missing of each class given to the parts that miss most, as in Ryser's construction of a
    matrix of zeros and ones from its row and column sums).
    """
    total = sum(sizes)
    if total != sum(counts):
        raise ValueError("classes and parts have different numbers of rows")
    result = np.zeros((len(counts), len(sizes)), np.int64)
    for c, count in enumerate(counts):
        result[c] = [count * size // total for size in sizes]
    missing = (np.array(sizes, np.int64) - result.sum(axis=0)).tolist()
    for c, count in enumerate(counts):
        needed = count - int(result[c].sum())
        remainders = [count * size % total for size in sizes]
        order = sorted(range(len(sizes)), key=lambda p: (-missing[p], -remainders[p], p))
        for part in order[:needed]:
            result[c, part] += 1
            missing[part] -= 1
    return result


class Assigner:
    """Gives each row its part: of the rows of a class, all choices that meet the quotas alike.

    Selection sampling (Fan, Muller and Rezucha, 1962; Knuth's Algorithm S), for several parts at
    once. The draws of a class are keyed by (seed, class, row of the class), so the result does not
    depend on how the rows are batched.
    """

    def __init__(self, values: Sequence[LabelValue], left: IntArray, *, seed: int) -> None:
        """`left[c, p]`: rows of class `values[c]` that part `p` is to get."""
        self._class_of = {value: number for number, value in enumerate(values)}
        self._left = left.copy()
        self._taken = np.zeros(len(values), np.int64)
        self._blocks: dict[int, npt.NDArray[np.uint8]] = {}
        self._seed = seed

    def assign(
        self, codes: npt.NDArray[np.int32], values: Sequence[LabelValue]
    ) -> npt.NDArray[np.uint8]:
        """Parts of the next rows, whose classes are values[codes]; shape [n].

        Raises DataError where there are more rows of a class than were counted.
        """
        parts = np.empty(len(codes), np.uint8)
        order = np.argsort(codes, kind="stable")
        edges = np.searchsorted(codes[order], np.arange(len(values) + 1))
        for code, value in enumerate(values):
            rows = order[edges[code] : edges[code + 1]]
            if len(rows):
                parts[rows] = self._take(self._class_of.get(value), len(rows))
        return parts

    def finish(self) -> None:
        """DataError where there were fewer rows than were counted."""
        if self._left.any() or any(
            self._taken[c] % _ROWS_AT_A_TIME < len(block) and self._taken[c] % _ROWS_AT_A_TIME
            for c, block in self._blocks.items()
        ):
            raise _changed()

    def _take(self, number: int | None, count: int) -> npt.NDArray[np.uint8]:
        if number is None:
            raise _changed()
        pieces = []
        while count:
            inside = int(self._taken[number]) % _ROWS_AT_A_TIME
            if inside == 0:
                self._blocks[number] = self._draw(number)
            piece = self._blocks[number][inside : inside + count]
            if not len(piece):
                raise _changed()
            pieces.append(piece)
            self._taken[number] += len(piece)
            count -= len(piece)
        return np.concatenate(pieces)

    def _draw(self, number: int) -> npt.NDArray[np.uint8]:
        """Parts of the next rows of a class, at most 512 of them; lowers the quotas."""
        left = self._left[number].tolist()
        total = sum(left)
        length = min(total, _ROWS_AT_A_TIME)
        key = np.random.SeedSequence([self._seed, number, int(self._taken[number])])
        rng = np.random.Generator(np.random.Philox(key))
        draws = rng.integers(0, total - np.arange(length)).tolist() if length else []
        block = np.empty(length, np.uint8)
        for i, draw in enumerate(draws):
            part = 0
            while draw >= left[part]:
                draw -= left[part]
                part += 1
            left[part] -= 1
            block[i] = part
        self._left[number] = left
        return block


def _changed() -> DataError:
    return DataError(
        Problem(
            "the source changed between the pass that counted its rows and the one that split them",
            "run the command again once nothing writes to the source",
        )
    )
