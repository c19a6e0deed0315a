"""Text classification: one label for each text, with any Hugging Face encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from jobs import spec as job
from jobs.errors import DataError, Problem, SpecError
from trainers.adapters import remember_new
from trainers.classes import class_weights, refuse_other_column
from trainers.data.index import Index
from trainers.data.items import Items, Ragged, numbers_of
from trainers.data.partition import ItemKeys
from trainers.data.tokenizers import has_own_files, tokenizer_digest
from trainers.packing import pack_blocks, packed_tensors, packing_arguments
from trainers.positions import most_tokens
from trainers.tasks.confusion import ConfusionMetrics
from trainers.tasks.padding import padded, tokens_of
from trainers.tasks.synonyms import read_synonyms
from trainers.tasks.task import Batch, Evaluation
from trainers.tasks.text_augment import TextAugmenter

_LOSS_WEIGHT = "loss_weight"
"""Of a batch: what each row counts in training alone."""

_DROPOUT_KEYS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "classifier_dropout_prob",
    "hidden_dropout",
    "attention_dropout",
    "activation_dropout",
    "dropout",
    "seq_classif_dropout",
    "embedding_dropout",
    "embd_pdrop",
    "resid_pdrop",
    "attn_pdrop",
    "mlp_dropout",
)
"""Names under which the configurations of transformers' encoders keep their dropout."""


class TextClassification:
    """Cross-entropy over `labels`, in training with `label_smoothing`; texts are cut at
    `max_tokens`. With `packing` the model's layers compute no padding."""

    def __init__(
        self, spec: job.Task, *, model_folder: Path, index: Index, packing: bool = False
    ) -> None:
        self._spec = spec
        self._index = index
        self._class_weights = _class_weights(spec, index)
        self._augmenter: TextAugmenter | None = None
        self._packing = packing
        self._tokenizer = load_tokenizer(model_folder)
        self._pad_id = self._tokenizer.pad_token_id
        if self._pad_id is None:
            raise SpecError(
                Problem(
                    f"the tokenizer of {spec.kind}'s model has no padding token",
                    "set pad_token in the model's tokenizer_config.json",
                )
            )
        self._pretokenized = self._check_tokenizer(index)
        self.columns: tuple[str, ...] = (
            "input_ids" if self._pretokenized else spec.text,
            spec.label,
        )

    def with_loss_of(self, spec: job.JobSpec) -> TextClassification:
        if spec.task == self._spec and (spec.task.augment is None) == (self._augmenter is None):
            return self
        other = copy.copy(self)
        other._spec = spec.task
        other._class_weights = _class_weights(spec.task, self._index)
        other._augmenter = None
        if spec.task.augment is not None:
            other._augmenter = TextAugmenter(
                spec.task.augment,
                self._tokenizer,
                max_tokens=spec.task.max_tokens,
                synonyms=read_synonyms(spec),
            )
        return other

    def augment(self, items: Items, keys: ItemKeys) -> Items:
        if self._augmenter is None:
            return items
        changed = self._augmenter(tokens_of(items), keys)
        return Items({**items.columns, "input_ids": changed})

    def check_data(self, index: Index) -> None:
        if self._check_tokenizer(index) != self._pretokenized:
            holds, lacks = ("texts", "tokens") if self._pretokenized else ("tokens", "texts")
            raise DataError(
                Problem(
                    f"a data set of the job holds {holds}, but the training set holds {lacks}",
                    "prepare all of them with --tokenizer, or none",
                )
            )

    def _check_tokenizer(self, index: Index) -> bool:
        """Whether the data set holds this tokenizer's tokens; DataError where it holds others."""
        record = index.tokenizer
        if record is None:
            return False
        own = tokenizer_digest(self._tokenizer)
        if record.digest != own:
            raise DataError(
                Problem(
                    f"the data set was tokenized with {record.source} (digest "
                    f"{record.digest[:12]}), but the model's tokenizer is another one (digest "
                    f"{own[:12]})",
                    "prepare it again with --tokenizer naming this model's folder, "
                    "or without --tokenizer",
                )
            )
        if record.max_tokens != self._spec.max_tokens:
            raise DataError(
                Problem(
                    f"the data set was cut at {record.max_tokens} tokens, "
                    f"but task.max_tokens is {self._spec.max_tokens}",
                    f"set task.max_tokens to {record.max_tokens}, or prepare it again with "
                    f"--max-tokens {self._spec.max_tokens}",
                )
            )
        return True

    # ------------------------------------------------------------------------------------ model

    def build_model(self, folder: Path, *, dropout: float | None, seed: int) -> nn.Module:
        labels = self._spec.labels
        try:
            config = AutoConfig.from_pretrained(
                folder,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                problem_type="single_label_classification",
            )
        except (OSError, ValueError, KeyError) as error:
            raise self._no_model(error) from error
        if dropout is not None:
            held = [key for key in _DROPOUT_KEYS if hasattr(config, key)]
            if not held:
                raise SpecError(
                    Problem(
                        f"model.dropout is {dropout}, but a {config.model_type} model has none",
                        "remove model.dropout",
                    )
                )
            for key in held:
                setattr(config, key, dropout)
        limit = most_tokens(
            config.model_type,
            max_position_embeddings=getattr(config, "max_position_embeddings", None),
            pad_token_id=getattr(config, "pad_token_id", None),
        )
        if limit is not None and self._spec.max_tokens > limit:
            raise SpecError(
                Problem(
                    f"task.max_tokens is {self._spec.max_tokens}, "
                    f"but this model reads at most {limit} tokens",
                    f"write max_tokens: {limit}, or less",
                )
            )
        torch.manual_seed(seed)
        try:
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise self._no_model(error) from error
        remember_new(model, set(loaded["missing_keys"]))
        if self._packing:
            pack_blocks(model, self.forward, self._sample())
        built: nn.Module = model
        return built

    def _sample(self) -> Batch:
        """Rows of several lengths and different tokens."""
        lengths = np.array([5, 3, 3, 1])
        special = set(self._tokenizer.all_special_ids)
        ids = [number for number in range(len(self._tokenizer)) if number not in special]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = Ragged(np.resize(ids, offsets[-1]).astype(np.int32), offsets)
        return self.collate(Items({"input_ids": tokens, "label": np.zeros(4, dtype=np.int64)}))

    def _no_model(self, error: Exception) -> SpecError:
        return SpecError(
            Problem(
                f"model.source holds no model for {self._spec.kind}: {_first_line(error)}",
                "name a folder with config.json and safetensors weights of an encoder",
            )
        )

    def save_extras(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)

    # ------------------------------------------------------------------------------------- rows

    def encode(self, rows: pa.Table, first_row: int) -> Items:
        return Items(
            {
                "input_ids": self._tokens(rows, first_row),
                "label": self._labels(rows.column(self._spec.label), first_row),
            }
        )

    def _tokens(self, rows: pa.Table, first_row: int) -> Ragged:
        if self._pretokenized:
            return Ragged.from_arrow(rows.column("input_ids"), first_row=first_row)
        texts = rows.column(self._spec.text)
        if not _is_text(texts.type):
            raise DataError(
                Problem(
                    f"the text column {self._spec.text} holds {texts.type}, not text",
                    "name the column of texts in task.text",
                )
            )
        if texts.null_count:
            row = first_row + pc.index(pc.is_null(texts), True).as_py()
            raise DataError(
                Problem(
                    f"row {row}: the text column {self._spec.text} is null",
                    "drop such rows with: shoal prepare SOURCE --to URI --on-null drop",
                )
            )
        encoded = self._tokenizer(
            texts.to_pylist(),
            truncation=True,
            max_length=self._spec.max_tokens,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        lengths = np.fromiter((len(ids) for ids in encoded), dtype=np.int64, count=len(encoded))
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        values = np.fromiter((i for ids in encoded for i in ids), np.int32, count=int(offsets[-1]))
        return Ragged(values, offsets)

    def _labels(self, column: pa.ChunkedArray, first_row: int) -> npt.NDArray[np.int64]:
        """Class numbers, shape [n]; the column holds labels, or their positions."""
        names = pa.array(self._spec.labels, pa.string())
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_integer(column.type) and not _has_number(self._spec.labels):
            codes = pc.cast(column, pa.int64())
            known = pc.and_(pc.greater_equal(codes, 0), pc.less(codes, len(names)))
            known = pc.fill_null(known, False)
        else:
            codes = pc.index_in(column.cast(pa.string()), value_set=names)
            known = pc.is_valid(codes)
        wrong = pc.index(known, False).as_py()
        if wrong >= 0:
            raise DataError(
                Problem(
                    f"row {first_row + wrong}: the label column {self._spec.label} holds "
                    f"{column[wrong].as_py()!r}, which is none of {', '.join(self._spec.labels)}",
                    "add it to task.labels, or leave such rows out when you prepare the data",
                )
            )
        return np.asarray(numbers_of(codes), dtype=np.int64)

    def lengths(self, items: Items) -> npt.NDArray[np.int64]:
        return np.diff(tokens_of(items).offsets)

    def weights(self, items: Items) -> npt.NDArray[np.float64]:
        if self._class_weights is None:
            return np.ones(len(items))
        weights: npt.NDArray[np.float64] = self._class_weights[np.asarray(items.columns["label"])]
        return weights

    def collate(self, items: Items) -> Batch:
        """`input_ids` and `attention_mask` [n, longest], `label` and `weight` [n], with class
        weights `loss_weight` [n], and with packing what `packed_tensors` gives."""
        batch = padded(items, pad_id=self._pad_id) | {"weight": torch.ones(len(items))}
        if self._class_weights is not None:
            batch[_LOSS_WEIGHT] = torch.from_numpy(self.weights(items)).float()
        return batch | self._packed(self.lengths(items))

    def _packed(self, lengths: npt.NDArray[np.int64]) -> Batch:
        return packed_tensors(lengths) if self._packing else {}

    def empty_batch(self, *, rows: int = 1, tokens: int = 2) -> Batch:
        return self._packed(np.full(rows, tokens)) | {
            "input_ids": torch.full((rows, tokens), self._pad_id),
            "attention_mask": torch.ones(rows, tokens, dtype=torch.int64),
            "label": torch.zeros(rows, dtype=torch.int64),
            "weight": torch.zeros(rows),
        }

    # ------------------------------------------------------------------------- loss and metrics

    def forward(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Logits [n, labels], float32."""
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            **packing_arguments(batch),
        )
        logits: torch.Tensor = output.logits.float()
        return logits

    def loss(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        # Also of rows that weigh nothing, which have no other weight.
        weights = batch.get(_LOSS_WEIGHT, batch["weight"])
        return cross_entropy(
            output, batch, weights=weights, label_smoothing=self._spec.label_smoothing
        )

    def metrics(self) -> TextClassificationMetrics:
        return TextClassificationMetrics(self.labels)

    @property
    def labels(self) -> tuple[str, ...]:
        return self._spec.labels

    def predictions(self, output: torch.Tensor, batch: Batch) -> Mapping[str, Any]:
        probabilities = output.softmax(dim=-1).cpu()
        best = probabilities.argmax(dim=-1)
        return {
            "label": [self.labels[i] for i in batch["label"].tolist()],
            "predicted": [self.labels[i] for i in best.tolist()],
            "score": probabilities.amax(dim=-1).tolist(),
            "probabilities": probabilities.tolist(),
        }


class TextClassificationMetrics:
    """The confusion matrix of a text classification, and its cross-entropy without smoothing."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._confusion = ConfusionMetrics(labels)

    def update(self, output: torch.Tensor, batch: Batch) -> None:
        self._confusion.update(
            true=batch["label"],
            predicted=output.argmax(dim=-1),
            loss_sum=cross_entropy(output, batch, weights=batch["weight"]),
            weight_sum=float(batch["weight"].sum()),
        )

    def state(self) -> torch.Tensor:
        return self._confusion.state()

    def compute(self, state: torch.Tensor) -> Evaluation:
        return self._confusion.compute(state)


def cross_entropy(
    output: torch.Tensor, batch: Batch, *, weights: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """The sum over rows of weight times cross-entropy, a scalar, of logits of shape [n, labels].

    The target of a row is 1 - label_smoothing for its label, and label_smoothing for all labels
    alike (Szegedy et al., 2016, "Rethinking the Inception Architecture for Computer Vision").
    """
    losses = nn.functional.cross_entropy(
        output, batch["label"], reduction="none", label_smoothing=label_smoothing
    )
    return (losses * weights).sum()


def _class_weights(spec: job.Task, index: Index) -> npt.NDArray[np.float64] | None:
    """What a row of each class counts in the loss; None where all count 1."""
    if spec.class_weights is None:
        return None
    if spec.class_weights == "balanced":
        refuse_other_column(spec.label, index)
    return class_weights(spec.class_weights, labels=spec.labels, index=index)


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a model folder; SpecError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise SpecError(
            Problem(
                f"model.source holds no tokenizer that loads: {_first_line(error)}",
                "put tokenizer.json and tokenizer_config.json beside the weights",
            )
        ) from error
    if not has_own_files(tokenizer, folder):
        raise SpecError(
            Problem(
                "model.source holds no tokenizer",
                "put tokenizer.json and tokenizer_config.json beside the weights",
            )
        )
    if not tokenizer.is_fast:
        raise SpecError(
            Problem(
                "the model's tokenizer is written in Python only, which Shoal does not load",
                "convert it to tokenizer.json with transformers",
            )
        )
    return tokenizer


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _has_number(labels: Sequence[str]) -> bool:
    """Whether a label is a whole number: a column of numbers then holds labels, not positions."""
    return any(label.removeprefix("-").isdigit() for label in labels)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
