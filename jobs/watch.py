"""The live view of a run: one screen on a terminal, plain lines elsewhere.

    watch_run(reader) -> RunStatus     shows the run until it is over

Both views are drawn from a `RunStatus` alone, so they show a run on any machine.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.rayjob_status import state_of
from cluster.storage import StorageError
from jobs.lines import Line
from jobs.onlooker import Onlooker
from jobs.record import State
from jobs.runs import RunReader
from jobs.situation import format_seconds
from jobs.status import RunStatus, read_status
from jobs.status_view import evaluation_text, headline, train_text
from jobs.study.trials import ENDED
from jobs.study_view import ended_line, live_study
from jobs.terminal import console_for, format_number, format_percent

POLL_SECONDS = 2.0
_EVALUATIONS_SHOWN = 4
_EVENTS_SHOWN = 5
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 40


class View(Protocol):
    """Where the status of a run is shown as it changes."""

    def __enter__(self) -> View: ...
    def __exit__(self, *exception: object) -> None: ...
    def show(self, status: RunStatus) -> None: ...

    def say(self, message: str) -> None:
        """One line that stays."""
        ...


def watch_run(
    reader: RunReader,
    *,
    view: View | None = None,
    after_generation: int | None = None,
    give_up: Callable[[], bool] = lambda: False,
    wake: threading.Event | None = None,
    beside: Callable[[RunStatus], RunStatus] = lambda status: status,
) -> RunStatus:
    """Show the run until it is over; its last status.

    What drivers up to `after_generation` left is not the end that is waited for, nor shown; None:
    any end is. `give_up` is asked after each look, and ends the watching after one more. `wake`
    ends the pause between two looks. `beside` adds to each status what others say of the run. A
    driver that is silent is gone once its lease was seen to stay as it is for its time to live.
    Raises SpecError if there is no such run, and StorageError if the first or the last look fails;
    in between, a store that is away for a while is borne.
    """
    pause, onlooker = wake or threading.Event(), Onlooker()
    has_looked = last_look = False
    with view or make_view() as shown:
        while True:
            try:
                status = beside(read_status(reader, onlooker=onlooker))
            except StorageError as error:
                if last_look or not has_looked:
                    raise
                shown.say(f"warning: the run folder cannot be read at present: {error}")
            else:
                has_looked = True
                situation = status.situation
                is_new = after_generation is None or situation.generation > after_generation
                if is_new or not (situation.is_over or situation.is_doubtful):
                    shown.show(status)
                if last_look or (is_new and situation.is_over):
                    return status
            last_look = give_up()
            if not last_look:
                pause.wait(POLL_SECONDS)
                pause.clear()


def make_view(*, since: float = 0.0, tells_end: bool = True) -> View:
    """The live view if stderr is a terminal, else plain lines of what was said after `since`.

    `tells_end`: the lines end with how the run did, unless somebody else says so.
    """
    console = console_for(sys.stderr)
    if console.is_terminal:
        return LiveView(console)
    return LineView(console, since=since, tells_end=tells_end)


class LiveView:
    """One screen that is drawn anew; what it showed last stays."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def show(self, status: RunStatus) -> None:
        self._live.update(live_renderable(status), refresh=True)

    def say(self, message: str) -> None:
        self._live.console.print(message)


class LineView:
    """Plain lines, for files and CI: events, evaluations, and at a look the newest of training."""

    def __init__(self, console: Console, *, since: float = 0.0, tells_end: bool = True) -> None:
        """Lines up to `since` (Unix seconds) are those of drivers before, and are not shown."""
        self._console = console
        self._since = since
        self._tells_end = tells_end
        self._seen: set[tuple[object, ...]] = set()
        self._state: tuple[object, ...] = ()
        self._rayjob = ""

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def show(self, status: RunStatus) -> None:
        new = [
            (event, _event_text(event)) for event in _events(status) if self._is_new("event", event)
        ]
        new.extend(
            (line, evaluation_text(line))
            for line in status.evaluations
            if self._is_new("evaluation", line)
        )
        if status.train is not None and self._is_new("train", status.train):
            new.append((status.train, _train_line(status)))
        new.extend(self._ended_trials(status))
        for line, text in sorted(new, key=lambda pair: float(pair[0]["time"])):
            self._console.print(Text(f"{_clock(line)} {text}"), soft_wrap=True)
        situation = status.situation
        self._show_rayjob(status)
        if (
            self._tells_end
            and situation.is_over
            and self._state != (situation.state, situation.generation)
        ):
            self._state = (situation.state, situation.generation)
            self._console.print(headline(status))

    def _show_rayjob(self, status: RunStatus) -> None:
        """What KubeRay does, where the driver does not say it, each time that it is another."""
        if status.rayjob is None or status.situation.is_over:
            return
        told = state_of(status.rayjob).cause
        if told != self._rayjob:
            self._rayjob = told
            self._console.print(Text(f"KubeRay: {told}"), soft_wrap=True)

    def _ended_trials(self, status: RunStatus) -> Iterator[tuple[Line, str]]:
        """Those that ended after `since`, each once."""
        study = status.study
        if study is None:
            return
        for number, ended_at in study.course.ended_at.items():
            trial, line = study.trials[number], {"time": ended_at, "step": number}
            if trial.status in ENDED and self._is_new("trial", line):
                yield line, ended_line(study, trial)

    def say(self, message: str) -> None:
        self._console.print(message)

    def _is_new(self, kind: str, line: Line) -> bool:
        if float(line["time"]) <= self._since:
            return False
        key = (kind, *(line.get(k) for k in ("time", "attempt", "step", "rank", "message")))
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


class NoView:
    """Shows nothing but what must be said."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> NoView:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def show(self, status: RunStatus) -> None:
        return None

    def say(self, message: str) -> None:
        self._console.print(message)


_EVENTS = ("state", "attempt", "checkpoint", "warning", "error")
_EVENT_STYLES = {"warning": "yellow", "skipped": "yellow", "error": "red", "state": "cyan"}


def live_renderable(status: RunStatus) -> RenderableType:
    """One screen: state, progress, numbers, evaluations, events."""
    parts: list[RenderableType] = [headline(status), Text()]
    parts.extend(live_study(status.study) if status.study else [_progress(status)])
    if status.train is not None:
        parts.extend([Text(), _numbers(status)])
    if status.evaluations:
        parts.extend([Text(), _evaluations(status)])
    events = _events(status)[-_EVENTS_SHOWN:]
    if events:
        parts.extend([Text(), *(_event_line(event) for event in events)])
    parts.extend(Text(f"warning: {problem}", style="yellow") for problem in status.problems)
    return Padding(Group(*parts), (0, 1, 1, 0))


def _events(status: RunStatus) -> list[Line]:
    """Those to be shown. That a study runs is said again and again: its trials tell more."""
    return [
        event
        for event in status.events
        if event.get("event") in _EVENTS
        and not (status.study is not None and event.get("state") == State.RUNNING)
    ]


def _progress(status: RunStatus) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=False)
    bar = ProgressBar(
        total=float(status.total_steps or 1),
        completed=float(status.step),
        width=36,
        complete_style="cyan",
        finished_style="green",
    )
    steps = f"step {status.step:,}" + (f" / {status.total_steps:,}" if status.total_steps else "")
    left = (
        f"{format_seconds(status.eta_seconds)} left"
        if status.eta_seconds is not None
        else f"{format_seconds(status.seconds_since_submitted)} in all"
        if status.situation.is_over
        else ""
    )
    epoch = f"epoch {status.epoch:.2f} / {status.epochs}" if status.epoch is not None else ""
    grid.add_row(bar, format_percent(status.progress), steps, epoch, left)
    return grid


def _numbers(status: RunStatus) -> RenderableType:
    train = status.train or {}
    grid = Table.grid(padding=(0, 3, 0, 0))
    names = ["loss", "learning rate", "rows/s", "tokens/s", "padding", "data wait", "gradient norm"]
    values = [
        format_number(train.get("loss")),
        format_number(train.get("learning_rate")),
        format_number(train.get("rows_per_second")),
        format_number(train.get("tokens_per_second")),
        format_percent(train.get("padding_share")),
        format_percent(train.get("data_wait_share")),
        format_number(train.get("grad_norm")),
    ]
    grid.add_row(*(Text(name, style="dim") for name in names), Text("loss so far", style="dim"))
    spark = Text(sparkline(status.losses, width=_SPARKLINE_WIDTH), style="cyan")
    grid.add_row(*(Text(value, style="bold") for value in values), spark)
    return grid


def _evaluations(status: RunStatus) -> RenderableType:
    shown = status.evaluations[-_EVALUATIONS_SHOWN:]
    names = list(dict.fromkeys(name for line in shown for name in line.get("metrics") or {}))
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_row(*(Text(name, style="dim") for name in ["evaluation", "step", *names, ""]))
    best = status.best.step if status.best else None
    for line in shown:
        metrics = line.get("metrics") or {}
        is_best = line.get("step") == best and line.get("split") == "validation"
        grid.add_row(
            str(line.get("split")),
            str(line.get("step")),
            *(format_number(metrics.get(name)) for name in names),
            Text("best" if is_best else "", style="bold green"),
        )
    return grid


def _event_line(event: Line) -> Text:
    style = _EVENT_STYLES.get(str(event.get("event")), "")
    return Text.assemble((_clock(event), "dim"), " ", (_event_text(event), style))


def _event_text(event: Line) -> str:
    kind = str(event.get("event"))
    message = str(event.get("message") or "")
    if kind == "state":
        return f"{event.get('state')}" + (f": {message}" if message else "")
    return f"{kind}: {message}" if kind in ("warning", "error") else message or kind


def _train_line(status: RunStatus) -> str:
    of_total = f"/{status.total_steps}" if status.total_steps else ""
    text = f"step {status.step}{of_total} ({format_percent(status.progress)}) "
    text += train_text(status.train or {})
    if status.eta_seconds is not None:
        text += f", {format_seconds(status.eta_seconds)} left"
    return text


def _clock(line: Line) -> str:
    moment = datetime.fromtimestamp(float(line["time"]), tz=UTC).astimezone()
    return f"{moment:%H:%M:%S}"


def sparkline(values: Sequence[float], *, width: int) -> str:
    """The values as blocks of eight heights, at most `width` of them (means of equal spans)."""
    finite = [v for v in values if v == v and abs(v) != float("inf")]
    if not finite:
        return ""
    count = min(width, len(finite))
    edges = [len(finite) * i // count for i in range(count + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(_SPARKS[min(7, int((m - low) / span * 8))] for m in means)
