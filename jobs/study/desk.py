"""What the slots of a study are told to do after what they say, and what becomes of the study."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.storage import StorageError, Store
from jobs.errors import ClusterError, SpecError
from jobs.record import Failure, Outcome, RunPaths, State
from jobs.spec import JobSpec
from jobs.study.engine import Engine, Leg
from jobs.study.events import Measured
from jobs.study.extension import checked_space, read_extensions
from jobs.study.room import Room
from jobs.study.slot import (
    Answer,
    Begun,
    Gone,
    Note,
    Order,
    Saying,
    Test,
    Tested,
    Told,
    Train,
    Wait,
)
from jobs.study.space import job_with, trial_seed
from jobs.study.trials import Trial, Trials
from jobs.submit import request_stop
from trainers.assignment import Assignment, DonorCheckpoint, TrialPlan
from trainers.controls import POLL_SECONDS, Requests, last_request, requests_to
from trainers.records import read_attempts
from trainers.telemetry import Telemetry
from trainers.tracking.tracker import Point

_MAX_SLOTS = 1024
_TELL_SECONDS = 30.0

_log = logging.getLogger("shoal.search")


class Desk:
    """Hears what slots say, asks the engine, and tells them what is next, until all is done."""

    def __init__(
        self, assignment: Assignment, store: Store, engine: Engine, telemetry: Telemetry
    ) -> None:
        self._assignment = assignment
        self._paths = RunPaths(assignment.run_id)
        self._store = store
        self._engine = engine
        self._telemetry = telemetry
        self._spec = assignment.spec
        self._trial_of: dict[str, int] = {}
        self._told_at = 0.0
        self._stops: State | None = None
        """STOPPED or RECOVERING, once the study is asked to end."""
        self._tests: dict[int, Tested] = {}
        """Of the winner, and of the job's own values."""
        self._tester: tuple[str, int] | None = None
        """The slot that measures one of them, and which."""
        self._slots: set[str] = set()
        """Those that live."""
        self._told_to_stop: set[int] = set()
        self._summary = ""
        self._useful = 0
        """Slots that it could use."""
        self._room = Room(assignment.spec, telemetry)
        self._broke: Exception | None = None
        self._heard = engine.trials.last_request
        """Number of the newest request for more trials that was heard."""
        self.deciding = threading.RLock()
        """Held by whoever asks the engine, or changes its trials."""
        self.is_over = False

    # ---- called for each slot

    def hear(self, slot: str, said: Saying) -> Order | None:
        """What the slot is to do after what it has said; None where the study has no more for it.

        What goes wrong here ends the study: `ended` raises it.
        """
        self._slots.add(slot)
        try:
            with self.deciding:
                return self._order(slot, said)
        except Exception as error:
            self._break(error)
            return None

    def died(self, slot: str, cause: str) -> None:
        """The slot's process has died; another one comes instead of it."""
        self._slots.discard(slot)
        try:
            with self.deciding:
                if self._tester is not None and self._tester[0] == slot:
                    self._tester = None
                number = self._trial_of.pop(slot, None)
                if number is not None:
                    self._warn(f"trial {number} broke off: {cause}")
                    self._engine.lost(number, cause)
                    self._give_up_if_hopeless()
        except Exception as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        self._broke, self.is_over = error, True

    # ---- in a thread of its own

    @contextmanager
    def listening(self, is_taken: Callable[[], bool]) -> Iterator[None]:
        """Hears requests to the study while the block lasts, and says what it waits for."""
        ended = threading.Event()
        thread = threading.Thread(
            target=self._listen, args=(ended, is_taken), name="shoal-study", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _listen(self, ended: threading.Event, is_taken: Callable[[], bool]) -> None:
        asked = Requests()
        while not ended.wait(POLL_SECONDS):
            try:
                asked = requests_to(
                    self._store,
                    self._paths,
                    after=self._assignment.controls_seen,
                    attempt=1,
                    generation=self._assignment.generation,
                )
                self.hear_extensions()
            except StorageError as error:
                _log.warning("requests to the study cannot be read: %s", error)
            except Exception as error:
                self._break(error)
            if asked.stop:
                self._stop(State.STOPPED)
            elif asked.yields or is_taken():
                self._stop(State.FAILED_INFRA)
            try:
                self._say_room()
            except ClusterError as error:
                self._break(error)

    def _say_room(self) -> None:
        """Says what slots wait for."""
        useful = 0 if self._stops is not None else self._useful
        self._room.say(
            len(self._slots), busy=len(self._trial_of), useful=useful, summary=self._summary
        )

    def hear_extensions(self) -> None:
        """Answers requests for more trials: gives them to the study, or says why it cannot."""
        for extension in read_extensions(self._store, self._paths, after=self._heard):
            with self.deciding:
                if self.is_over:
                    return  # it waits for the next driver
                if extension.request <= self._heard:
                    continue  # heard by the other thread
                self._heard = extension.request
                trials, wanted = self._engine.trials, extension.trials
                try:
                    space = checked_space(
                        self._spec,
                        trials,
                        used_up=self._engine.used_up,
                        wanted=wanted,
                        space=extension.space,
                    )
                except SpecError as error:
                    reason = error.problems[0].message
                    self._engine.refuse(extension.request, reason)
                    self._warn(f"the study is not extended: {reason}")
                    continue
                self._engine.extend(wanted, space, request=extension.request)
                self._tests, self._tester = {}, None  # another trial may win
                changed = ", from now on of another space" if space is not None else ""
                told = f"{wanted} trials in all{changed}, as {extension.by or 'someone'} asks"
                self._telemetry.event("extended", told)

    def _give_up_if_hopeless(self) -> None:
        if self._engine.hopeless is not None:
            self._stop(self._engine.hopeless.state)

    def _stop(self, state: State) -> None:
        """Trials save their states, and the study ends, to be resumed."""
        if self._stops is None:
            self._stops = state
            self._telemetry.state(State.STOPPING, "the trials save their states")
        for number in set(self._trial_of.values()) - self._told_to_stop:
            request_stop(self._store, self._paths.trial(number).run_id, by="the study")
            self._told_to_stop.add(number)
        if not self._slots:
            self.is_over = True

    # ---- what is next

    def _order(self, slot: str, said: Saying) -> Order | None:
        """What the slot is to do; None where the study has no more for it."""
        match said:
            case Begun():
                self._engine.cloned(self._trial_of[slot])
                return Answer("continue", None)
            case Told(report):
                self._take_measures(self._trial_of[slot])
                decided = self._engine.reported(self._trial_of[slot], report)
                self._track()
                self._tell()
                if self._stops and decided.decision == "continue":
                    return Answer("pause", None)
                return Answer(decided.decision, decided.until)
            case Gone():
                self._take_leave(self._trial_of.pop(slot), said)
            case Note(message):
                self._warn(f"trial {self._trial_of[slot]}: {message}")
                return Wait()
            case Tested(failure=failure):
                if failure is not None and failure.traceback:
                    _log.error("%s", failure.traceback)
                if self._tester is not None and self._tester[0] == slot:
                    self._tests[self._tester[1]], self._tester = said, None
        self._tell()
        return self._next(slot)

    def _take_measures(self, number: int) -> None:
        """Notes what the study's first trial has measured, where the job leaves that open."""
        batching = self._spec.batching
        names = ("max_tokens_per_microbatch", "launch_tokens")
        values = self._engine.trials[number].values
        open_ones = [
            name
            for name in names
            if getattr(batching, name) == "auto" and f"batching.{name}" not in values
        ]
        if not open_ones or self._engine.trials.measured is not None:
            return
        attempts = read_attempts(self._store, self._paths.trial(number))
        found = {name: getattr(attempts[-1], name) for name in open_ones} if attempts else {}
        if found and None not in found.values():
            self._engine.measured(**found)

    def _track(self) -> None:
        """Where the study stands, for its tracked run: its steps are the trials' reports."""
        trials = self._engine.trials
        values = {"study/trials": float(len(trials))}
        best = trials.winner()
        if best is not None and (score := trials.score(best)) is not None:
            values["study/best"] = score
        self._telemetry.track(Point(trials.reports, time.time(), values))

    def _take_leave(self, number: int, gone: Gone) -> None:
        outcome, failure = gone.outcome, gone.crash
        if failure is not None:
            self._warn(f"trial {number} broke off: {failure.problems[0][0]}")
            self._engine.lost(number, failure.problems[0][0])
        elif outcome is not None and outcome.failure is not None:
            self._warn(f"trial {number} failed: {outcome.failure.problems[0][0]}")
            self._engine.failed(number, outcome.failure)
        elif self._engine.trials[number].status == "leaving":
            self._engine.left(number)
        elif not self._stops and outcome is not None:
            # Nobody had asked it to: it begins again from its last checkpoint.
            self._engine.lost(number, f"it ended as {outcome.state} before it was told to")
        # Else it was stopped on the way: it goes on when the study is resumed.
        self._give_up_if_hopeless()

    def _next(self, slot: str) -> Order | None:
        while not self._stops and (leg := self._engine.work(slot)) is not None:
            try:
                order = Train(self._assigned(leg), leg.until)
            except SpecError as error:
                # Three keys or more that a rule of the job file binds to each other.
                self._take_leave(leg.trial, Gone(_unfit(error)))
                continue
            self._trial_of[slot] = leg.trial
            return order
        if self._trial_of:
            return Wait()
        if not self._stops and (test := self._next_test()) is not None:
            if self._tester is not None:
                return Wait()
            self._tester = slot, test.number
            self._telemetry.state(State.RUNNING, f"testing trial {test.number}")
            assert self._spec.data.test is not None
            run_id = self._paths.trial(test.number).run_id
            return Test(self._spec.store, run_id, self._spec.data.test)
        if not self._stops:
            heard = self._heard
            self.hear_extensions()
            if self._heard > heard:
                return self._next(slot)
        self.is_over = True
        return None

    def _next_test(self) -> Trial | None:
        """What is still to be measured on the test set: the winner, once, and what the job's own
        values have come to."""
        if self._spec.data.test is None:
            return None
        trials = self._engine.trials
        wanted = (trials.winner(), trials.baseline_model())
        return next((t for t in wanted if t is not None and t.number not in self._tests), None)

    def _assigned(self, leg: Leg) -> Assignment:
        paths = self._paths.trial(leg.trial)
        donor = None
        if leg.donor is not None:
            run_id = self._paths.trial(leg.donor.trial).run_id
            donor = DonorCheckpoint(run_id, leg.donor.step)
        assert self._spec.search is not None
        job = job_with(self._spec, leg.values, seed=trial_seed(self._spec, leg.repeat))
        trials = self._engine.trials
        if trials.measured is not None and trials[leg.trial].is_given_measures:
            job = _as_measured(job, trials.measured)
        return Assignment(
            spec=job,
            run_id=paths.run_id,
            generation=self._assignment.generation,
            controls_seen=last_request(self._store, paths),
            trial=TrialPlan(
                study=self._paths.run_id,
                metric=self._spec.search.metric,
                mode=self._spec.search.mode,
                donor=donor,
                leg=leg.number,
                gpu_share=self._spec.search.gpu_share,
            ),
        )

    # ---- the end

    def ended(self) -> Outcome:
        """What has become of the study; its best trial so far is named wherever there is one."""
        if self._broke is not None:
            raise self._broke
        failure = self._failure()
        state = State.SUCCEEDED
        if failure is not None:
            state = failure.state
        elif self._stops is not None:
            state = self._stops
        trials = self._engine.trials
        winner, own = trials.winner(), trials.baseline_model()
        found = {number: tested.evaluation for number, tested in self._tests.items()}
        return Outcome(
            attempt=0,
            state=state,
            step=winner.step if winner is not None else 0,
            failure=failure,
            trial=winner.number if winner is not None else None,
            test=found.get(winner.number) if winner is not None else None,
            before=found.get(own.number) if own is not None else None,
            tested_on="test" if found else None,
        )

    def _failure(self) -> Failure | None:
        """Why the study has failed, if it has."""
        if self._engine.hopeless is not None:
            return self._engine.hopeless
        if self._stops is State.STOPPED:
            return None
        if self._stops is not None:
            problem = ("the driver's machine is taken; the states of all trials are saved", None)
            return Failure(state=self._stops, problems=(problem,), where="driver", exit_code=3)
        if self._engine.trials.winner() is None:
            return _without_winner(self._spec, self._engine.trials)
        failures = (tested.failure for tested in self._tests.values())
        return next((failure for failure in failures if failure is not None), None)

    def _warn(self, message: str) -> None:
        self._telemetry.event("warning", message)

    def _tell(self) -> None:
        """Says where the study stands, now and then: its log tells it at any moment."""
        now = time.monotonic()
        if now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            trials = self._engine.trials
            self._summary = trials.summary()
            self._useful = min(most_slots(self._spec, self._engine.trials), trials.unended)
            self._telemetry.state(State.RUNNING, self._summary + self._room.fewer)


def most_slots(spec: JobSpec, trials: Trials) -> int:
    """As many as could ever be at work at once; Tune starts those that there is room for."""
    assert spec.search is not None
    grown = spec.search.model_copy(update={"trials": trials.wanted})
    return min(grown.most_at_once, _MAX_SLOTS)


def _without_winner(spec: JobSpec, trials: Trials) -> Failure:
    """Why no trial has a score."""
    assert spec.search is not None
    failures = [t.failure for t in trials.by_number.values() if t.failure is not None]
    if failures and len(failures) == len(trials):
        message, hint = failures[0].problems[0]
        what = "its only trial" if len(failures) == 1 else f"all {len(failures)} trials, the first"
        return failures[0].model_copy(
            update={"problems": ((f"the study has lost {what} as: {message}", hint),)}
        )
    closed = f" before the search ended: {trials.closed}" if trials.closed else ""
    problem = (
        f"no trial has had a {spec.search.metric} that is a number{closed}",
        "see what trials report in their folders, and lower optimizer.learning_rate in the space, "
        "or raise search.budget",
    )
    return Failure(state=State.FAILED_USER, problems=(problem,), where="driver")


def _unfit(error: SpecError) -> Outcome:
    """The end of a trial whose values make no job."""
    failure = Failure.of(error, where="driver")
    return Outcome(attempt=0, state=failure.state, step=0, failure=failure)


def _as_measured(job: JobSpec, measured: Measured) -> JobSpec:
    """A trial's job with what another one has measured, where it leaves that open itself."""
    found = {
        "max_tokens_per_microbatch": measured.max_tokens_per_microbatch,
        "launch_tokens": measured.launch_tokens,
    }
    given = {
        key: value
        for key, value in found.items()
        if value is not None and getattr(job.batching, key) == "auto"
    }
    return job.model_copy(update={"batching": job.batching.model_copy(update=given)})
