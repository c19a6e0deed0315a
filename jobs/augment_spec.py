"""The job file's `task.augment`: how training texts are changed, anew in each epoch."""

from __future__ import annotations

from pydantic import model_validator

from jobs.spec_parts import Fraction, SpecPart, Text, UnfitError


class TextAugment(SpecPart):
    """Changes of the words of training texts. What happens to a word is drawn from the seed, the
    epoch and its place, so that a resume sees the same texts; evaluations see them as they are."""

    synonyms: Fraction = 0.0
    """Share of words for which another one of `synonyms_file` is put, where it has some."""
    synonyms_file: Text | None = None
    """Words that mean the same: a local file that all workers have, or s3://...; lines as
    `big, large, huge`, or a thesaurus of LibreOffice (th_en_US_v2.dat)."""
    swap: Fraction = 0.0
    """Share of words that change places with another one of their text."""
    delete: Fraction = 0.0
    """Share of words that are left out; one stays."""
    word_dropout: Fraction = 0.0
    """Share of words in whose place the model gets its token for an unknown word."""

    @model_validator(mode="after")
    def _synonyms_have_a_file(self) -> TextAugment:
        if self.synonyms and self.synonyms_file is None:
            raise UnfitError(
                f"has synonyms {self.synonyms:g}, but no synonyms_file",
                "name a file with lines such as: big, large, huge",
            )
        if self.synonyms_file is not None and not self.synonyms:
            raise UnfitError(
                "has synonyms_file, without effect on synonyms 0",
                "set task.augment.synonyms to 0.1, or remove synonyms_file",
            )
        return self
