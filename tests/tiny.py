"""A tiny pretrained model, tiny learnable data sets, and a job for them: real, and made in seconds.

tiny_model(folder)                  a BERT with a tokenizer, as save_pretrained writes it
tiny_reviews(uri, rows=...)         train, validation and test sets through `shoal prepare`
tiny_job(model, data, store)        a JobSpec over both
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.parse import parse_spec
from jobs.spec import JobSpec

LABELS = ("negative", "positive")
WORDS = {
    "negative": tuple(f"bad{n}" for n in range(30)),
    "positive": tuple(f"good{n}" for n in range(30)),
    "neutral": tuple(f"word{n}" for n in range(135)),
}
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIAL_TOKENS, *(word for words in WORDS.values() for word in words))
"""200 tokens: each word of the data sets is one."""
MAX_TOKENS = 32


def tiny_model(
    folder: Path, *, layers: int = 2, hidden: int = 32, dropout: float = 0.1, seed: int = 0
) -> Path:
    """An encoder without a head, weights drawn from `seed`, and its tokenizer; the folder.

    One layer has about 12 * hidden ** 2 parameters.
    """
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=4 * hidden,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def tiny_tokenizer(folder: Path, *, words: Sequence[str] = VOCABULARY) -> Path:
    """tokenizer.json and tokenizer_config.json: one token a word, [CLS] before and [SEP] after."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    return folder


def review_rows(
    rows: int, *, seed: int = 0, labels: Sequence[str] = LABELS, first: int = 0
) -> list[dict[str, Any]]:
    """`text`, `label` and `number`: 2 to 20 neutral words and 1 to 3 that tell the label.

    Labels alternate, so that every class has its share of any rows.
    """
    rng = np.random.default_rng(seed)
    result = []
    for number in range(first, first + rows):
        place = number % len(labels)
        words = rng.choice(WORDS["neutral"], rng.integers(2, 21)).tolist()
        telling = WORDS[LABELS[place % len(LABELS)]]
        for word in rng.choice(telling, rng.integers(1, 4)).tolist():
            words.insert(int(rng.integers(0, len(words) + 1)), word)
        result.append({"text": " ".join(words), "label": labels[place], "number": number})
    return result


def prepare_rows(
    uri: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    rows_per_group: int,
    rows_per_shard: int | None = None,
    **options: Any,
) -> str:
    """The rows as one data set at `uri`, in their order; `options` are those of PrepareOptions.

    `rows_per_shard` is met about, as shards are cut by bytes; None: one shard.
    """
    from trainers.data.prepare import prepare
    from trainers.data.prepare_plan import PrepareOptions
    from trainers.data.shards import Sizes

    mean_bytes = sum(len(json.dumps(row)) for row in rows) // len(rows)
    shard_bytes = mean_bytes * rows_per_shard if rows_per_shard else 2**30
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "rows.jsonl")
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        prepare(
            PrepareOptions(
                source=str(source),
                to=uri,
                sizes=Sizes(rows_per_group=rows_per_group, shard_bytes=shard_bytes),
                processes=1,
                **options,
            )
        )
    return uri


def tiny_reviews(
    store_uri: str,
    *,
    rows: int,
    rows_per_group: int,
    rows_per_shard: int | None = None,
    held_out: int | None = None,
    seed: int = 0,
    labels: Sequence[str] = LABELS,
    **options: Any,
) -> dict[str, str]:
    """URIs of a train set of `rows` rows and of a validation and a test set of `held_out` each.

    `held_out` is a quarter of `rows` where it is None. The sets lie in the folders train,
    validation and test of `store_uri`; a linear model on their words learns them.
    """
    held_out = max(2, rows // 4) if held_out is None else held_out
    sizes = {"train": rows, "validation": held_out, "test": held_out}
    return {
        name: prepare_rows(
            f"{store_uri.rstrip('/')}/{name}",
            review_rows(size, seed=seed + 1000 * place, labels=labels),
            rows_per_group=rows_per_group,
            rows_per_shard=rows_per_shard,
            **options,
        )
        for place, (name, size) in enumerate(sizes.items())
    }


def tiny_tree(
    model: Path | str, data: Mapping[str, Any], store_uri: str, /, **parts: Any
) -> dict[str, Any]:
    """The job file as a tree; see `tiny_job`."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "task": {"labels": list(LABELS), "max_tokens": MAX_TOKENS},
        "model": {"source": str(model)},
        "data": {**data, "stream_memory": "64 MiB", "cache_gib": 0.05},
        # Few micro-batches. Measured, they and the last bits could differ from run to run.
        "batching": {
            "global_batch_size": 8,
            "max_tokens_per_microbatch": 256,
            "launch_tokens": 10_000,
        },
        "optimizer": {"learning_rate": 3e-3},
        "train": {"epochs": 2, "log_every_steps": 1},
        "checkpoint": {"every_steps": 5},
        "workers": {"count": 1},
        "store": store_uri,
        "tracking": [],
    }
    for part, changes in parts.items():
        if isinstance(changes, Mapping) and isinstance(tree.get(part), dict):
            tree[part] = {**tree[part], **changes}
        else:
            tree[part] = changes
    return tree


def tiny_job(
    model: Path | str, data: Mapping[str, Any], store_uri: str, /, **parts: Any
) -> JobSpec:
    """A job that trains `model` on `data` (URIs by part) with its runs in `store_uri`.

    `parts` change it: keys of a group are merged into the group, as in
    tiny_job(..., optimizer={"schedule": "constant"}, workers={"count": 2}, name="other").
    """
    return parse_spec(tiny_tree(model, data, store_uri, **parts), where="tiny job")
