"""What `shoal prepare` was asked for, and the plan that follows: columns, roles, fingerprint.

    PrepareOptions + Source -> PreparePlan

Everything that is wrong with the options or the columns is found here, before anything is written.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import pyarrow as pa

from jobs.errors import DataError, Problem, SpecError
from jobs.spec import StoreAccess
from trainers.data.clean_rows import OnNull
from trainers.data.columns import column_facts, is_label_type, is_text_type
from trainers.data.image_folder import IMAGE_TYPE
from trainers.data.index import SourceRecord
from trainers.data.index_draft import DraftFacts
from trainers.data.shards import Roles, Sizes
from trainers.data.sources import Source, SourceChoice
from trainers.data.split import parse_split
from trainers.data.tokenizers import TOKEN_COLUMN, Tokenization, load_tokenization

NO_STRATIFY = "none"


@dataclass(frozen=True)
class PrepareOptions:
    """What `shoal prepare` was asked for."""

    source: str
    to: str | None = None
    """URI of the data set, or of the folder of its parts; None: in place."""
    split: str | None = None
    """As `split.parse_split` reads it; None: one data set."""
    stratify: str | None = None
    """Column whose values are spread evenly over the parts; None: the label; `none`: nothing."""
    seed: int | None = None
    """Of the split; None: 0."""
    text: str | None = None
    """None: the column `text`, where there is one."""
    label: str | None = None
    """None: the column `label`, where there is one."""
    columns: tuple[str, ...] | None = None
    """Columns that are kept, in this order; None: all."""
    sizes: Sizes = Sizes()  # noqa: RUF009 - frozen
    tokenizer: str | None = None
    max_tokens: int | None = None
    """Tokens of a text that are kept, special ones included; None: 512."""
    on_null: OnNull = "error"
    processes: int | None = None
    """None: as many as there are cores."""
    overwrite: bool = False
    revision: str | None = None
    config: str | None = None
    source_split: str | None = None
    access: StoreAccess = StoreAccess()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class PreparePlan:
    """All that decides the rows and their bytes."""

    columns: tuple[str, ...]
    roles: Roles
    stratify: str | None
    split: Mapping[str, Fraction | int] | None
    tokenization: Tokenization | None
    image_columns: tuple[str, ...]
    facts: DraftFacts

    @property
    def required(self) -> tuple[str, ...]:
        """Columns that may hold no null."""
        names = (self.roles.text, self.roles.label, self.stratify)
        return tuple(dict.fromkeys(name for name in names if name is not None))


def make_plan(options: PrepareOptions, source: Source) -> PreparePlan:
    """Columns and their roles; raises DataError for columns that are unknown or of a wrong type."""
    split = parse_split(options.split) if options.split is not None else None
    known = source.schema.names
    for flag, names in (
        ("--columns", options.columns or ()),
        ("--text", (options.text,) if options.text else ()),
        ("--label", (options.label,) if options.label else ()),
        ("--stratify", (options.stratify,) if options.stratify not in (None, NO_STRATIFY) else ()),
    ):
        for column in names:
            check_known(flag, str(column), known, source.uri)
    columns = tuple(dict.fromkeys(options.columns or known))
    for flag, name in (("--text", options.text), ("--label", options.label)):
        if name is not None and name not in columns:
            raise SpecError(
                Problem(
                    f"{flag} {name} is not among --columns {','.join(columns)}",
                    f"write --columns {','.join([*columns, name])}",
                )
            )
    roles = find_roles(source.schema, columns, text=options.text, label=options.label)
    stratify = _stratify_column(options, source.schema, roles) if split else None
    tokenization = None
    if options.tokenizer is not None:
        tokenization = _tokenization(options, roles, columns)
        roles = Roles(text=roles.text, label=roles.label, tokens=TOKEN_COLUMN)
    schema = pa.schema([source.schema.field(name) for name in columns])
    images = tuple(field.name for field in schema if field.type.equals(IMAGE_TYPE))
    if tokenization is not None:
        schema = schema.append(pa.field(TOKEN_COLUMN, pa.list_(pa.int32())))
    record = tokenization.record if tokenization else None
    decisive = {
        "format": 1,
        "rows": source.identity,
        "columns": columns,
        "roles": [roles.text, roles.label],
        "split": [[k, str(v)] for k, v in split.items()] if split else None,
        "stratify": stratify,
        "seed": (options.seed or 0) if split else None,
        "sizes": [
            options.sizes.rows_per_group,
            options.sizes.group_bytes,
            options.sizes.shard_bytes,
        ],
        "tokenizer": [record.digest, record.max_tokens] if record else None,
        "on_null": options.on_null,
    }
    return PreparePlan(
        columns=columns,
        roles=roles,
        stratify=stratify,
        split=split,
        tokenization=tokenization,
        image_columns=images,
        facts=DraftFacts(
            columns=column_facts(schema),
            text_column=roles.text,
            label_column=roles.label,
            tokenizer=record,
            source=SourceRecord(
                uri=source.uri, kind=source.kind, fingerprint=fingerprint_of(decisive)
            ),
            made_by=made_by(),
        ),
    )


def check_options(options: PrepareOptions) -> None:
    """SpecError with every number out of its range and every option that would have no effect."""
    problems = [
        Problem(f"{flag} has no effect without {needed}", f"leave {flag} out, or add {needed}")
        for flag, given, needed, there in (
            ("--stratify", options.stratify, "--split", options.split),
            ("--seed", options.seed, "--split", options.split),
            ("--max-tokens", options.max_tokens, "--tokenizer", options.tokenizer),
        )
        if given is not None and there is None
    ]
    limits = {
        "--seed": (options.seed, 0),
        "--max-tokens": (options.max_tokens, 1),
        "--processes": (options.processes, 1),
        "--rows-per-group": (options.sizes.rows_per_group, 1),
        "--group-bytes": (options.sizes.group_bytes, 1),
        "--shard-bytes": (options.sizes.shard_bytes, 1),
    }
    problems += [
        Problem(f"{flag} is {value}, but must be {least} or more", f"write {flag} {least}, or more")
        for flag, (value, least) in limits.items()
        if value is not None and value < least
    ]
    if problems:
        raise SpecError(*problems)


def source_choice(options: PrepareOptions) -> SourceChoice:
    return SourceChoice(
        uri=options.source,
        access=options.access,
        text=options.text or "text",
        columns=options.columns,
        revision=options.revision,
        config=options.config,
        part=options.source_split,
    )


def check_known(flag: str, name: str, known: Sequence[str], uri: str) -> None:
    """DataError with the nearest column where `name` is none of the known ones."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise DataError(
            Problem(
                f"{flag} {name}: {uri} has no such column",
                f"did you mean {near[0]}?" if near else f"its columns: {', '.join(known)}",
            )
        )


def find_roles(
    schema: pa.Schema, columns: Sequence[str], *, text: str | None, label: str | None
) -> Roles:
    """The columns of text and label: those that are named, else `text` and `label`.

    Raises DataError where a named one has a wrong type; one that is not named is then none.
    """
    found: dict[str, str | None] = {}
    for role, named, fits, wanted in (
        ("text", text, is_text_type, "text"),
        ("label", label, is_label_type, "text, whole numbers or booleans"),
    ):
        name = named or (role if role in columns else None)
        if name is not None and not fits(schema.field(name).type):
            if named:
                raise DataError(
                    Problem(
                        f"--{role} {name}: the column holds {schema.field(name).type}, but "
                        f"{wanted} is needed",
                        f"name another column with --{role}: {', '.join(columns)}",
                    )
                )
            name = None
        found[role] = name
    return Roles(text=found["text"], label=found["label"])


def _stratify_column(options: PrepareOptions, schema: pa.Schema, roles: Roles) -> str | None:
    if options.stratify == NO_STRATIFY:
        return None
    if options.stratify is not None and not is_label_type(schema.field(options.stratify).type):
        raise DataError(
            Problem(
                f"--stratify {options.stratify}: the column holds "
                f"{schema.field(options.stratify).type}, which has no classes",
                "name a column of text, whole numbers or booleans, or write --stratify none",
            )
        )
    return options.stratify or roles.label


def _tokenization(options: PrepareOptions, roles: Roles, columns: Sequence[str]) -> Tokenization:
    assert options.tokenizer is not None
    if roles.text is None:
        raise DataError(
            Problem(
                "--tokenizer needs a column of text, and there is none called text",
                f"name it with --text: {', '.join(columns)}",
            )
        )
    if TOKEN_COLUMN in columns:
        others = [name for name in columns if name != TOKEN_COLUMN]
        raise DataError(
            Problem(
                f"--tokenizer writes the column {TOKEN_COLUMN}, which the source has already",
                f"leave it out: --columns {','.join(others)}",
            )
        )
    return load_tokenization(
        options.tokenizer, max_tokens=options.max_tokens or 512, access=options.access
    )


def fingerprint_of(decisive: object) -> str:
    """sha256 of JSON values: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def made_by() -> str:
    return f"shoal {importlib.metadata.version('shoal')}, pyarrow {pa.__version__}"
