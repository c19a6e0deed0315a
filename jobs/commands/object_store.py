"""`shoal up` and `shoal down`: the embedded object store of this machine."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from jobs.commands.target import STORE_VARIABLE

F = TypeVar("F", bound=Callable[..., Any])


def folder_option(command: F) -> F:
    return click.option(
        "--folder",
        metavar="PATH",
        type=click.Path(path_type=Path, file_okay=False),
        help="Where the store keeps its data. Default: shoal/store in the user's data folder.",
    )(command)


@click.command()
@folder_option
@click.option("--bucket", metavar="NAME", default="shoal", show_default=True)
def up(folder: Path | None, bucket: str) -> None:
    """Start an S3 server on this machine, for laptops and demos.

    Prints the variables that every S3 client reads; take them with: eval "$(shoal up)"
    """
    from cluster import embedded

    store = embedded.up(folder or _default_folder(), buckets=(bucket,))
    variables = embedded.environment(store) | {STORE_VARIABLE: f"s3://{bucket}/runs"}
    for name, value in variables.items():
        click.echo(f"export {name}={shlex.quote(value)}")
    in_folder = f" --folder {shlex.quote(str(folder))}" if folder else ""
    in_bucket = f" --bucket {shlex.quote(bucket)}" if bucket != embedded.DEFAULT_BUCKET else ""
    click.echo(
        f"the object store runs at {store.endpoint_url}, its data is in {store.folder}\n"
        f'set the variables in this shell with: eval "$(shoal up{in_folder}{in_bucket})"\n'
        f"stop it with: shoal down{in_folder}",
        err=True,
    )


@click.command()
@folder_option
def down(folder: Path | None) -> None:
    """Stop the object store that `shoal up` has started; its data and keys stay."""
    from cluster import embedded

    where = folder or _default_folder()
    stopped = embedded.down(where)
    click.echo("stopped" if stopped else f"no object store of {where} was running", err=True)


def _default_folder() -> Path:
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "shoal" / "store"
