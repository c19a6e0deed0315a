"""Tokenizers as values: what a data set was tokenized with, and the digest by which it is known."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.storage import is_s3, open_store
from jobs.errors import DataError, Problem
from jobs.spec import StoreAccess
from trainers.data.index import TokenizerRecord

TOKEN_COLUMN = "input_ids"  # noqa: S105 - the name of a column

_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_TEXTS_AT_A_TIME = 4096


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of a tokenizer's serialised backend: 64 hexadecimal digits.

    Takes a fast tokenizer of transformers or a `tokenizers.Tokenizer`. Truncation and padding are
    left out, as a call of the tokenizer changes them. Raises DataError for one without a backend.
    """
    return _digest_of_json(_backend(tokenizer).to_str())


@dataclass(frozen=True)
class Tokenization:
    """How texts become token ids; pickles, and needs only the package `tokenizers` to work."""

    backend: str
    """The serialised tokenizer, set to cut off what is longer than `record.max_tokens`."""
    record: TokenizerRecord

    def encode(self, texts: pa.ChunkedArray) -> pa.Array:
        """Token ids of each text with special tokens; list<int32>, without nulls.

        The ids are those that transformers gives for truncation=True, max_length=max_tokens.
        """
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.backend)
        values: list[npt.NDArray[np.int32]] = []
        lengths: list[int] = []
        for start in range(0, len(texts), _TEXTS_AT_A_TIME):
            batch = texts.slice(start, _TEXTS_AT_A_TIME).to_pylist()
            for encoding in tokenizer.encode_batch_fast(batch):
                ids = np.array(encoding.ids, np.int32)
                values.append(ids)
                lengths.append(len(ids))
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        flat = np.concatenate(values) if values else np.empty(0, np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def load_tokenization(source: str, *, max_tokens: int, access: StoreAccess) -> Tokenization:
    """The tokenizer of a local folder, of a folder in a store, or of a name on the hub.

    Raises DataError where there is none that can be used.
    """
    tokenizer = _load(source, access)
    backend = _backend(tokenizer)
    digest = tokenizer_digest(tokenizer)
    special = backend.num_special_tokens_to_add(False)
    if max_tokens <= special:
        raise DataError(
            Problem(
                f"--max-tokens is {max_tokens}, but the tokenizer of {source} adds {special} "
                "tokens to every text",
                f"write --max-tokens {special + 1}, or more",
            )
        )
    backend.no_padding()
    backend.enable_truncation(
        max_tokens, direction=getattr(tokenizer, "truncation_side", None) or "right"
    )
    return Tokenization(
        backend=backend.to_str(),
        record=TokenizerRecord(
            digest=digest, source=source, max_tokens=max_tokens, column=TOKEN_COLUMN
        ),
    )


def _load(source: str, access: StoreAccess) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(
            Problem("--tokenizer needs transformers", "run: pip install 'shoal[train]'")
        ) from error
    with tempfile.TemporaryDirectory(prefix="shoal-tokenizer-") as scratch:
        place = source
        if is_s3(source):
            place = scratch
            store = open_store(source, access)
            for head in store.list():
                if "/" not in head.key and head.key.endswith(_TOKENIZER_SUFFIXES):
                    store.download(head.key, Path(scratch, head.key))
        elif Path(source).expanduser().is_dir():
            place = str(Path(source).expanduser())
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, use_fast=True)
            if Path(place).is_dir() and not has_own_files(tokenizer, Path(place)):
                raise FileNotFoundError("it holds no tokenizer.json")
            return tokenizer
        except Exception as error:
            # transformers raises anything here, from OSError to errors of its Rust parser.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise DataError(
                Problem(
                    f"no tokenizer can be loaded from {source}: {reason}",
                    "name a folder that save_pretrained wrote (with tokenizer.json), in a store "
                    "or on this machine, or a model on the Hugging Face hub",
                )
            ) from error


def has_own_files(tokenizer: Any, folder: Path) -> bool:
    """Whether a tokenizer of transformers was made from files of `folder`.

    Without them transformers makes an empty one, to which every word is unknown.
    """
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    return any((folder / name).is_file() for name in names)


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        backend = tokenizer
    if not hasattr(backend, "to_str"):
        raise DataError(
            Problem(
                f"{type(tokenizer).__name__} is no fast tokenizer: it has no digest",
                "use a model that has a tokenizer.json",
            )
        )
    return backend


def _digest_of_json(serialised: str) -> str:
    tree = json.loads(serialised)
    tree["truncation"] = tree["padding"] = None
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
