"""Hugging Face datasets: of the hub, in streaming mode, or of a folder that save_to_disk wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from cluster.storage import join_uri, open_store
from jobs.errors import DataError, EnvironmentFault, Problem
from trainers.data.columns import storable
from trainers.data.sources import SourceBatch, SourceChoice, files_identity

_ROWS = 1024


class HuggingFaceDataset:
    """Rows of one split, as Arrow; class labels become the names of the classes (-1: null)."""

    kind = "huggingface"
    bytes_read = 0
    num_bytes: int | None = None

    def __init__(
        self,
        dataset: Any,
        *,
        uri: str,
        identity: object,
        files: Sequence[str] = (),
    ) -> None:
        self._dataset = dataset
        self.uri, self.identity = uri, identity
        self._files = files
        self._names = {
            column: feature.names
            for column, feature in (dataset.features or {}).items()
            if type(feature).__name__ == "ClassLabel"
        }

    @cached_property
    def schema(self) -> pa.Schema:
        """That of the first rows; DataError where there are none."""
        with _explained(self.uri):
            for table in self._tables(columns=None):
                return table.schema
        raise DataError(Problem(f"{self.uri} is empty", "name a dataset that holds rows"))

    @classmethod
    def from_hub(cls, name: str, choice: SourceChoice) -> HuggingFaceDataset:
        """A dataset of the hub, pinned to the commit that its revision names now."""
        datasets = _import_datasets()
        import huggingface_hub
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            commit = huggingface_hub.HfApi().dataset_info(name, revision=choice.revision).sha
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise DataError(
                Problem(
                    f"{choice.uri}: no such file or folder here, and no such dataset on the "
                    "Hugging Face hub",
                    "see that the name is right; a private dataset needs HF_TOKEN",
                )
            ) from error
        except RevisionNotFoundError as error:
            raise DataError(
                Problem(f"{name} has no revision {choice.revision}", "leave --revision out")
            ) from error
        except GatedRepoError as error:
            raise DataError(
                Problem(f"{name} is gated", "ask for access on its page and set HF_TOKEN")
            ) from error
        except Exception as error:
            # Offline mode, name resolution, proxies: each library below has its own exceptions.
            raise EnvironmentFault(
                Problem(
                    f"{choice.uri}: no such file or folder here, and the Hugging Face hub cannot "
                    f"be asked: {_first_line(error)}",
                    "name a file or folder that is here, or see that the hub can be reached",
                )
            ) from error
        with _explained(name):
            if choice.config is None:
                configs = datasets.get_dataset_config_names(name, revision=commit)
                if len(configs) > 1 and "default" not in configs:
                    raise DataError(
                        Problem(
                            f"{name} has several configurations: {', '.join(configs)}",
                            f"choose one: --config {configs[0]}",
                        )
                    )
            parts = datasets.get_dataset_split_names(name, choice.config, revision=commit)
            part = _choose_part(name, parts, choice)
            dataset = datasets.load_dataset(
                name, choice.config, split=part, revision=commit, streaming=True
            )
            if dataset.features is None:
                dataset = dataset._resolve_features()
            uri = f"hf://{name}@{commit}/{part}"
            identity = [name, commit, choice.config, part]
            return cls(_undecoded(datasets, dataset), uri=uri, identity=identity)

    @classmethod
    def from_folder(cls, path: Path, choice: SourceChoice) -> HuggingFaceDataset:
        """A folder that save_to_disk wrote; its Arrow files are mapped, not read."""
        datasets = _import_datasets()
        for flag, value in (("--revision", choice.revision), ("--config", choice.config)):
            if value is not None:
                raise DataError(
                    Problem(f"{flag} is given, but {path} is a saved dataset", f"leave {flag} out")
                )
        with _explained(str(path)):
            dataset = datasets.load_from_disk(str(path))
            if isinstance(dataset, datasets.DatasetDict):
                part = _choose_part(str(path), list(dataset), choice)
                dataset = dataset[part]
                path = path / part
            elif choice.part is not None:
                raise DataError(Problem(f"{path} has no splits", "leave --source-split out"))
            store = open_store(path)
            heads = list(store.list())
            return cls(
                _undecoded(datasets, dataset),
                uri=str(path),
                identity=files_identity(store, heads),
                files=[join_uri(store.uri, head.key) for head in heads],
            )

    @property
    def files(self) -> Iterator[str]:
        return iter(self._files)

    def batches(self, columns: Sequence[str]) -> Iterator[SourceBatch]:
        row = 1
        with _explained(self.uri):
            for table in self._tables(list(columns)):
                yield SourceBatch(table=table, file=self.uri, first_row=row)
                row += table.num_rows

    def _tables(self, columns: list[str] | None) -> Iterator[pa.Table]:
        dataset = self._dataset
        if columns is not None:
            dataset = dataset.select_columns(columns)
        for found in dataset.with_format("arrow").iter(batch_size=_ROWS):
            table = found.cast(storable(found.schema))
            if columns is not None:
                table = table.select(columns)
            for name, classes in self._names.items():
                if name in table.column_names and pt.is_integer(table[name].type):
                    at = table.column_names.index(name)
                    table = table.set_column(at, name, _class_names(table[name], classes))
            yield table


def _class_names(codes: pa.ChunkedArray, classes: Sequence[str]) -> pa.ChunkedArray:
    names = [None if code is None or code < 0 else classes[code] for code in codes.to_pylist()]
    return pa.chunked_array([pa.array(names, pa.string())])


def _undecoded(datasets: Any, dataset: Any) -> Any:
    """The dataset with images as their bytes."""
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _choose_part(name: str, parts: Sequence[str], choice: SourceChoice) -> str:
    if choice.part is not None:
        if choice.part not in parts:
            raise DataError(
                Problem(
                    f"{name} has no split {choice.part}",
                    f"its splits: {', '.join(map(str, parts))}",
                )
            )
        return choice.part
    if len(parts) != 1:
        raise DataError(
            Problem(
                f"{name} has several splits: {', '.join(map(str, parts))}",
                f"choose one: --source-split {parts[0] if parts else 'train'}",
            )
        )
    return str(parts[0])


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            Problem("a Hugging Face dataset needs datasets", "run: pip install 'shoal[train]'")
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class _explained:  # noqa: N801 - used as a function
    """Whatever `datasets` raises while it reads, as a DataError that names the dataset."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        from jobs.errors import ShoalError

        if isinstance(error, Exception) and not isinstance(error, ShoalError):
            raise DataError(
                Problem(
                    f"{self._name} cannot be read: {_first_line(error)}",
                    "see that the dataset is whole and that its configuration and split exist",
                )
            ) from error
