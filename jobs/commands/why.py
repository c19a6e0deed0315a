"""`shoal why`: what a run waits for, or why it has failed, and what to type."""

from __future__ import annotations

import click

from jobs.commands.target import (
    context_option,
    json_option,
    open_run_or_trial,
    print_json,
    run_argument,
    trial_option,
)


@click.command()
@run_argument
@trial_option
@context_option
@json_option
def why(run: str, store: str | None, trial: int | None, context: str | None, as_json: bool) -> None:
    """What a run waits for, or why it has failed, on what evidence, and what to type.

    Of a run on Kubernetes its pods, events and queue are asked too; without the rights for those,
    the run's folder alone. The exit code is 0 whatever the run's state is.
    """
    from jobs.rayjobs import refuse_context
    from jobs.why.explain import explain
    from jobs.why.gather import gather

    reader = open_run_or_trial(run, store, trial)
    refuse_context(reader, context)
    told = explain(gather(reader, context=context))
    if as_json:
        print_json(told.to_json())
    else:
        from jobs.why.view import show_explanations

        show_explanations(told)
