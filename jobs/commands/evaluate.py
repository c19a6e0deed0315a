"""`shoal evaluate`: metrics and row predictions of a run's model on other data."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from jobs.commands.target import (
    json_option,
    open_run_or_trial,
    print_json,
    run_argument,
    trial_option,
)


@click.command()
@run_argument
@trial_option
@click.option("--data", "data_uri", metavar="URI", required=True, help="A prepared data set.")
@click.option(
    "--output",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Parquet file for the prediction of each row. Default: in the run's folder.",
)
@json_option
def evaluate(
    run: str,
    store: str | None,
    trial: int | None,
    data_uri: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure the best model of a run on a data set that `shoal prepare` has written."""
    from jobs.errors import EnvironmentFault, Problem

    if importlib.util.find_spec("torch") is None:
        raise EnvironmentFault(
            Problem(
                "shoal evaluate runs the model, and torch is not installed here",
                'run: pip install "shoal[train]"',
            )
        )
    reader = open_run_or_trial(run, store, trial)
    reader.spec_head()
    from trainers.evaluate import evaluate_run

    measured = evaluate_run(reader.store, reader.run_id, data_uri, output)
    if as_json:
        print_json(measured)
        return
    _show(measured)
    click.echo(f"predictions: {measured['predictions']}", err=True)


def _show(measured: dict[str, Any]) -> None:
    from jobs.terminal import format_number, print_table

    metrics = measured.get("metrics") or {}
    print_table(
        ["rows", *metrics],
        [[format_number(measured.get("rows")), *map(format_number, metrics.values())]],
        right={"rows", *metrics},
    )
    per_class = measured.get("per_class") or []
    if per_class:
        click.echo()
        columns = ["precision", "recall", "f1", "support"]
        print_table(
            ["label", *columns],
            [[str(c.get("label")), *(format_number(c.get(k)) for k in columns)] for c in per_class],
            right=set(columns),
        )
