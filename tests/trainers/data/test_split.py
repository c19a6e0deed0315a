from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import DataError, SpecError
from trainers.data.split import Assigner, parse_split, part_sizes, quotas


@given(
    counts=st.lists(st.integers(0, 3000), min_size=1, max_size=30).filter(lambda c: sum(c) >= 20),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), (0.34, 0.33, 0.33), (0.95, 0.05)]),
)
def test_every_class_is_within_one_row_of_its_share_and_all_sums_are_exact(
    counts: list[int], shares: tuple[float, ...]
) -> None:
    total = sum(counts)
    sizes = [int(share * total) for share in shares[1:]]
    sizes = [total - sum(sizes), *sizes]
    table = quotas(counts, sizes)
    assert (table >= 0).all()
    assert table.sum(axis=1).tolist() == counts
    assert table.sum(axis=0).tolist() == sizes
    exact = np.outer(counts, sizes) / total
    assert (abs(table - exact) <= 1 + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(
    classes=st.lists(st.integers(0, 4), min_size=10, max_size=2500),
    cuts=st.lists(st.integers(1, 700), min_size=1, max_size=10),
    seed=st.integers(0, 10),
)
def test_assignment_meets_the_quotas_however_rows_are_batched(
    classes: list[int], cuts: list[int], seed: int
) -> None:
    codes = np.array(classes, np.int32)
    values = sorted(set(classes))
    counts = [classes.count(value) for value in values]
    left = quotas(counts, [len(classes) - 5, 3, 2])
    whole = Assigner(values, left, seed=seed)
    parts = whole.assign(codes, [0, 1, 2, 3, 4])
    whole.finish()
    for row, value in enumerate(values):
        of_class = parts[codes == value]
        assert np.bincount(of_class, minlength=3).tolist() == left[row].tolist()
    pieces, start, batched = [], 0, Assigner(values, left, seed=seed)
    for cut in [*cuts, len(classes)]:
        pieces.append(batched.assign(codes[start : start + cut], [0, 1, 2, 3, 4]))
        start += cut
    batched.finish()
    assert np.concatenate(pieces).tolist() == parts.tolist()


def test_every_row_of_a_class_is_as_likely_as_any_other_to_be_in_a_part() -> None:
    codes = np.zeros(600, np.int32)
    hits = np.zeros(600)
    for seed in range(400):
        hits += Assigner(["a"], quotas([600], [450, 150]), seed=seed).assign(codes, ["a"])
    # 400 draws of probability 1/4: mean 100, standard deviation 8.7; five of them either side.
    assert hits.mean() == 100
    assert 56 < hits.min() < hits.max() < 144
    assert 7.5 < hits.std() < 9.9


def test_another_seed_gives_another_split() -> None:
    codes = np.zeros(100, np.int32)
    first, second = (
        Assigner(["a"], quotas([100], [50, 50]), seed=s).assign(codes, ["a"]) for s in (0, 1)
    )
    assert (first != second).any()


def test_a_source_that_changed_between_the_passes_is_refused() -> None:
    left = quotas([10], [5, 5])
    codes = np.zeros(11, np.int32)
    with pytest.raises(DataError, match="changed"):
        Assigner(["a"], left, seed=0).assign(codes, ["a"])
    with pytest.raises(DataError, match="changed"):
        Assigner(["a"], left, seed=0).assign(codes[:5], ["b"])
    short = Assigner(["a"], left, seed=0)
    short.assign(codes[:9], ["a"])
    with pytest.raises(DataError, match="changed"):
        short.finish()


def test_splits_are_shares_or_numbers_of_rows() -> None:
    assert parse_split("test=0.1,train=0.8,validation=0.1") == {
        "train": Fraction(4, 5),
        "validation": Fraction(1, 10),
        "test": Fraction(1, 10),
    }
    assert part_sizes(parse_split("test=1000"), num_rows=10_070) == {"train": 9070, "test": 1000}
    sizes = part_sizes(parse_split("train=0.8,validation=0.1,test=0.1"), num_rows=11)
    assert sizes == {"train": 9, "validation": 1, "test": 1}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("train=0.8,val=0.2", "'?val'? is none of", "validation"),
        ("train=0.8,test=0.1", "add up to 0.9", "leave train out"),
        ("validation=0.6,test=0.6", "add up to 1.2", "leave train out"),
        ("test=ten", "'ten'", "write --split"),
        ("test", "''", "write --split"),
        ("test=0.1,test=0.2", "twice", "write --split"),
        ("test=0", "not above 0", None),
    ],
)
def test_a_wrong_split_is_refused(text: str, message: str, hint: str | None) -> None:
    with pytest.raises(SpecError, match=message) as raised:
        parse_split(text)
    assert (hint or "") in (raised.value.problems[0].hint or "")


@pytest.mark.parametrize(("text", "rows"), [("test=1000", 1000), ("train=5,test=5", 11)])
def test_a_split_that_the_rows_do_not_allow_is_refused(text: str, rows: int) -> None:
    with pytest.raises(DataError):
        part_sizes(parse_split(text), num_rows=rows)
