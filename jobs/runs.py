"""Reading a run from its folder, wherever the run is and whether or not it still goes on.

    RunReader(store, run_id)    the parts of one run, read when they are asked for
    list_run_ids(store)         the runs in a store

A part that is missing or unreadable never stops a reader: it is named in `RunReader.problems`.
Only a run whose job cannot be told is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from cluster.process import ProcessIdentity
from cluster.storage import DamagedObject, Head, ObjectMissing, Store, join_uri, read_whole
from jobs.errors import Problem, SpecError
from jobs.lines import Line, LineReader
from jobs.parse import recorded_spec
from jobs.record import (
    DAMAGED_RECORD_HINT,
    Amendment,
    Attempt,
    Control,
    Crash,
    Lease,
    LineKind,
    Manifest,
    Outcome,
    Record,
    Result,
    RunPaths,
    Source,
    best_manifest,
    live_manifests,
    merge_metrics,
)
from jobs.spec import JobSpec
from jobs.study.events import Event
from jobs.study.log import LogReader
from jobs.study.trials import Trial, Trials

R = TypeVar("R", bound=Record)

_MAX_PARALLEL_READS = 16
_TRIAL = re.compile(r"(.+)/trials/(\d{4,})")


class RunReader:
    """The parts of one run. Objects that never change are fetched once; `store` holds the runs."""

    def __init__(self, store: Store, run_id: str, *, ending: Result | None = None) -> None:
        """`ending` is the result of a run whose driver has not recorded it yet."""
        self._ending = ending
        self.store = store
        self.run_id = run_id
        self.paths = RunPaths(run_id)
        self._spec: tuple[int, JobSpec] | None = None
        self._records: dict[tuple[str, str], Record | None] = {}
        self._lines: dict[LineKind, tuple[LineReader, list[Line]]] = {}
        self._problems: list[str] = []
        self._study_log: LogReader | None = None
        study = _TRIAL.fullmatch(run_id)
        self.study = RunReader(store, study[1]) if study else None
        """The study whose trial this is; None: it is a run of its own."""
        self._trial_number = int(study[2]) if study else 0

    @property
    def uri(self) -> str:
        return join_uri(self.store.uri, self.run_id)

    @property
    def problems(self) -> list[str]:
        """What of the folder could not be read so far, each as a sentence."""
        return [
            *self._problems,
            *(p for reader, _ in self._lines.values() for p in reader.problems),
        ]

    # ------------------------------------------------------------------------------- the job

    def spec_head(self) -> Head:
        """Head of spec.json, whose time is that of the submission; SpecError if there is no run."""
        head = self.store.head(self.paths.spec)
        if head is None:
            raise SpecError(self._no_run())
        if self.store.head(self.paths.deleting) is not None:
            raise SpecError(
                Problem(
                    f"{self.uri} is being deleted",
                    f"finish it with: shoal delete {self.uri} --yes",
                )
            )
        return head

    def spec(self) -> JobSpec:
        """The job as it runs now: spec.json with all amendments applied.

        Raises SpecError if there is no such run, or where its job cannot be told any more.
        """
        if self._spec is None:
            self.spec_head()
        heads = self._heads(self.paths.amendments)
        amendments = self._read_all(heads, Amendment)
        if len(amendments) < len(heads):
            raise SpecError(
                Problem(
                    f"the job of {self.uri} cannot be told, as one of {len(heads)} changes to it, "
                    f"in {self.paths.amendments}, is damaged",
                    DAMAGED_RECORD_HINT,
                )
            )
        if self._spec is None or self._spec[0] != len(amendments):
            self._spec = len(amendments), self._parse_spec(amendments)
        return self._spec[1]

    def _parse_spec(self, amendments: Sequence[Amendment]) -> JobSpec:
        where = f"{self.uri}/spec.json"
        overrides = [o for amendment in amendments for o in amendment.overrides]
        parse = partial(recorded_spec, overrides=overrides, where=where)
        try:
            return read_whole(self.store, self.paths.spec, parse, hint="")
        except DamagedObject as error:
            raise SpecError(
                Problem(
                    f"{where} is not a job: {error.__cause__}",
                    f"{DAMAGED_RECORD_HINT}; remove this one with: shoal delete {self.uri}",
                )
            ) from error

    def _no_run(self) -> Problem:
        if self.study is not None:
            return Problem(
                f"there is no trial {self._trial_number} of {self.study.uri}, or it has not begun",
                f"see the study with: shoal status {self.study.uri}",
            )
        known = list_run_ids(self.store)
        near = difflib.get_close_matches(self.run_id, known, n=1)
        if near:
            hint = f"did you mean {near[0]}?"
        elif known:
            hint = f"see the runs of this store with: shoal list --store {self.store.uri}"
        else:
            hint = f"{self.store.uri} holds no runs; name another store with --store or SHOAL_STORE"
        return Problem(f"there is no run {self.run_id} in {self.store.uri}", hint)

    # ------------------------------------------------------------------------------- records

    def attempts(self) -> list[Attempt]:
        """Starts of the worker group, in order."""
        return self._attempts(self._heads(self.paths.attempts))

    def outcomes(self) -> dict[int, Outcome]:
        """How attempts ended, by their number; an attempt that was killed has none."""
        return self._outcomes(self._heads(self.paths.attempts))

    def crashes(self) -> dict[int, Crash]:
        """Why attempts broke off, by their number, where one of their ranks could tell."""
        return self._crashes(self._heads(self.paths.attempts))

    def attempts_with_ends(self) -> tuple[list[Attempt], dict[int, Outcome], dict[int, Crash]]:
        """`attempts`, `outcomes` and `crashes`, of one listing."""
        heads = self._heads(self.paths.attempts)
        return self._attempts(heads), self._outcomes(heads), self._crashes(heads)

    def _attempts(self, heads: Sequence[Head]) -> list[Attempt]:
        heads = [h for h in heads if self.paths.is_attempt(h.key)]
        return sorted(self._read_all(heads, Attempt), key=lambda a: a.attempt)

    def _outcomes(self, heads: Sequence[Head]) -> dict[int, Outcome]:
        heads = [h for h in heads if h.key.endswith("-outcome.json")]
        return {o.attempt: o for o in self._read_all(heads, Outcome)}

    def _crashes(self, heads: Sequence[Head]) -> dict[int, Crash]:
        heads = [h for h in heads if h.key.endswith("-crash.json")]
        return {c.attempt: c for c in self._read_all(heads, Crash)}

    def manifests(self) -> list[Manifest]:
        """Manifests of all checkpoints that still exist, by step; superseded ones included."""
        heads = self._heads(self.paths.checkpoints, "/manifest.json")
        return sorted(self._read_all(heads, Manifest), key=lambda m: m.step)

    def live_manifests(self) -> list[Manifest]:
        """Checkpoints in the lineage of the newest attempt, by step."""
        # Manifests first: an attempt that starts in between supersedes some, never adds any.
        manifests = self.manifests()
        return live_manifests(manifests, self.attempts())

    def best_manifest(self) -> Manifest | None:
        return best_manifest(self.live_manifests())

    def controls(self) -> list[Control]:
        return self._read_all(self._heads(self.paths.control), Control)

    def last_stop(self) -> int:
        """Number of the newest request to stop; 0: there is none."""
        for head in sorted(self._heads(self.paths.control), key=lambda h: h.key, reverse=True):
            number = head.key.rpartition("/")[2].removesuffix(".json")
            if number.isdecimal() and any(
                control.kind == "stop" for control in self._read_all([head], Control)
            ):
                return int(number)
        return 0

    def lease(self) -> Lease | None:
        return self._read_now(self.paths.lease, Lease)

    def result(self) -> Result | None:
        """How the newest driver that ended has ended; None if none has."""
        return self._ending or self._read_now(self.paths.result, Result)

    # -------------------------------------------------------------------------------- studies

    def study_events(self) -> list[Event]:
        """All that has happened in a study so far; of a run that is none, nothing."""
        if self._study_log is None:
            self._study_log = LogReader(self.store, self.paths)
        try:
            return self._study_log.events()
        except DamagedObject as error:
            self._complain(f"what has happened in the study cannot be told: {error}")
            return []

    def trial(self, number: int) -> RunReader:
        """A trial of a study, which is a run too."""
        return RunReader(self.store, self.paths.trial(number).run_id)

    def as_trial(self) -> Trial | None:
        """A trial as its study has it; None for a run that is none, or that the study does not
        know."""
        search = self.study.spec().search if self.study is not None else None
        if self.study is None or search is None:
            return None
        trials = Trials(search, self.study.study_events())
        return trials.by_number.get(self._trial_number)

    # --------------------------------------------------------------------------------- lines

    def events(self) -> list[Line]:
        """All events so far, by time, each with its `generation`."""
        generation = {a.attempt: a.generation for a in self.attempts()}
        lines = self._all_lines("events")
        for line in lines:
            if line.get("generation") is None:
                line["generation"] = generation.get(line["attempt"])
        return lines

    def metrics_lines(self) -> list[Line]:
        """All lines of metrics so far, by time; attempts that were superseded included."""
        complete = []
        for line in self._all_lines("metrics"):
            try:
                int(line["step"]), int(line["attempt"])
                is_whole = line["kind"] != "evaluation" or isinstance(line["metrics"], dict)
                if line["kind"] == "skipped":
                    int(line["first_item"]), int(line["next_item"])
            except (KeyError, TypeError, ValueError):
                is_whole = False
            if not is_whole:
                self._complain("a line of metrics has no step, attempt, kind or metrics")
                continue
            complete.append(line)
        return complete

    def metrics(self) -> list[Line]:
        """Lines of metrics in order of steps, of each step only what the final weights saw."""
        return merge_metrics(self.metrics_lines(), self.attempts())

    def log_lines(self, *, rank: int | None = None, attempt: int | None = None) -> LineReader:
        """A new reader of log lines, of all writers or of one rank or attempt."""

        def wanted(source: Source) -> bool:
            if rank is None and attempt is None:
                return True
            return (
                source.rank is not None
                and rank in (None, source.rank)
                and attempt in (None, source.number)
            )

        return LineReader(self.store, self.paths, "logs", wanted=wanted)

    def newest_lines(self, kind: LineKind) -> list[Line]:
        """The last few lines of a kind, with at most two reads of objects."""
        reader = LineReader(self.store, self.paths, kind)
        lines = reader.newest()
        for problem in reader.problems:
            self._complain(problem)
        return lines

    def _all_lines(self, kind: LineKind) -> list[Line]:
        if kind not in self._lines:
            self._lines[kind] = LineReader(self.store, self.paths, kind), []
        reader, lines = self._lines[kind]
        new = reader.new()
        if new:
            lines.extend(new)
            lines.sort(key=lambda line: float(line["time"]))
        return lines

    # ------------------------------------------------------------------------------- reading

    def _heads(self, prefix: str, suffix: str = ".json") -> list[Head]:
        return [h for h in self.store.list(prefix) if h.key.endswith(suffix)]

    def _read_all(self, heads: Sequence[Head], kind: type[R]) -> list[R]:
        # By etag too: an attempt's record is written again once it knows its model and data.
        missing = [h for h in heads if (h.key, h.etag) not in self._records]
        if missing:
            with ThreadPoolExecutor(min(_MAX_PARALLEL_READS, len(missing))) as pool:
                read = list(pool.map(lambda head: self._read_now(head.key, kind), missing))
            for head, record in zip(missing, read, strict=True):
                self._records[head.key, head.etag] = record
        found = (self._records[head.key, head.etag] for head in heads)
        return [record for record in found if isinstance(record, kind)]

    def _read_now(self, key: str, kind: type[R]) -> R | None:
        try:
            return read_whole(self.store, key, kind.model_validate_json, hint="")
        except ObjectMissing:
            return None
        except DamagedObject:
            self._complain(f"{join_uri(self.store.uri, key)} is not a readable {kind.__name__}")
            return None

    def _complain(self, problem: str) -> None:
        if problem not in self._problems:
            self._problems.append(problem)


def list_run_ids(store: Store) -> list[str]:
    """Ids of the runs in a store, sorted; a folder without spec.json is none."""
    folders = list(store.list_folders())
    if not folders:
        return []
    with ThreadPoolExecutor(min(_MAX_PARALLEL_READS, len(folders))) as pool:
        heads = pool.map(lambda folder: store.head(RunPaths(folder).spec), folders)
        return sorted(f for f, head in zip(folders, heads, strict=True) if head is not None)


def driver_has_ended(lease: Lease) -> bool | None:
    """Whether the process that holds the lease is gone; None where that cannot be told here."""
    holder = ProcessIdentity(host=lease.host, boot=lease.boot, pid=lease.pid, started=lease.started)
    return holder.has_ended
