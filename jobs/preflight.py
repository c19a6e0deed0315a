"""What is checked before anything is spent: the job against its stores, data, model and machine.

    check_job(spec) -> Checked      every problem at once; creates nothing, starts no Ray
    show_check(checked)             as a list with totals, or as JSON

What waits for a store or a disk runs in threads; what follows from several answers is pure and
comes after. Torch and transformers are not imported: the model is known by its files.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import click
from rich.table import Table
from rich.text import Text

from jobs.checks.data_sets import DataSetFacts, check_apart, check_data_set
from jobs.checks.finding import (
    USER_EXIT_CODE,
    Finding,
    Verdict,
    merge_same_cause,
)
from jobs.checks.kuberay import Look, check_kuberay, look_at_kubernetes
from jobs.checks.kuberay_plan import ClusterPlan, plan_cluster, plan_lines
from jobs.checks.machine import (
    Machine,
    check_compiler,
    check_disk,
    check_memory,
    check_packages,
    check_run_disk,
    check_strategy,
    check_workers,
    disk_need,
    look_at_machine,
    worker_bytes,
)
from jobs.checks.model import ModelFacts, check_model
from jobs.checks.schedule import (
    Totals,
    check_batching,
    check_steps,
    check_stream,
    totals_of,
)
from jobs.checks.search import SearchPlan, check_search, plan_search
from jobs.checks.stores import Stores, check_store
from jobs.checks.tokenizer import check_tokens
from jobs.checks.tracking import check_tracking
from jobs.checks.weighting import check_weighting
from jobs.errors import PreflightError, ShoalError, render_error
from jobs.spec import JobSpec, format_bytes
from jobs.terminal import print_to

_STYLES = {
    Verdict.OK: "green",
    Verdict.WARNING: "yellow",
    Verdict.PROBLEM: "bold red",
    Verdict.NOT_CHECKED: "cyan",
}


@dataclass(frozen=True)
class Checked:
    """All that the check found out."""

    findings: tuple[Finding, ...]
    totals: Totals
    search: SearchPlan | None = None
    """Of a job that searches: what its trials amount to."""
    cluster: ClusterPlan | None = None
    """Of a job for Kubernetes: what would be created there."""

    @property
    def problems(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.verdict is Verdict.PROBLEM)

    @property
    def exit_code(self) -> int:
        """0 without a problem, 2 if any is the user's, else 3."""
        codes = {finding.exit_code for finding in self.problems}
        if not codes:
            return 0
        return USER_EXIT_CODE if USER_EXIT_CODE in codes else max(codes)

    def raise_problems(self) -> None:
        """Raises PreflightError with all problems, if there is one."""
        if self.problems:
            raise PreflightError(*(f.problem for f in self.problems), exit_code=self.exit_code)

    def to_json(self) -> dict[str, object]:
        return {
            "exit_code": self.exit_code,
            "checks": [
                {"part": f.part, "verdict": f.verdict, "message": f.message, "hint": f.hint}
                for f in self.findings
            ],
            "totals": self.totals.to_json(),
            "search": self.search and self.search.to_json(),
            "cluster": self.cluster and self.cluster.to_json(),
        }


def check_job(
    spec: JobSpec, *, context: str | None = None, asks_kubernetes: bool = True
) -> Checked:
    """Tests the job against what it names; nothing is created that stays, and no Ray is started.

    `context` is that of the kubeconfig by which a job's Kubernetes cluster is asked; without
    `asks_kubernetes` it is not.
    """
    stores = Stores()
    is_here = spec.cluster.kind == "local" and not os.environ.get("RAY_ADDRESS")
    uris = {
        f"data.{name}": uri
        for name in ("train", "validation", "test")
        if (uri := getattr(spec.data, name)) is not None
    }
    with ThreadPoolExecutor(len(uris) + 5, thread_name_prefix="shoal-check") as pool:
        looking = pool.submit(look_at_kubernetes, spec, context=context, asks=asks_kubernetes)
        kept = pool.submit(
            check_store, "store", spec.store.uri, spec.store.access, stores, lease=spec.store_lease
        )
        opened = {
            part: pool.submit(check_data_set, part, uri, spec, stores) for part, uri in uris.items()
        }
        looked = pool.submit(check_model, spec, stores)
        tracked = pool.submit(lambda: [*check_tracking(spec, is_here=is_here)])
        seen = pool.submit(look_at_machine, count_gpus=bool(spec.workers.gpus)) if is_here else None
        sets = {part: future.result()[1] for part, future in opened.items()}
        findings = list(kept.result())
        for future in opened.values():
            findings += future.result()[0]
        model_findings, model = looked.result()
        findings += model_findings + tracked.result()
        machine = seen.result() if seen is not None else None
        look = looking.result()
    known = {part: facts for part, facts in sets.items() if facts is not None}
    train = known.get("data.train")
    totals = totals_of(spec, train, model)
    findings += _across(spec, known, model, machine, totals, look)
    plan = plan_search(spec, totals, machine)
    if plan is not None:
        findings += check_search(spec, plan, totals, machine)
    return Checked(tuple(merge_same_cause(findings)), totals, plan, plan_cluster(spec, look))


def _across(
    spec: JobSpec,
    sets: dict[str, DataSetFacts],
    model: ModelFacts | None,
    machine: Machine | None,
    totals: Totals,
    look: Look | None,
) -> Iterator[Finding]:
    """What only several parts together tell."""
    yield from check_apart(sets)
    yield from _check_all_tokens(spec, sets, model)
    yield from check_batching(spec)
    yield from check_steps(spec, totals)
    if "data.train" in sets:
        yield from check_weighting(spec, sets["data.train"])
        yield from check_stream(spec, sets["data.train"], totals)
    yield from check_workers(spec, machine)
    yield from check_strategy(spec, model.weights if model is not None else None)
    need = worker_bytes(
        training_bytes=totals.training_bytes or 0, stream_bytes=totals.stream_bytes or 0
    )
    yield from check_memory(spec, machine, worker_bytes=need)
    disk = disk_need(spec, sets.values(), model)
    if machine is not None:
        yield from check_disk(disk)
        yield from check_packages()
        yield from check_compiler(spec)
    yield from check_run_disk(spec, disk)
    yield from check_kuberay(spec, disk, look)


def _check_all_tokens(
    spec: JobSpec, sets: dict[str, DataSetFacts], model: ModelFacts | None
) -> Iterator[Finding]:
    if model is None or model.tokenizer is None or model.tokenizer_files is None:
        return
    for facts in sets.values():
        yield from check_tokens(
            facts,
            model.tokenizer,
            model.tokenizer_files,
            shown=model.shown,
            max_tokens=spec.task.max_tokens,
        )


# -------------------------------------------------------------------------------------- for people


def show_check(checked: Checked, *, as_json: bool) -> None:
    """Prints what was checked to stdout; the problems, with their hints, to stderr."""
    if as_json:
        click.echo(json.dumps(checked.to_json(), indent=2, ensure_ascii=False))
        return
    print_to(sys.stdout, _table(checked))
    for line in _totals_lines(checked.totals):
        click.echo(line)
    for line in plan_lines(checked.cluster) if checked.cluster is not None else ():
        click.echo(line)
    if checked.problems:
        sys.stdout.flush()
        click.echo("", err=True)
        click.echo(render_error(ShoalError(*(f.problem for f in checked.problems))), err=True)


def _table(checked: Checked) -> Table:
    """The findings by part, one a line; the problems of a part are told below, in full."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for no_wrap in (True, True, False):
        table.add_column(no_wrap=no_wrap)
    for part in dict.fromkeys(finding.part for finding in checked.findings):
        shown = part
        for verdict, text in _lines_of_part(checked, part):
            table.add_row(Text(verdict, style=_STYLES[verdict]), Text(shown), Text(text))
            shown = ""
    return table


def _lines_of_part(checked: Checked, part: str) -> Iterator[tuple[Verdict, str]]:
    problems = sum(finding.part == part for finding in checked.problems)
    if problems:
        below = "the error" if problems == 1 else f"the {problems} errors"
        yield Verdict.PROBLEM, f"see {below} below"
    for finding in checked.findings:
        if finding.part == part and finding.verdict is not Verdict.PROBLEM:
            hint = f" (hint: {finding.hint})" if finding.hint else ""
            yield finding.verdict, finding.message + hint


def _totals_lines(totals: Totals) -> Iterator[str]:
    if totals.rows is not None and totals.steps_per_epoch and totals.total_steps:
        yield ""
        yield (
            f"{totals.rows:,} rows in {totals.steps_per_epoch:,} steps an epoch, "
            f"{totals.total_steps:,} steps in all"
        )
    if totals.parameters and totals.trained_parameters:
        share = min(1.0, totals.trained_parameters / totals.parameters)
        yield f"{totals.trained_parameters:,} weights are trained, {share:.2%} of the model's"
    shares = [
        f"{format_bytes(size)} for {what}"
        for size, what in (
            (totals.stream_bytes, "rows"),
            (totals.training_bytes, "weights, gradients and optimizer state"),
        )
        if size
    ]
    if shares:
        yield f"memory of a worker: {', '.join(shares)}"
