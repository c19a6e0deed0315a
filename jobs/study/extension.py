"""More trials for a study, asked for by requests in its folder and heard by its driver.

    checked_space            whether a study can have them
    request_extension        asks for them
    read_extensions          what was asked for, for the driver
    is_waiting, answer_to    whether the study has answered, and what

A request is answered once, by an event that holds its number: `Extended`, or `Refused` where
another request or a budget came before it. It waits in the folder until then, so that one that came
too late for a driver is answered by the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cluster.storage import Store, write_numbered
from jobs.errors import Problem, SpecError
from jobs.parse import parse_spec
from jobs.record import Control, RunPaths
from jobs.runs import RunReader
from jobs.spec import JobSpec
from jobs.study.budget import Budget, UsedUp
from jobs.study.events import Event, Extended, Refused
from jobs.study.log import LogReader
from jobs.study.trials import Trials
from trainers.controls import last_request


@dataclass(frozen=True)
class Extension:
    """A request for more trials."""

    request: int
    """Its number among the requests to the study."""
    trials: int
    """That the study is to have in all."""
    space: dict[str, Any] | None
    """That the new ones are drawn from, as in the job file; None: as before."""
    by: str


def checked_space(
    spec: JobSpec, trials: Trials, *, used_up: UsedUp | None, wanted: int, space: object | None
) -> dict[str, Any] | None:
    """The new space with nothing left to be filled in; None where it is to stay.

    Raises SpecError where the study cannot have `wanted` trials in all, or not of that space.
    `used_up` is the limit of its budget that it has reached.
    """
    search = spec.search
    assert search is not None
    if search.clones:
        raise SpecError(
            Problem(
                f"search.scheduler is {search.scheduler.kind}, whose population cannot grow: its "
                f"{search.trials} trials begin together, and all others are their clones",
                "start a new study with a larger search.scheduler.population",
            )
        )
    has, made = trials.wanted, trials.configurations
    says_nothing = wanted == has and space is None and trials.closed is None
    if wanted < has or wanted <= made or says_nothing:
        is_made = ", all of which it has made" if made >= has else ""
        raise SpecError(
            Problem(
                f"{wanted} trials in all are asked for, but the study has {has}{is_made}",
                f"ask for more, as in: shoal extend STUDY --trials {2 * has}",
            )
        )
    if used_up is not None:
        more = f"--set {used_up.path}={2 * used_up.limit:g}"
        raise SpecError(
            Problem(
                f"{used_up.message}, so the study would make none of the trials that are asked for",
                f"give it more of that as well: shoal resume STUDY {more} "
                f"--set search.trials={wanted}"
                if space is None
                else f"give it more of that first: shoal resume STUDY {more} --background",
            )
        )
    if space is None:
        return None
    tree = spec.model_dump(mode="json")
    tree["search"] |= {"trials": wanted, "space": space}
    changed = parse_spec(tree, where="--space").search
    assert changed is not None
    checked: dict[str, Any] = changed.model_dump(mode="json")["space"]
    return checked


def used_up_of(spec: JobSpec, events: Iterable[Event]) -> UsedUp | None:
    """The limit of the job's budget that its search has reached by the last event, if any."""
    assert spec.search is not None
    trials, budget = Trials(spec.search), Budget(spec.search, gpus=spec.gpus_held)
    for event in events:
        trials.observe(event)
        if trials.is_of_search(event):
            budget.observe(event)
    return budget.used_up(now=0.0)


def is_waiting(reader: RunReader, trials: Trials) -> bool:
    """Whether trials were asked for, and the study has not answered yet."""
    return bool(read_extensions(reader.store, reader.paths, after=trials.last_request))


def answer_to(log: LogReader, request: int) -> Extended | Refused | None:
    """What the study has made of the request with that number; None: nothing yet."""
    answers = (event for event in log.events() if isinstance(event, Extended | Refused))
    return next((answer for answer in answers if answer.request == request), None)


def request_extension(
    store: Store, paths: RunPaths, *, trials: int, space: Mapping[str, Any] | None, by: str
) -> int:
    """Asks the study for so many trials in all, of a space that was checked; the request's
    number."""
    control = Control(
        kind="extend",
        requested_at=time.time(),
        by=by,
        trials=trials,
        space=None if space is None else dict(space),
    )
    return write_numbered(
        store, paths.control_request, control.to_bytes(), after=last_request(store, paths)
    )


def read_extensions(store: Store, paths: RunPaths, *, after: int) -> list[Extension]:
    """Requests for more trials later than number `after`, in their order."""
    found = []
    for head in store.list(paths.control, after=paths.control_request(after)):
        try:
            control = Control.model_validate_json(store.read(head.key))
        except ValidationError:
            continue  # no request that is known; the driver's other ear says so
        if control.kind == "extend" and control.trials is not None:
            number = int(head.key.rpartition("/")[2].removesuffix(".json"))
            found.append(Extension(number, control.trials, control.space, control.by))
    return sorted(found, key=lambda extension: extension.request)
