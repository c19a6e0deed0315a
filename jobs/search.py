"""Ray Tune: the slots of a study, and who tells them what to do.

    search          the study's outcome
      _Desk         [driver] hears what slots say, asks the engine, and tells them what is next
      Slot          [its own process] trains trials, one after the other

A slot is what Tune calls a trial: a process with the resources that a trial of the study needs, as
many as the cluster has room for and the study has work for. Tune starts them, again where one has
died, and more of them where the cluster grows. It remembers nothing of the study: the engine
decides from the study's log alone.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.stopper import NoopStopper, Stopper

from cluster.ray_runtime import (
    describe_shortage,
    free_on_nodes,
    is_attached,
    resources_of,
    room_for_trials,
    staying_nodes,
    use_settings,
)
from cluster.storage import StorageError, Store, open_store
from jobs.errors import ClusterError, Problem, SpecError
from jobs.record import Failure, Outcome, RunPaths, State
from jobs.spec import JobSpec
from jobs.study.engine import Engine, Leg
from jobs.study.events import Measured
from jobs.study.extension import checked_space, read_extensions
from jobs.study.log import StudyLog
from jobs.study.retention import Holdings, Sweeper
from jobs.study.samplers import make_sampler
from jobs.study.schedulers import make_scheduler
from jobs.study.slot import (
    Answer,
    Begun,
    Gone,
    Note,
    Order,
    Saying,
    SlotWork,
    Test,
    Tested,
    Told,
    Train,
    Wait,
)
from jobs.study.space import job_with, space_of, trial_seed
from jobs.study.trials import Trial, Trials
from jobs.submit import request_stop
from trainers.assignment import Assignment, DonorCheckpoint, TrialPlan
from trainers.controls import POLL_SECONDS, Requests, last_request, requests_to
from trainers.patience import Patience
from trainers.records import read_attempts, read_live_manifests
from trainers.telemetry import Telemetry

_SLOT_SECONDS = 20.0
"""How long slots may take to start before it is said what they wait for."""
_MAX_SLOTS = 1024

_TELL_SECONDS = 30.0

_log = logging.getLogger("shoal.search")


def search(
    assignment: Assignment,
    telemetry: Telemetry,
    *,
    python: str | None = None,
    is_taken: Callable[[], bool] = lambda: False,
) -> Outcome | Failure:
    """Makes the study's trials on the Ray cluster to which this process is attached, to its end.

    A request to the run, or `is_taken` (this process's own machine is to go), ends it with the
    states of its trials saved; requests for more trials are met, also those that came before.
    `python` is how the workers of trials with several are started, as in `trainers.fit`. Raises
    what keeps its log from being written.
    """
    spec, paths = assignment.spec, RunPaths(assignment.run_id)
    patience = Patience(limit_seconds=60 * spec.retries.wait_minutes)
    impatient = open_store(spec.store.uri, spec.store.access)
    store = patience.store(impatient)
    study_log = StudyLog(store, paths, generation=assignment.generation)

    def is_saved(trial: int, step: int) -> bool:
        live = read_live_manifests(store, paths.trial(trial))
        return bool(live) and live[-1].step >= step

    engine = make_engine(spec, study_log, is_saved=is_saved)
    desk = _Desk(assignment, store, engine, telemetry)
    desk.hear_extensions()
    assert spec.search is not None
    sweeper = Sweeper(
        Holdings(spec.search, engine.trials), impatient, paths, telemetry, deciding=desk.deciding
    )
    with (
        tempfile.TemporaryDirectory(prefix="shoal-tune-") as notes,
        desk.listening(is_taken),
        sweeper,
    ):
        tune.Tuner(
            tune.with_resources(Slot, slot_resources(spec)),
            param_space={"python": python, "is_own_cluster": not is_attached()},
            tune_config=tune.TuneConfig(
                scheduler=desk, num_samples=most_slots(spec, engine.trials)
            ),
            run_config=tune.RunConfig(
                name="slots",
                storage_path=notes,
                stop=_EndOfStudy(desk),
                failure_config=tune.FailureConfig(max_failures=-1),
                # A slot has no state of its own.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
    ended = desk.ended()
    if ended.state is State.SUCCEEDED:
        sweeper.sweep()
    return ended


def make_engine(spec: JobSpec, log: StudyLog, *, is_saved: Callable[[int, int], bool]) -> Engine:
    """The study of a job, as far as its log tells it."""
    assert spec.search is not None
    events = log.open()
    space = space_of(spec)
    return Engine(
        spec.search,
        make_sampler(spec.search, space, spec.search.seed),
        make_scheduler(spec.search, space),
        log,
        events,
        is_saved=is_saved,
        gpus=spec.gpus_held,
    )


def slot_resources(spec: JobSpec) -> PlacementGroupFactory:
    """The room of one slot: its own for a trial in its process, else a bundle for each worker of
    the trial and none for the slot, so that the n-th worker is in the n-th bundle."""
    assert spec.search is not None
    each = resources_of(spec.workers, gpu_share=spec.search.gpu_share)
    if spec.workers.count == 1:
        return PlacementGroupFactory([each])
    return PlacementGroupFactory([{}, *[each] * spec.workers.count], strategy="PACK")


def most_slots(spec: JobSpec, trials: Trials) -> int:
    """As many as could ever be at work at once; Tune starts those that there is room for."""
    assert spec.search is not None
    grown = spec.search.model_copy(update={"trials": trials.wanted})
    return min(grown.most_at_once, _MAX_SLOTS)


# ------------------------------------------------------------------------------------- the desk


class _Desk(FIFOScheduler):
    """Tune's scheduler, whose trials are slots: none is ever paused, and all end with the study."""

    def __init__(
        self, assignment: Assignment, store: Store, engine: Engine, telemetry: Telemetry
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        self._said = ""
        self._summary = ""
        self._fewer = ""
        """That there are fewer slots than the study could use, if so."""
        self._useful = 0
        """Slots that it could use."""
        self._living = 0
        self._living_since = 0.0
        self._broke: Exception | None = None
        self._heard = engine.trials.last_request
        """Number of the newest request for more trials that was heard."""
        self.deciding = threading.RLock()
        """Held by whoever asks the engine, or changes its trials."""
        self.is_over = False

    def __reduce__(self) -> tuple[Any, ...]:
        """In Tune's notes of itself, from which nobody restores: the study's log is what counts."""
        return FIFOScheduler, ()

    # ---- called by Tune

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """A slot has said something; it waits for its order."""
        self._slots.add(trial.trial_id)
        try:
            with self.deciding:
                order = self._order(trial.trial_id, result["said"])
        except Exception as error:
            # Tune would wrap it: `ended` raises it as it is.
            self._broke, self.is_over, order = error, True, None
        if order is None:
            return str(TrialScheduler.STOP)
        trial.temporary_state.ray_actor.hear.remote(order)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """The process of a slot has died; Tune starts another one."""
        self._slots.discard(trial.trial_id)
        if self._tester is not None and self._tester[0] == trial.trial_id:
            self._tester = None
        number = self._trial_of.pop(trial.trial_id, None)
        if number is not None:
            cause = _last_line(trial.get_error())
            self._warn(f"trial {number} broke off: {cause}")
            with self.deciding:
                self._engine.lost(number, cause)
                self._give_up_if_hopeless()
        super().on_trial_error(tune_controller, trial)

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
        without_slots = time.monotonic()
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
                self._broke, self.is_over = error, True
            if asked.stop:
                self._stop(State.STOPPED)
            elif asked.yields or is_taken():
                self._stop(State.FAILED_INFRA)
            if self._slots:
                without_slots = time.monotonic()
                self._say_fewer()
            else:
                self._say_waiting(time.monotonic() - without_slots)

    def hear_extensions(self) -> None:
        """Gives the study the trials that were asked for and that it has not got yet."""
        for extension in read_extensions(self._store, self._paths, after=self._heard):
            with self.deciding:
                if self.is_over:
                    return  # it waits for the next driver
                if extension.request <= self._heard:
                    continue  # heard by the other thread
                self._heard = extension.request
                trials, wanted = self._engine.trials, extension.trials
                try:
                    space = checked_space(self._spec, trials, wanted=wanted, space=extension.space)
                except SpecError as error:
                    self._warn(f"the study is not extended: {error.problems[0].message}")
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

    def _say_waiting(self, seconds: float) -> None:
        workers, limit = self._spec.workers, 60 * self._spec.retries.wait_minutes
        if seconds < _SLOT_SECONDS:
            return
        assert self._spec.search is not None
        shortage = describe_shortage(
            workers, staying_nodes(), free=free_on_nodes(), gpu_share=self._spec.search.gpu_share
        )
        if seconds > limit:
            self._broke = ClusterError(
                Problem(
                    f"no trial could be started in {limit / 60:g} minutes: {shortage}",
                    "lower workers.count, workers.cpus, workers.gpus or workers.memory_gib, add "
                    "nodes, or raise retries.wait_minutes",
                )
            )
            self.is_over = True
        elif shortage != self._said:
            self._said = shortage
            self._telemetry.state(State.STARTING, f"no slot for a trial yet: {shortage}")

    def _say_fewer(self) -> None:
        """Says it where the study could use more slots than it has."""
        living = len(self._slots)
        if living != self._living:
            self._living, self._living_since = living, time.monotonic()
        # A slot without a trial shows that no other could be used.
        lacking = self._useful > living == len(self._trial_of)
        if not lacking or self._stops is not None:
            fewer = ""
        elif time.monotonic() - self._living_since < _SLOT_SECONDS:
            return  # more of them may be starting
        else:
            now = living + room_for_trials(self._spec, free_on_nodes())
            idle = room_for_trials(self._spec, staying_nodes())
            fewer = fewer_slots(living, self._useful, room=idle, room_now=now)
        is_new, self._fewer = fewer not in ("", self._fewer), fewer
        if is_new:
            self._telemetry.state(State.RUNNING, self._summary + fewer)

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
            self._telemetry.state(State.RUNNING, self._summary + self._fewer)


class _EndOfStudy(Stopper):
    """Ends all slots once the study is over, those that wait for room included."""

    def __init__(self, desk: _Desk) -> None:
        self._desk = desk

    def __reduce__(self) -> tuple[Any, ...]:
        """As the desk's."""
        return NoopStopper, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._desk.is_over


def fewer_slots(living: int, useful: int, *, room: int, room_now: int) -> str:
    """`; 2 of 8 slots: room for 2`. Pure. `room` is that for slots if the cluster were idle,
    `room_now` that which slots have or could have."""
    held = ", of which something else holds part" if room_now < min(room, useful) else ""
    return f"; {living} of {useful} slots: room for {room}{held}"


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


def _last_line(error: BaseException | str | None) -> str:
    lines = str(error or "its process died").strip().splitlines()
    return lines[-1] if lines else "its process died"


class Slot(tune.Trainable):
    """A slot's process, as Tune wants it."""

    def setup(self, config: dict[str, Any]) -> None:
        use_settings()
        self._work = SlotWork(**config)

    def hear(self, order: Order) -> None:
        """Called by the desk, before the next step."""
        self._work.hear(order)

    def step(self) -> dict[str, Any]:
        return {"said": self._work.say()}
