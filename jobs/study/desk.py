"""What the slots of a study are told to do after what they say, and what becomes of the study."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.storage import Store
from jobs.errors import ClusterError, EnvironmentFault, Problem, SpecError
from jobs.record import Failure, Outcome, RunPaths, State
from jobs.spec import JobSpec
from jobs.study.engine import Engine, Leg
from jobs.study.events import Measured
from jobs.study.extension import checked_space, read_extensions
from jobs.study.log import StudySuperseded
from jobs.study.room import Room, most_slots
from jobs.study.setbacks import Setbacks
from jobs.study.slot import (
    Answer,
    Begun,
    Free,
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
from trainers.controls import POLL_SECONDS, last_request, requests_to
from trainers.records import read_attempts
from trainers.telemetry import Telemetry
from trainers.tracking.tracker import Point

_TELL_SECONDS = 30.0
_MOST_STILLBORN = 8
"""Processes of slots that may die one after the other before they begin."""

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
        """Once the study is to end before it is done: the state in which it does."""
        self._tests: dict[int, Tested] = {}
        """Of the winner, and of the job's own values."""
        self._tester: tuple[str, int] | None = None
        """The slot that measures one of them, and which."""
        self._slots: set[str] = set()
        """Those that live."""
        self._told_to_stop: set[int] = set()
        self._setbacks = Setbacks()
        self._stillborn = 0
        """Processes of slots that died one after the other before they had said anything."""
        self._test_deaths = Counter[int]()
        """Of slots that were to measure a trial's model."""
        self._summary = ""
        self._num_slots = most_slots(assignment.spec, engine.trials)
        self._useful = 0
        """Slots that it could use."""
        self._room = Room(assignment.spec, telemetry)
        self._broke: Exception | None = None
        self._heard = engine.trials.last_request
        """Number of the newest request for more trials that was heard."""
        self.deciding = threading.RLock()
        """Held by whoever asks the engine, or changes its trials."""
        self.is_over = False

    def count_slots(self) -> int:
        """Slots that the study may have with this driver, as it stands now. Trials that are asked
        for later, and finalists, share them."""
        self._num_slots = most_slots(self._spec, self._engine.trials)
        return self._num_slots

    # ---- called for each slot

    def hear(self, slot: str, said: Saying) -> Order | None:
        """What the slot is to do after what it has said; None where the study has no more for it.

        What goes wrong here ends the study: `ended` raises it.
        """
        self._slots.add(slot)
        self._stillborn = 0
        try:
            with self.deciding:
                return self._order(slot, said)
        except Exception as error:
            self._break(error)
            return None

    def died(self, slot: str, cause: str, *, counts: bool = True) -> None:
        """The slot's process has died; another one comes instead of it. Its trial pays for that
        with a retry if it `counts`."""
        try:
            with self.deciding:
                self._miss(slot, cause, counts=counts)
        except Exception as error:
            self._break(error)

    def _miss(self, slot: str, cause: str, *, counts: bool) -> None:
        has_spoken = slot in self._slots
        self._slots.discard(slot)
        self._setbacks.forget(slot)
        number = self._trial_of.pop(slot, None)
        if number is not None:
            self._warn(f"trial {number} broke off: {cause}")
            self._engine.lost(number, cause, counts=counts)
            self._give_up_if_hopeless()
        elif self._tester is not None and self._tester[0] == slot:
            tested, self._tester = self._tester[1], None
            self._test_deaths[tested] += counts
            deaths = self._test_deaths[tested]
            self._warn(f"the test of trial {tested} broke off: {cause}")
            assert self._spec.search is not None
            if deaths > self._spec.search.retries:
                told = f"the test of trial {tested} broke off {deaths} times, the last time as "
                self._tests[tested] = Tested(None, _infra(told + cause, "raise search.retries"))
        elif not has_spoken:
            self._stillborn += 1
            if self._stillborn & (self._stillborn - 1) == 0:  # 1, 2, 4, 8
                self._warn(f"the process of a slot died before it had a trial: {cause}")
            if self._stillborn >= _MOST_STILLBORN and not self._slots:
                told = f"{self._stillborn} processes of slots one after the other died: {cause}"
                raise EnvironmentFault(Problem(told, "see the driver's log for more"))

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
        while not ended.wait(POLL_SECONDS):
            try:
                self._look(is_taken)
            except (ClusterError, StudySuperseded) as error:
                self._break(error)
            except Exception as error:  # the store, or what keeps the cluster's state, is away
                _log.warning("requests to the study cannot be heard: %s", error)

    def _look(self, is_taken: Callable[[], bool]) -> None:
        """Hears what is asked of the study, and says what it waits for."""
        if is_taken():
            self._stop(State.FAILED_INFRA)
        asked = requests_to(
            self._store,
            self._paths,
            after=self._assignment.controls_seen,
            attempt=1,
            generation=self._assignment.generation,
        )
        if asked.stop:
            self._stop(State.STOPPED)
        elif asked.yields:
            self._stop(State.FAILED_INFRA)
        elif self._stops is not None:
            self._stop(self._stops)
        self.hear_extensions()
        self._say_room()

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
        with self.deciding:
            if self._stops is None:
                self._stops = state
                self._telemetry.state(State.STOPPING, "the trials save their states")
            untold = set(self._trial_of.values()) - self._told_to_stop
            if not self._slots:
                self.is_over = True
        for number in untold:
            request_stop(self._store, self._paths.trial(number).run_id, by="the study")
            self._told_to_stop.add(number)

    # ---- what is next

    def _order(self, slot: str, said: Saying) -> Order | None:
        """What the slot is to do; None where the study has no more for it."""
        match said:
            case Begun():
                self._engine.cloned(self._trial_of[slot])
                return Answer("continue", None)
            case Told(report):
                self._setbacks.clear()
                self._take_measures(self._trial_of[slot])
                decided = self._engine.reported(self._trial_of[slot], report)
                self._track()
                self._tell()
                if self._stops and decided.decision == "continue":
                    return Answer("pause", None)
                return Answer(decided.decision, decided.until)
            case Gone():
                self._take_leave(slot, self._trial_of.pop(slot), said)
            case Note(message):
                self._warn(f"trial {self._trial_of[slot]}: {message}")
                return Wait()
            case Tested(failure=failure):
                if failure is not None and failure.traceback:
                    _log.error("%s", failure.traceback)
                if self._tester is not None and self._tester[0] == slot:
                    self._tests[self._tester[1]], self._tester = said, None
        self._tell()
        if isinstance(said, Free | Gone) and said.is_taken and not self._stops:
            return Wait()  # when the node has gone, another process comes instead of it
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

    def _take_leave(self, slot: str, number: int, gone: Gone) -> None:
        outcome = gone.outcome
        failure = gone.crash if outcome is None else outcome.failure
        if failure is not None and (outcome is None or not failure.state.ends_retries):
            is_own = outcome is None and not failure.is_of_place
            self._take_setback(slot, number, failure, is_own=is_own)
        elif failure is not None:
            self._warn(f"trial {number} failed: {failure.problems[0][0]}")
            self._engine.failed(number, failure)
        elif self._engine.trials[number].status == "leaving":
            self._engine.left(number)
        elif not self._stops and outcome is not None:
            # Its node is taken: it begins again from its last checkpoint.
            counts = outcome.state is not State.RECOVERING
            self._engine.lost(number, f"it ended as {outcome.state} meanwhile", counts=counts)
        # Else it was stopped on the way: it goes on when the study is resumed.
        self._give_up_if_hopeless()

    def _take_setback(self, slot: str, number: int, failure: Failure, *, is_own: bool) -> None:
        """A trial broke off by a failure that another time may not meet. One that is not its own
        but its environment's, and that all slots have met since any trial has reported, ends the
        study for now, and no trial pays for it."""
        cause = failure.problems[0][0]
        self._warn(f"trial {number} broke off: {cause}")
        if is_own:
            self._engine.lost(number, cause)
            return
        self._setbacks.note(slot)
        is_general = self._setbacks.are_general(self._slots)
        self._engine.lost(number, cause, counts=not is_general)
        if is_general and self._engine.hopeless is None:
            told = f"no trial can go on, neither on this nor on another slot: {cause}"
            self._engine.give_up(_infra(told, failure.problems[0][1], where=failure.where))

    def _next(self, slot: str) -> Order | None:
        if not self._stops and self._setbacks.holds(slot):
            return Wait()
        while not self._stops and (leg := self._engine.work(slot)) is not None:
            try:
                order = Train(self._assigned(leg), leg.until)
            except SpecError as error:
                # Three keys or more that a rule of the job file binds to each other.
                self._take_leave(slot, leg.trial, Gone(_unfit(error)))
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
            told = "the driver's machine is taken; the states of all trials are saved"
            return _infra(told, None, where="driver")
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
            self._useful = min(self._num_slots, trials.unended)
            self._telemetry.state(State.RUNNING, self._summary + self._room.fewer)


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


def _infra(message: str, hint: str | None, *, where: str = "driver") -> Failure:
    return Failure(state=State.FAILED_INFRA, problems=((message, hint),), where=where, exit_code=3)


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
