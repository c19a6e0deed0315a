"""The model's tokenizer: whether it loads, pads, and is the one of a data set of tokens."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.storage import Store
from jobs.checks.data_sets import DataSetFacts
from jobs.checks.finding import Finding, not_checked, ok, problem, warning
from jobs.errors import DataError, Problem

PART = "model"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
_OTHER_FORMS = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model")
"""From these transformers builds a fast tokenizer when it loads them."""
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", None)
"""Classes of transformers that bring no special tokens of their own."""
_SUBPROCESS_SECONDS = 60.0
_AS_WORKERS_LOAD = """
import json, sys
from pathlib import Path
from trainers.data.tokenizers import tokenizer_digest
from trainers.tasks.text_classification import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]))
print(json.dumps({"digest": tokenizer_digest(tokenizer), "pad_token": tokenizer.pad_token}))
"""


@dataclass(frozen=True, eq=False)
class TokenizerFiles:
    """The tokenizer's files, read."""

    contents: Mapping[str, bytes] = field(repr=False)

    @cached_property
    def as_workers_load(self) -> dict[str, Any] | None:
        """`digest` and `pad_token` as training has them; None where that is not installed here.

        Another process does it: transformers imports torch, which takes seconds. Raises DataError
        where it does not load.
        """
        if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
            return None
        with tempfile.TemporaryDirectory(prefix="shoal-check-") as folder:
            for name, content in self.contents.items():
                Path(folder, name).write_bytes(content)
            done = subprocess.run(  # noqa: S603 - this interpreter, and a folder of our own
                [sys.executable, "-c", _AS_WORKERS_LOAD, folder],
                capture_output=True,
                text=True,
                timeout=_SUBPROCESS_SECONDS,
                check=False,
            )
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise DataError(Problem(f"the model's tokenizer does not load: {why}"))
        loaded: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return loaded


def check_tokenizer(
    shown: str, store: Store, files: Mapping[str, int]
) -> tuple[list[Finding], Any, TokenizerFiles | None]:
    """What there is to say; the `tokenizers.Tokenizer`, where it loads; and its files."""
    if "tokenizer.json" not in files:
        return [_without_json(shown, files)], None, None
    if importlib.util.find_spec("tokenizers") is None:
        reason = f"the tokenizer of {shown}: the package tokenizers is not installed here"
        return [not_checked(PART, reason, 'run: pip install "shoal[train]"')], None, None
    from tokenizers import Tokenizer

    held = TokenizerFiles({name: store.read(name) for name in _FILES if name in files})
    try:
        tokenizer = Tokenizer.from_str(held.contents["tokenizer.json"].decode())
    except Exception as error:
        # Its Rust parser raises plain Exception.
        return (
            [
                problem(
                    PART,
                    f"{shown}/tokenizer.json does not load: {error}",
                    "copy the model's folder again, or write it with save_pretrained",
                )
            ],
            None,
            None,
        )
    findings = [ok(PART, f"its tokenizer loads: {tokenizer.get_vocab_size():,} tokens")]
    return findings + _check_padding(shown, held), tokenizer, held


def _without_json(shown: str, files: Mapping[str, int]) -> Finding:
    others = [name for name in _OTHER_FORMS if name in files]
    if others:
        return not_checked(
            PART,
            f"the tokenizer of {shown}: it has {', '.join(others)} but no tokenizer.json, and is "
            "converted when the run starts",
            "load it with transformers and call save_pretrained on the tokenizer",
        )
    return problem(
        PART,
        f"{shown} has no tokenizer (tokenizer.json is missing)",
        "put tokenizer.json and tokenizer_config.json beside the weights",
    )


def _check_padding(shown: str, held: TokenizerFiles) -> list[Finding]:
    try:
        settings = [
            json.loads(held.contents[name])
            for name in ("tokenizer_config.json", "special_tokens_map.json")
            if name in held.contents
        ]
    except ValueError:
        settings = []
    if any(part.get("pad_token") for part in settings):
        return []
    kind = settings[0].get("tokenizer_class") if settings else None
    if kind in _PLAIN_CLASSES:
        return [_no_padding(shown)]
    try:
        loaded = held.as_workers_load
    except DataError as error:
        return [problem(PART, error.problems[0].message, "copy the model's folder again")]
    if loaded is None:
        return [not_checked(PART, f"whether the tokenizer of {shown} has a padding token")]
    return [] if loaded["pad_token"] else [_no_padding(shown)]


def _no_padding(shown: str) -> Finding:
    return problem(
        PART,
        f"the tokenizer of {shown} has no padding token",
        "set pad_token in the model's tokenizer_config.json",
    )


def check_tokens(
    facts: DataSetFacts, tokenizer: Any, held: TokenizerFiles, *, shown: str, max_tokens: int
) -> list[Finding]:
    """Whether a data set of tokens was made by this tokenizer; else how texts become tokens."""
    record = facts.index.tokenizer
    if record is None:
        return _measure_texts(facts, tokenizer, max_tokens=max_tokens)
    findings = []
    if record.max_tokens != max_tokens:
        findings.append(
            problem(
                facts.part,
                f"{facts.uri} was cut at {record.max_tokens} tokens, but task.max_tokens is "
                f"{max_tokens}",
                f"set task.max_tokens to {record.max_tokens}, or prepare it again with "
                f"--max-tokens {max_tokens}",
            )
        )
    from trainers.data.tokenizers import tokenizer_digest

    if record.digest != tokenizer_digest(tokenizer):
        findings += _compare_as_loaded(facts, held, shown=shown)
    return findings or [ok(facts.part, f"its tokens are those of {shown}")]


def _compare_as_loaded(facts: DataSetFacts, held: TokenizerFiles, *, shown: str) -> list[Finding]:
    """The comparison that counts: transformers may change a tokenizer when it loads it."""
    record = facts.index.tokenizer
    assert record is not None
    try:
        loaded = held.as_workers_load
    except DataError as error:
        return [problem(PART, error.problems[0].message, "copy the model's folder again")]
    if loaded is None:
        return [
            not_checked(
                facts.part,
                f"whether the tokens of {facts.uri} are those of {shown}: transformers is not "
                "installed here",
                'run: pip install "shoal[train]"',
            )
        ]
    if loaded["digest"] == record.digest:
        return [ok(facts.part, f"its tokens are those of {shown}")]
    return [
        problem(
            facts.part,
            f"{facts.uri} was tokenized with {record.source} (digest {record.digest[:12]}), but "
            f"the tokenizer of {shown} is another one (digest {loaded['digest'][:12]})",
            f"prepare it again with --tokenizer {shown}, or without --tokenizer",
        )
    ]


def _measure_texts(facts: DataSetFacts, tokenizer: Any, *, max_tokens: int) -> list[Finding]:
    """How many of the texts that were read are cut off."""
    if not facts.texts:
        return []
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths: Sequence[int] = [
        len(encoding.ids) for encoding in tokenizer.encode_batch(list(facts.texts))
    ]
    cut = sum(length > max_tokens for length in lengths) / len(lengths)
    shown = (
        f"{len(lengths)} texts have {sum(lengths) / len(lengths):.0f} tokens on average, "
        f"{max(lengths)} at most; {cut:.0%} are cut at {max_tokens}"
    )
    if cut > _MUCH_CUT:
        return [
            warning(
                facts.part,
                shown,
                "raise task.max_tokens, if the ends of the texts matter",
            )
        ]
    return [ok(facts.part, shown)]


_MUCH_CUT = 0.25
"""Share of texts that are cut off from which on a warning says so."""
