"""Changes of training texts: what each does, how often, and that a text's own key decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.errors import SpecError
from jobs.spec import TextAugment
from tests.scene import Scene
from tests.tiny import tiny_tokenizer
from trainers.data.items import Ragged
from trainers.data.partition import ItemKeys
from trainers.tasks.synonyms import parse_synonyms, read_synonyms
from trainers.tasks.text_augment import TextAugmenter
from trainers.tasks.text_classification import load_tokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (*SPECIAL, *(f"w{n}" for n in range(40)), "##ing", "##ed", "big", "large", "very")
UNK, CLS, SEP = 1, 2, 3
ING, ED = 45, 46
BIG, LARGE, VERY = 47, 48, 49


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), words=WORDS))


def texts(count: int, words: int = 20) -> list[list[int]]:
    """Words of one token and of two, between [CLS] and [SEP]; all words of a text differ."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        text: list[int] = [CLS]
        for word in rng.permutation(40)[:words].tolist():
            text += [5 + word] + ([ING] if word % 3 == 0 else [])
        made.append([*text, SEP])
    return made


def ragged(lists: list[list[int]]) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in lists])])
    return Ragged(np.array([i for one in lists for i in one], dtype=np.int32), offsets)


def lists(tokens: Ragged) -> list[list[int]]:
    ends = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [tokens.values[a:b].tolist() for a, b in ends]


def changed(
    tokenizer: Any,
    given: list[list[int]],
    *,
    first: int = 0,
    epoch: int = 0,
    seed: int = 1,
    others: dict[str, list[str]] | None = None,
    max_tokens: int = 64,
    **changes: Any,
) -> list[list[int]]:
    spec = TextAugment(**changes)
    augmenter = TextAugmenter(spec, tokenizer, max_tokens=max_tokens, synonyms=others or {})
    keys = ItemKeys(seed, epoch, np.arange(first, first + len(given)))
    result = augmenter(ragged(given), keys)
    assert result.values.dtype == np.int32
    return lists(result)


def words_of(text: list[int]) -> list[tuple[int, ...]]:
    words: list[tuple[int, ...]] = []
    for token in text:
        if token in (ING, ED):
            words[-1] += (token,)
        else:
            words.append((token,))
    return words


def test_words_are_left_out_whole_and_about_as_often_as_was_said(tokenizer: Any) -> None:
    given = texts(200)
    kept = changed(tokenizer, given, delete=0.3)
    for text, own in zip(kept, given, strict=True):
        assert text[0] == CLS
        assert text[-1] == SEP
        left = iter(words_of(own))
        assert all(word in left for word in words_of(text)), "another word, or another order"
    share = sum(len(words_of(t)) for t in kept) / sum(len(words_of(t)) for t in given)
    assert share == pytest.approx((20 * 0.7 + 2) / 22, abs=0.02)


def test_a_word_stays_of_each_text(tokenizer: Any) -> None:
    kept = changed(tokenizer, [*texts(50, words=2), [CLS, SEP]], delete=0.999)
    assert {len(words_of(text)) for text in kept[:-1]} == {3}
    assert kept[-1] == [CLS, SEP]


def test_words_change_places(tokenizer: Any) -> None:
    given = texts(50)
    swapped = changed(tokenizer, given, swap=0.2)
    assert [sorted(words_of(t)) for t in swapped] == [sorted(words_of(t)) for t in given]
    assert all((t[0], t[-1]) == (CLS, SEP) for t in swapped)
    assert sum(a != b for a, b in zip(swapped, given, strict=True)) > 45


def test_words_become_unknown(tokenizer: Any) -> None:
    given = texts(200)
    dropped = changed(tokenizer, given, word_dropout=0.1)
    for text, own in zip(dropped, given, strict=True):
        pairs = list(zip(words_of(text), words_of(own), strict=True))
        assert all(new in (old, (UNK,)) for new, old in pairs)
    unknown = sum(text.count(UNK) for text in dropped) / (200 * 20)
    assert unknown == pytest.approx(0.1, abs=0.02)


def test_synonyms_are_put_in_and_a_text_that_became_too_long_stays(tokenizer: Any) -> None:
    given, parts = [[CLS, BIG, 5, SEP]] * 100, {"synonyms": 0.5, "synonyms_file": "words.txt"}
    others = {"big": ["large", "very large"], "w1": ["nosuchword"]}
    found = changed(tokenizer, given, others=others, **parts)
    assert {tuple(text) for text in found} == {
        (CLS, BIG, 5, SEP),
        (CLS, LARGE, 5, SEP),
        (CLS, VERY, LARGE, 5, SEP),
    }
    short = changed(tokenizer, given, others=others, max_tokens=4, **parts)
    assert {tuple(text) for text in short} == {(CLS, BIG, 5, SEP), (CLS, LARGE, 5, SEP)}


@pytest.mark.parametrize(
    "changes", [{"delete": 0.3}, {"swap": 0.3}, {"word_dropout": 0.3}], ids=lambda c: next(iter(c))
)
def test_a_text_is_changed_by_its_own_key_alone(tokenizer: Any, changes: dict[str, float]) -> None:
    given = texts(12)
    together = changed(tokenizer, given, first=100, **changes)
    apart = [changed(tokenizer, [t], first=100 + n, **changes)[0] for n, t in enumerate(given)]
    assert together == apart
    assert changed(tokenizer, given, first=100, epoch=1, **changes) != together
    assert changed(tokenizer, given, first=100, seed=2, **changes) != together
    assert changed(tokenizer, given, first=101, **changes) != together


def test_synonyms_are_read_in_both_formats() -> None:
    lines = parse_synonyms(b"# words\nbig, large , huge\nbig,grand # more\n\n")
    assert lines["big"] == ["large", "huge", "grand"]
    assert lines["large"] == ["big", "huge"]
    thesaurus = parse_synonyms(
        b"UTF-8\nbig|2\n(adj)|large|huge (similar term)\n(adj)|large|grown\nsmall|1\n(adj)|little\n"
    )
    assert thesaurus == {"big": ["large", "huge", "grown"], "small": ["little"]}


def test_a_file_of_synonyms_that_is_not_there_is_told(scene: Scene, tmp_path: Path) -> None:
    augment = {"synonyms": 0.1, "synonyms_file": str(tmp_path / "none.txt")}
    with pytest.raises(SpecError, match="cannot be read"):
        read_synonyms(scene.job(task={"augment": augment}))
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(SpecError, match="has no words that mean the same"):
        read_synonyms(scene.job(task={"augment": augment}))
