"""Changes of training texts, word by word, on their tokens: so they are the same for texts that
were tokenized when they were prepared.

A word is a token with those that continue it. What happens to it is a pure function of seed, epoch,
position of its text in the epoch and its place in the text: a resume, and any number of workers,
see the same. Synonyms are put in, then words change places, then words are left out or made
unknown, as "EDA" (Wei and Zou, 2019) and word dropout (Bowman et al., 2016) have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.errors import Problem, SpecError
from jobs.spec import TextAugment
from trainers.data.items import Ragged
from trainers.data.partition import ItemKeys, evenly, item_words

_SYNONYM, _WHICH, _SWAP, _WITH, _DELETE, _UNKNOWN = range(6)
"""What a random word decides."""
_BYTE_SPACE, _PIECE_SPACE = "\u0120", "\u2581"
_MARKED_SHARE = 0.1

IntArray = npt.NDArray[np.int64]


class TextAugmenter:
    """Changes texts as a job asks for it, with the tokens of one tokenizer."""

    def __init__(
        self,
        spec: TextAugment,
        tokenizer: Any,
        *,
        max_tokens: int,
        synonyms: Mapping[str, Sequence[str]],
    ) -> None:
        """`synonyms`: other words for a word. Raises SpecError where the tokenizer does not tell
        where words begin, or has no unknown token."""
        self._spec = spec
        self._max_tokens = max_tokens
        self._begins = _begins_word(tokenizer)
        self._is_special = np.zeros(len(self._begins), dtype=bool)
        self._is_special[tokenizer.all_special_ids] = True
        unknown = tokenizer.unk_token_id
        unknown = tokenizer.mask_token_id if unknown is None else unknown
        if spec.word_dropout and unknown is None:
            raise SpecError(
                Problem(
                    "task.augment.word_dropout is given, but the tokenizer has no unknown "
                    "token and no mask",
                    "remove task.augment.word_dropout, or use task.augment.delete",
                )
            )
        self._extra = [np.array([unknown or 0], dtype=np.int64)]
        """Tokens that texts do not hold themselves, one after the other: first the unknown one."""
        self._others = self._tokens_of(synonyms, tokenizer) if spec.synonyms else {}
        self._extra_tokens = np.concatenate(self._extra)

    def __call__(self, tokens: Ragged, keys: ItemKeys) -> Ragged:
        """The texts of the items at `keys`, changed; each keeps a word at least, and no more than
        max_tokens."""
        spec, words = self._spec, _Words(tokens, self._begins, self._is_special)
        changed = words
        if spec.synonyms:
            changed = self._with_synonyms(words, keys)
        if spec.swap:
            changed = changed.in_order(self._swapped(words, keys))
        keep = np.ones(len(words), dtype=bool)
        if spec.delete:
            keep = self._kept(words, keys)
        if spec.word_dropout:
            hit = words.drawn(keys, _UNKNOWN) < spec.word_dropout
            hit &= ~words.special
            changed = changed.replaced(hit, words.extra_start, np.int64(1))
        return changed.joined(keep, self._extra_tokens, dtype=tokens.values.dtype)

    # ------------------------------------------------------------------------------ each change

    def _with_synonyms(self, words: _Words, keys: ItemKeys) -> _Words:
        hit = words.drawn(keys, _SYNONYM) < self._spec.synonyms
        wanted = np.flatnonzero(hit & ~words.special)
        which = words.drawn(keys, _WHICH)
        starts, lengths = words.starts.copy(), words.lengths.copy()
        for word in wanted.tolist():
            others = self._others.get(words.text(word))
            if others is not None:
                starts[word], lengths[word] = others[int(which[word] * len(others))]
                starts[word] += words.extra_start
        changed = words.with_content(starts, lengths)
        # A text that became too long keeps its own words.
        sizes = np.bincount(words.item, weights=changed.lengths, minlength=words.num_items)
        keeps = sizes[words.item] > self._max_tokens
        changed.starts[keeps], changed.lengths[keeps] = words.starts[keeps], words.lengths[keeps]
        return changed

    def _swapped(self, words: _Words, keys: ItemKeys) -> IntArray:
        """The word at each place."""
        order = np.arange(len(words), dtype=np.int64)
        plain = np.flatnonzero(~words.special)
        firsts = np.searchsorted(words.item[plain], np.arange(words.num_items + 1))
        wanted = (words.drawn(keys, _SWAP) < self._spec.swap) & ~words.special
        other = words.drawn(keys, _WITH)
        for word in np.flatnonzero(wanted).tolist():
            low, high = firsts[words.item[word]], firsts[words.item[word] + 1]
            with_word = int(plain[low + int(other[word] * (high - low))])
            order[word], order[with_word] = order[with_word], order[word]
        return order

    def _kept(self, words: _Words, keys: ItemKeys) -> npt.NDArray[np.bool_]:
        drawn = words.drawn(keys, _DELETE)
        drawn[words.special] = 1.0
        plain = ~words.special
        # The word that was nearest to staying stays, where all would be left out.
        most = np.zeros(words.num_items)
        np.maximum.at(most, words.item[plain], drawn[plain])
        keep: npt.NDArray[np.bool_] = (drawn >= self._spec.delete) | (drawn == most[words.item])
        return keep

    def _tokens_of(
        self, synonyms: Mapping[str, Sequence[str]], tokenizer: Any
    ) -> dict[tuple[int, ...], list[tuple[int, int]]]:
        """By the tokens of a word: where in the extra tokens its synonyms begin, and how many
        tokens they have."""
        spoken = sorted({*synonyms, *(other for others in synonyms.values() for other in others)})
        if not spoken:
            return {}
        # Byte-level BPE tells a word inside a text by the space before it.
        vocabulary = map(str, tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        before = " " if any(token.startswith(_BYTE_SPACE) for token in vocabulary) else ""
        given = [before + word for word in spoken]
        encoded = tokenizer(given, add_special_tokens=False)["input_ids"]
        tokens = {word: tuple(ids) for word, ids in zip(spoken, encoded, strict=True)}
        unknown = tokenizer.unk_token_id
        found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        place = 1
        for word, others in synonyms.items():
            for other in others:
                ids = tokens[other]
                if ids and unknown not in ids and unknown not in tokens[word]:
                    found.setdefault(tokens[word], []).append((place, len(ids)))
                    self._extra.append(np.array(ids, dtype=np.int64))
                    place += len(ids)
        return found


class _Words:
    """The words of some texts: slices of their tokens, and of tokens that follow them."""

    def __init__(
        self,
        tokens: Ragged,
        begins: npt.NDArray[np.bool_],
        is_special: npt.NDArray[np.bool_],
    ) -> None:
        values = np.asarray(tokens.values, dtype=np.int64)
        first = np.zeros(len(values), dtype=bool)
        first[tokens.offsets[:-1][np.diff(tokens.offsets) > 0]] = True
        special = is_special[values]
        after_special = np.concatenate([[False], special[:-1]]) if len(values) else special
        self.starts = np.flatnonzero(first | begins[values] | special | after_special)
        self.lengths = np.diff(np.append(self.starts, len(values)))
        self.num_items = len(tokens)
        self.item = np.searchsorted(tokens.offsets, self.starts, side="right") - 1
        self.special = special[self.starts]
        self.extra_start = len(values)
        self._values = values
        firsts = np.searchsorted(self.item, np.arange(self.num_items))
        self._place = np.arange(len(self.starts)) - firsts[self.item]

    def __len__(self) -> int:
        return len(self.item)

    def text(self, word: int) -> tuple[int, ...]:
        start = int(self.starts[word])
        return tuple(self._values[start : start + int(self.lengths[word])].tolist())

    def drawn(self, keys: ItemKeys, purpose: int) -> npt.NDArray[np.float64]:
        """A number in [0, 1) for each word."""
        words = item_words(keys, item=self.item, place=self._place, purpose=purpose)
        return evenly(words)

    def with_content(self, starts: IntArray, lengths: IntArray) -> _Words:
        other = object.__new__(_Words)
        other.__dict__.update(self.__dict__)
        other.starts, other.lengths = starts, lengths
        return other

    def in_order(self, order: IntArray) -> _Words:
        return self.with_content(self.starts[order], self.lengths[order])

    def replaced(self, hit: npt.NDArray[np.bool_], start: int, length: np.int64) -> _Words:
        return self.with_content(
            np.where(hit, start, self.starts), np.where(hit, length, self.lengths)
        )

    def joined(
        self, keep: npt.NDArray[np.bool_], extra: IntArray, *, dtype: npt.DTypeLike
    ) -> Ragged:
        """The texts that the kept words make."""
        starts, lengths = self.starts[keep], self.lengths[keep]
        sizes = np.bincount(self.item[keep], weights=lengths, minlength=self.num_items)
        offsets = np.zeros(self.num_items + 1, dtype=np.int64)
        np.cumsum(sizes.astype(np.int64), out=offsets[1:])
        begin = np.cumsum(lengths) - lengths
        places = np.arange(int(offsets[-1])) + np.repeat(starts - begin, lengths)
        return Ragged(np.concatenate([self._values, extra])[places].astype(dtype), offsets)


def _begins_word(tokenizer: Any) -> npt.NDArray[np.bool_]:
    """Whether each token of the vocabulary begins a word.

    By the marks of WordPiece (## where it goes on), SentencePiece and byte-level BPE (a space
    before the word); a vocabulary without any is taken for one of whole words.
    """
    tokens = list(map(str, tokenizer.convert_ids_to_tokens(range(len(tokenizer)))))
    spaced = np.array([token.startswith((_BYTE_SPACE, _PIECE_SPACE)) for token in tokens])
    if spaced.mean() > _MARKED_SHARE:
        return spaced
    return np.array([not token.startswith("##") for token in tokens])
