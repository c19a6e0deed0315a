"""What each rank runs, over a `Session`: from an assignment to an outcome.

    train_worker    claim the attempt, prepare, train, test the best model
      prepare       index, tokenizer, model, optimizer, restore
      Surroundings  what the loop needs from storage and telemetry

Nothing here knows who started the ranks. An error that a restart would meet again ends the attempt
on all ranks with an outcome; any other error is raised, and whoever started the ranks may retry.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from cluster.storage import ObjectMissing, StorageError, Store, open_store
from jobs.errors import ShoalError, TrainingError
from jobs.record import (
    Failure,
    Manifest,
    Outcome,
    RunPaths,
    Source,
    State,
    by_merit,
)
from trainers import watchdog
from trainers.agreement import AgreedFailure, Agreement
from trainers.assignment import Assignment, EvaluationReport, Verdict
from trainers.attempt import Claim, as_cut, claim_attempt
from trainers.block_training import compile_ahead, compiler_settings
from trainers.checkpoint import CheckpointWriter, Moment, small_files
from trainers.controls import ControlPoller, Requests, requests_to
from trainers.data.cache import NodeCache, cache_folder
from trainers.data.stream import RankBatch, RankStream
from trainers.data.weighting import Copies
from trainers.evaluation import BrokenOff, measure
from trainers.fence import Fence, Superseded
from trainers.kept import Kept
from trainers.last_words import LastWords
from trainers.launch_cost import measured_launch_tokens
from trainers.local_copy import TICKING, DamagedPart
from trainers.loop import Ending, Progress, SkippedStep, StepFacts, train
from trainers.memory import (
    MicrobatchTooLarge,
    is_out_of_memory,
    keep_freed_memory,
    room_fault,
)
from trainers.microbatch import Cutting
from trainers.microbatch_size import tried_max_tokens
from trainers.parallel import float32_products, plain, trained_parameters
from trainers.patience import Patience
from trainers.preparation import DataSet, build_model, prepare, replicated
from trainers.pulse import Pulse
from trainers.records import read_live_manifests
from trainers.restore import checkpoint_copy, drop_checkpoint_copies
from trainers.saving import Saving
from trainers.session import Session
from trainers.stragglers import Straggler, Stragglers
from trainers.tasks.task import Evaluation
from trainers.telemetry import IMPATIENT, Telemetry, log
from trainers.time_account import TimeAccount
from trainers.tracking.feeds import start_feeds
from trainers.tracking.tracker import Ended, Parameters
from trainers.versions import versions
from trainers.watchdog import Hang, Watchdog

_LISTEN_SECONDS = 5.0
"""How long a rank waits for rows before it looks for requests by itself, and from look to look."""
_EVALUATION_ROWS = 512
"""Rows of an evaluation that are fetched at once; they are cut by tokens afterwards."""

Given = TypeVar("Given")


def train_worker(session: Session, assignment: Assignment, *, kept: Kept | None = None) -> Outcome:
    """Trains to the end, to a request or to an error that a restart would meet again.

    Called by every rank of the group; the outcome is the same on all of them. `kept` is what this
    process has of earlier trials.
    """
    spec = assignment.spec
    with (
        Watchdog(limit_seconds=60 * spec.retries.hang_minutes) as watch,
        Pulse(watch, rank=session.rank, world_size=session.world_size),
        float32_products(spec.model, session.device),
        compiler_settings(spec.model),
    ):
        return _work(session, assignment, watch, kept)


def _work(session: Session, assignment: Assignment, watch: Watchdog, kept: Kept | None) -> Outcome:
    spec = assignment.spec
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(spec.workers.cpus)
    if session.device.type == "cpu":
        keep_freed_memory()
    account = TimeAccount()
    patience = Patience(limit_seconds=60 * spec.retries.wait_minutes)
    paths = RunPaths(assignment.run_id)
    with account.spent("start"):
        agreement = Agreement(rank=session.rank, world_size=session.world_size)
        open_place = open_store if kept is None else kept.store
        store = open_place(spec.store.uri, spec.store.access, transfer=TICKING)
        impatient = open_place(spec.store.uri, spec.store.access, transfer=IMPATIENT)
        claim = claim_attempt(
            session,
            assignment,
            agreement,
            patience.store(store),
            paths,
            started_at=account.opened_at,
        )
    if isinstance(claim, Outcome):
        return claim
    spec = as_cut(spec, claim.attempt)
    if assignment.trial is not None:
        spec = spec.model_copy(update={"data": spec.data.model_copy(update={"test": None})})
    assignment = replace(assignment, spec=spec, controls_seen=claim.controls_seen)
    source = Source(claim.attempt.attempt, session.rank)
    with contextlib.ExitStack() as stack:
        with account.spent("start"):
            telemetry = stack.enter_context(
                Telemetry(impatient, paths, source, rows=spec.train.log_rows)
            )
            if session.rank == 0:
                number, warn = claim.attempt.attempt, telemetry.warn
                telemetry.with_trackers(
                    start_feeds(assignment, impatient, attempt=number, warn=warn)
                )
            rank = _Rank(
                session, assignment, agreement, store, patience, paths, telemetry, account, kept
            )
        watch.tell = rank.tell_hang
        outcome = rank.run(claim)
        if assignment.trial is not None:
            # Of any other run the driver tells it, with what it has come to.
            telemetry.track(Ended.of_trial(outcome))
        if session.rank == 0:
            try:
                key = paths.outcome(claim.attempt.attempt)
                patience.store(store).write(key, outcome.to_bytes())
            except StorageError as error:
                if outcome.failure is None:
                    raise
                # Why the attempt failed matters more than that its record cannot be written.
                log.error("the outcome cannot be written: %s", error)
        return outcome


# -------------------------------------------------------------------------------------- a rank


class _Rank:
    """One rank's attempt; also the loop's surroundings."""

    def __init__(
        self,
        session: Session,
        assignment: Assignment,
        agreement: Agreement,
        store: Store,
        patience: Patience,
        paths: RunPaths,
        telemetry: Telemetry,
        account: TimeAccount,
        kept: Kept | None,
    ) -> None:
        self._session = session
        self._assignment = assignment
        self._spec = assignment.spec
        self._agreement = agreement
        self._impatient_store = store
        """For those who do not wait for it: what they cannot do now, they try again by themselves,
        or count."""
        self._patience = patience
        self._store = patience.store(store)
        self._paths = paths
        self._telemetry = telemetry
        self._account = account
        self._kept = kept
        self._state, self._doing = State.STARTING, "starting"
        patience.tell = self._tell_wait
        self._cache = NodeCache(
            cache_folder() / "rows", limit_bytes=int(self._spec.data.cache_gib * 2**30)
        )
        self._poller: ControlPoller | None = None
        self._streams: list[RankStream] = []
        """Those that are open."""
        self._told_at = time.monotonic()
        self._waited_before = 0.0
        self._stragglers = Stragglers()
        self._stragglers_told: set[int] = set()
        self._is_stopping = False
        self._is_yielding = False
        self._heard = Requests()
        """What this rank has heard by itself, while it waited."""
        self._listened_at = 0.0

    # ---- the attempt, top down

    def run(self, claim: Claim) -> Outcome:
        """The attempt's outcome, the same on all ranks."""
        self._attempt = claim.attempt
        self._last_words = LastWords(
            self._impatient_store,
            self._paths,
            self._telemetry,
            attempt=claim.attempt.attempt,
            where=self._where(),
        )
        self._step = claim.attempt.restored_step or 0
        self._before: dict[str, Any] | None = None
        try:
            with self._account.spent("start"):
                self._say_start(claim)
                if claim.hopeless is not None:
                    return self._failed(claim.hopeless)
                prepared = self._together(
                    lambda: prepare(
                        self._session,
                        self._spec,
                        self._store,
                        self._paths,
                        claim.restored,
                        patience=self._patience,
                        kept=self._kept,
                    )
                )
                self._prepared = replicated(prepared, self._session)
                self._compile_ahead()
                self._measure_microbatches()
                self._describe_attempt()
                self._drop_checkpoint_copies()
                # Now, as it needs a folder for temporary files: training does not.
                small = self._together(self._small_files)
            return self._with_helpers(small)
        except AgreedFailure as agreed:
            return self._failed(agreed.failure)
        except TrainingError as error:
            # The gradient is the same on all ranks, and so is this error.
            return self._failed(Failure.of(error, where=self._where()))
        except MicrobatchTooLarge as error:
            told = self._last_words.out_of_memory(error, step=self._step, spec=self._spec)
            raise told from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise self._last_words.without_room(error) from error

    def _compile_ahead(self) -> None:
        """Compiles the model, where the job asks for it, before its steps are timed."""
        if not self._spec.model.compile:
            return
        watchdog.tick("compiles the model")
        state, doing = self._state, self._doing
        self._enter(state, "compiling the model's blocks")
        compile_ahead(
            self._prepared.trainee,
            Cutting.of(self._spec.batching),
            most_row_tokens=self._spec.task.max_tokens,
        )
        self._enter(state, doing)

    def _measure_microbatches(self) -> None:
        """Finds out how large a micro-batch may be, and what it costs besides its tokens, where the
        job leaves it open and no attempt has done so."""
        spec = self._spec
        if spec.batching.max_tokens_per_microbatch == "auto":
            rows = -(-spec.batching.global_batch_size // spec.workers.fewest)
            found = tried_max_tokens(
                self._prepared.trainee,
                self._agreement,
                most_row_tokens=spec.task.max_tokens,
                most_tokens=rows * spec.task.max_tokens,
                local_world_size=self._session.local_world_size,
            )
            self._attempt = self._attempt.model_copy(update={"max_tokens_per_microbatch": found})
            self._spec = as_cut(self._spec, self._attempt)
        if self._spec.batching.launch_tokens == "auto":
            found = measured_launch_tokens(
                self._prepared.trainee,
                Cutting.of(self._spec.batching),
                self._agreement,
                most_row_tokens=self._spec.task.max_tokens,
            )
            self._attempt = self._attempt.model_copy(update={"launch_tokens": found})
            self._spec = as_cut(self._spec, self._attempt)

    def _small_files(self) -> dict[str, bytes]:
        """Files of each checkpoint that the first rank writes."""
        if self._session.rank:
            return {}
        prepared = self._prepared
        return small_files(plain(prepared.trainee.model), prepared.task, record=prepared.adapter)

    def _with_helpers(self, small: Mapping[str, bytes]) -> Outcome:
        """`_train_and_test` with a checkpoint writer and, on rank 0, an ear for requests."""
        with self._account.spent("start"):
            fence = Fence(
                self._impatient_store,
                RunPaths(self._assignment.leaseholder),
                generation=self._attempt.generation,
            )
            self._fence = fence
            writer = CheckpointWriter(
                self._spec,
                self._impatient_store,
                self._paths,
                self._telemetry,
                small_files=small,
                attempt=self._attempt,
                rank=self._session.rank,
                scratch=cache_folder(),
                fence=fence,
            )
            self._saving = Saving(
                self._spec, writer, self._agreement, self._telemetry, raise_any=self._raise_any
            )
        with contextlib.ExitStack() as stack:
            stack.callback(writer.close)
            stack.callback(self._close_streams)
            if self._session.rank == 0:
                poller = ControlPoller(
                    self._impatient_store,
                    self._paths,
                    after=self._assignment.controls_seen,
                    attempt=self._attempt.attempt,
                    fence=fence,
                )
                self._poller = stack.enter_context(poller)
            return self._train_and_test()

    def _train_and_test(self) -> Outcome:
        prepared = self._prepared
        self._before = prepared.before
        is_tested = self._assignment.trial is None
        if prepared.progress.finished and is_tested and self._session.rank == 0:
            self._telemetry.event(
                "warning",
                f"training had ended at step {prepared.progress.step} of "
                f"{prepared.plan.total_steps}; what is left is the test",
                step=prepared.progress.step,
            )
        if self._before is None and prepared.progress.step == 0:
            self._before = self._evaluate_untrained()
        with self._account.spent("start"):
            self._enter(State.RUNNING, "training")
        self._told_at = time.monotonic()
        with self._account.spent("compute"):
            ending, progress, error = train(
                self._spec,
                prepared.plan,
                prepared.trainee,
                prepared.progress,
                self,
                agreement=self._agreement,
                time=self._account,
                trial=self._assignment.trial,
            )
        with self._account.spent("checkpoint"):
            self._saving.make_durable()
        with self._account.spent("finish"):
            # Last, as a thread of them may hang in a request.
            self._close_streams()
        if ending is Ending.FAILED:
            self._raise_any(error)
        if ending is Ending.STOPPED:
            return self._outcome(State.STOPPED, best_step=progress.best_step)
        if ending is Ending.YIELDED:
            return self._outcome(State.RECOVERING, best_step=progress.best_step)
        if ending is Ending.PRUNED:
            return self._outcome(State.PRUNED, best_step=progress.best_step)
        try:
            tested = self._test_best(progress)
        except BrokenOff as broken:
            # The state is stored: what is left for the next attempt is the test.
            state = State.STOPPED if broken.stops else State.RECOVERING
            return self._outcome(state, best_step=progress.best_step)
        return self._outcome(State.SUCCEEDED, best_step=progress.best_step, test=tested)

    def _evaluate_untrained(self) -> dict[str, Any] | None:
        data, name = self._tested_on()
        if data is None:
            return None
        with self._account.spent("evaluation"):
            try:
                evaluation = self._measure(plain(self._prepared.trainee.model), data)
            except BrokenOff:
                return None  # the loop hears of it before its first step
            self._tell_evaluation(evaluation, name, step=0)
        return evaluation.to_json()

    def _test_best(self, progress: Progress) -> dict[str, Any] | None:
        """Evaluation of the best model, or of the last without a validation set."""
        data, name = self._tested_on()
        if data is None:
            return None
        with self._account.spent("finish"):
            step, model = self._best_model(progress)
            evaluation = self._measure(model, data)
        return evaluation.to_json() | {"step": step, "split": name}

    def _best_model(self, progress: Progress) -> tuple[int, torch.nn.Module]:
        """Step and weights of the best checkpoint; a damaged one is skipped for the next best."""
        own = progress.step, plain(self._prepared.trainee.model)
        if progress.best_step in (None, progress.step):
            return own
        metric, mode, _ = self._spec.best
        for manifest in self._by_merit(metric, mode):
            if manifest.step == progress.step:
                return own
            model = self._together(partial(self._model_of, manifest))
            is_whole = all(self._agreement.gather(model is not None))
            self._drop_checkpoint_copies()
            if model is not None and is_whole:
                return manifest.step, model
            if self._session.rank == 0:
                self._telemetry.event(
                    "warning",
                    f"the checkpoint of step {manifest.step} is damaged; the next best is tested",
                    step=manifest.step,
                )
        return own

    def _by_merit(self, metric: str, mode: Literal["min", "max"]) -> list[Manifest]:
        """The checkpoints that were evaluated, the best first, as rank 0 finds them: others might
        read one badly, and then test another model than it does."""

        def read() -> list[Manifest]:
            if self._session.rank:
                return []
            live = read_live_manifests(self._store, self._paths)
            return by_merit(live, metric=metric, mode=mode)

        found = self._together(read)
        told = self._agreement.first([manifest.model_dump(mode="json") for manifest in found])
        return [Manifest.model_validate(manifest) for manifest in told]

    def _tested_on(self) -> tuple[DataSet | None, str]:
        """The set on which the untrained and the best model are measured; of a trial none."""
        if self._assignment.trial is not None:
            return None, ""
        if self._prepared.test is not None:
            return self._prepared.test, "test"
        return self._prepared.validation, "validation"

    def _model_of(self, manifest: Manifest) -> torch.nn.Module | None:
        """The model of a checkpoint; None where it is damaged or gone."""
        try:
            folder = checkpoint_copy(
                self._store, self._paths, manifest, cache_folder=cache_folder()
            )
        except (DamagedPart, ObjectMissing):
            return None
        has_adapter = self._prepared.adapter is not None
        return build_model(
            self._prepared.task,
            self._prepared.folder if has_adapter else folder / "model",
            self._spec,
            self._session,
            dropout=None,
            adapter_in=folder if has_adapter else None,
        )

    # ---- the loop's surroundings

    def rows(self, progress: Progress) -> Iterator[RankBatch]:
        self._close_streams()
        position = self._prepared.position
        stream = self._open_stream(
            self._prepared.train,
            lanes=position.lanes,
            window=position.window,
            copies=self._prepared.copies,
        )
        return stream.batches(
            epoch=progress.epoch,
            next_item=progress.next_item,
            global_batch_size=position.global_batch_size,
            unless=self._hears_that_it_ends,
        )

    def evaluate(self, progress: Progress) -> Evaluation | None:
        data = self._prepared.validation
        if data is None:
            return None
        with self._account.spent("evaluation"):
            evaluation = self._measure(plain(self._prepared.trainee.model), data)
            self._tell_evaluation(evaluation, "validation", step=progress.step)
        return evaluation

    def decide(self, report: EvaluationReport) -> Verdict:
        with self._account.spent("synchronisation"):
            with watchdog.suspended("waits for the study's verdict"):
                verdict = self._session.evaluated(report)
            return Verdict(self._agreement.first(verdict))

    def commit(self, progress: Progress, evaluation: Evaluation | None) -> None:
        with self._account.spent("checkpoint"):
            if self._spec.train.log_rows:
                # What led to this state is to be durable before the state itself. (The writer of
                # rank 0 sees to its lines; the other ranks have none but these, and do not keep
                # the state from being saved where the store takes no lines.)
                self._telemetry.flush()
            self._saving.save(
                self._prepared.trainee,
                Moment(
                    progress=progress,
                    evaluation=evaluation,
                    stream=self._prepared.position.model_copy(
                        update={"epoch": progress.epoch, "next_item": progress.next_item}
                    ),
                    before=self._before,
                ),
            )

    def stepped(self, batch: RankBatch, progress: Progress) -> None:
        self._step = progress.step
        if self._spec.train.log_rows:
            self._telemetry.rows(
                {
                    "step": progress.step,
                    "epoch": batch.epoch,
                    "first_item": batch.first_item,
                    "rows": batch.rows.tolist(),
                }
            )

    def skipped(self, step: SkippedStep) -> None:
        if self._session.rank == 0:
            self._telemetry.metrics(
                {
                    "kind": "skipped",
                    "step": step.step,
                    "epoch": step.epoch,
                    "first_item": step.first_item,
                    "next_item": step.next_item,
                    "norm": str(step.norm),  # JSON has no such numbers
                }
            )
            self._telemetry.event(
                "skipped",
                f"step {step.step} is skipped: its gradient is not finite (norm {step.norm})",
                step=step.step,
            )

    def tell(self, facts: StepFacts) -> None:
        now = time.monotonic()
        seconds, self._told_at = max(1e-9, now - self._told_at), now
        account = self._account.seconds()
        waited = account["data_wait"] - self._waited_before
        self._waited_before = account["data_wait"]
        plan, progress = self._prepared.plan, facts.progress
        if self._session.rank == 0:
            straggler = self._stragglers.look(facts.busy, wall_seconds=seconds)
            self._telemetry.metrics(
                {
                    "kind": "train",
                    "step": progress.step,
                    "epoch": round(plan.epochs_done(progress), 4),
                    "loss": facts.loss,
                    "learning_rate": facts.learning_rate,
                    "grad_norm": facts.grad_norm,
                    "rows": facts.rows,
                    "rows_per_second": round(facts.rows / seconds, 3),
                    "tokens_per_second": round(facts.tokens / seconds, 3),
                    "tokens": facts.tokens,
                    "padding_share": round(1 - facts.tokens / max(1, facts.computed_tokens), 4),
                    "data_wait_share": round(min(1.0, waited / seconds), 4),
                    "imbalance": round(facts.imbalance, 4),
                    "total_steps": plan.total_steps,
                    "eta_seconds": round(
                        (plan.total_steps - progress.step) * seconds / facts.steps, 1
                    ),
                    "seconds": account,
                }
                | ({"straggler": self._say_straggler(straggler)} if straggler else {})
            )

    def requests(self) -> Requests:
        return self._requests(self._poller.take() if self._poller is not None else self._heard)

    def _asked_meanwhile(self) -> Requests:
        """What was asked for, which `requests` tells again."""
        return self._requests(self._poller.look() if self._poller is not None else self._heard)

    def _requests(self, asked: Requests) -> Requests:
        """What the run was asked for, with what the platform asks of this rank."""
        stop = asked.stop or self._session.stop_requested()
        notice = self._session.yield_requested()
        if stop and not self._is_stopping and self._session.rank == 0:
            self._is_stopping = True
            self._enter(State.STOPPING, "a stop was asked for")
        elif (notice or asked.yields) and not self._is_yielding and self._session.rank == 0:
            self._is_yielding = True
            reason = notice or "other workers are to go on"
            self._enter(State.RECOVERING, f"{reason}: the state is being saved")
        return replace(asked, stop=stop, yields=asked.yields or notice is not None)

    def _hears_that_it_ends(self, waited_seconds: float) -> bool:
        """Whether this rank, which waits for rows, knows that the attempt is to end.

        Between two steps the first rank hears requests for all. In a wait it cannot tell the others
        of them: where it waits for this rank in a step, this one has to listen by itself.
        """
        if self._session.stop_requested() or self._session.yield_requested() is not None:
            return True
        if self._poller is not None:
            return self._poller.look().ends
        now = time.monotonic()
        if min(waited_seconds, now - self._listened_at) >= _LISTEN_SECONDS:
            self._heard |= replace(self._listen(), save=False)  # saves are the first rank's to hear
            self._listened_at = now
        return self._heard.ends

    def _listen(self) -> Requests:
        """What the run folder asks of this attempt; nothing where its store is away as well."""
        try:
            self._fence.check()
            return requests_to(
                self._impatient_store,
                self._paths,
                after=self._assignment.controls_seen,
                attempt=self._attempt.attempt,
                generation=self._attempt.generation,
            )
        except Superseded as superseded:
            return Requests(superseded=superseded)
        except StorageError:
            return Requests()

    # ---- smaller parts

    def _say_straggler(self, straggler: Straggler) -> dict[str, Any]:
        """What the metrics say of it; a warning, once for each rank."""
        told = {"host": self._attempt.hosts[straggler.rank], **asdict(straggler)}
        message = (
            f"rank {straggler.rank} on {told['host']} keeps the others waiting for "
            f"{straggler.lost_share:.0%} of the time, by {straggler.by}"
        )
        if straggler.rank not in self._stragglers_told:
            self._stragglers_told.add(straggler.rank)
            self._telemetry.event("warning", message, step=self._step)
        return told | {"message": message}

    def tell_hang(self, hang: Hang) -> None:
        """Says durably, as far as the store answers, that this rank's process ends, and where it
        stands."""
        self._last_words.hang(hang, step=self._step, spec=self._spec)

    def _open_stream(
        self, data: DataSet, *, lanes: int, window: int, copies: Copies | None = None
    ) -> RankStream:
        stream = RankStream(
            store=data.store,
            index=data.index,
            columns=self._prepared.task.columns,
            encode=self._prepared.task.encode,
            rank=self._session.rank,
            world_size=self._session.world_size,
            seed=self._spec.data.seed,
            lanes=lanes,
            window=window,
            cache=self._cache,
            copies=copies,
            patience=self._patience,
        )
        self._streams.append(stream)
        return stream

    def _close_streams(self) -> None:
        while self._streams:
            self._streams.pop().close()

    def _measure(self, model: torch.nn.Module, data: DataSet) -> Evaluation:
        """The evaluation of `model` on a data set, over all ranks.

        Raises BrokenOff where the attempt is to end, and AgreedFailure where a rank cannot go on.
        The stream is left open then: a thread of it may hang in a request, and the state comes
        first.
        """
        task = self._prepared.task
        metrics = task.metrics()
        stream = self._together(
            lambda: self._open_stream(data, lanes=self._session.world_size, window=1)
        )
        self._together(
            lambda: measure(
                model,
                task,
                stream.sequential(batch_rows=_EVALUATION_ROWS, unless=self._hears_that_it_ends),
                metrics,
                device=self._session.device,
                dtype=self._prepared.trainee.dtype,
                cutting=Cutting.of(self._spec.batching),
                agreement=self._agreement,
                asked=self._asked_meanwhile,
            )
        )
        self._streams.remove(stream)
        stream.close()
        return metrics.compute(self._agreement.sum(metrics.state()))

    def _tell_evaluation(self, evaluation: Evaluation, split: str, *, step: int) -> None:
        if self._session.rank == 0:
            self._telemetry.metrics(
                {"kind": "evaluation", "split": split, "step": step} | evaluation.to_json()
            )
            shown = ", ".join(f"{k} {v:.4f}" for k, v in evaluation.metrics.items())
            self._telemetry.event("evaluation", f"{split} at step {step}: {shown}", step=step)

    def _together(self, work: Callable[[], Given]) -> Given:
        """What `work`, which talks to no other rank, gives on this one.

        A ShoalError of any rank, or memory that does not suffice, becomes an AgreedFailure on all;
        any other error is raised as it is, for whoever started the ranks.
        """
        error: ShoalError | None = None
        given: list[Given] = []
        try:
            given.append(work())
        except ShoalError as caught:
            error = caught
        except Exception as caught:
            if not is_out_of_memory(caught):
                raise
            error = room_fault(caught)
        self._raise_any(error)
        return given[0]

    def _raise_any(self, error: Exception | None) -> None:
        """Raises AgreedFailure on all ranks if any of them comes with an error, or all with one."""
        if isinstance(error, AgreedFailure):
            raise error
        own = None
        if error is not None:
            log.error("%s", error, exc_info=None if isinstance(error, ShoalError) else error)
            own = Failure.of(error, where=self._where()).model_dump(mode="json")
        failures = [f for f in self._agreement.gather(own) if f is not None]
        if failures:
            raise AgreedFailure(Failure.model_validate(failures[0]))

    def _failed(self, failure: Failure) -> Outcome:
        if self._session.rank == 0:
            self._telemetry.event("error", failure.problems[0][0], where=failure.where)
        return self._outcome(failure.state, failure=failure)

    def _outcome(
        self,
        state: State,
        *,
        best_step: int | None = None,
        test: dict[str, Any] | None = None,
        failure: Failure | None = None,
    ) -> Outcome:
        return Outcome(
            attempt=self._attempt.attempt,
            state=state,
            step=self._step,
            failure=failure,
            best_step=best_step,
            test=test,
            before=self._before,
            tested_on=(test or {}).get("split"),
            seconds=self._account.seconds(),
        )

    def _enter(self, state: State, doing: str) -> None:
        """What this rank does from now on; rank 0 tells the run's state."""
        self._state, self._doing = state, doing
        if self._session.rank == 0:
            self._telemetry.state(state, doing, step=self._step)

    def _tell_wait(self, sentence: str, is_over: bool) -> None:
        """Tells, from any rank, that it waits for a store, or that it goes on.

        What is told of the store that holds the run's own folder is there when that store is back.
        """
        state = self._state if is_over else State.RECOVERING
        told = f"{self._doing}; {sentence}" if is_over else sentence
        self._telemetry.state(state, f"{self._where()}: {told}", step=self._step)

    def _where(self) -> str:
        return f"rank {self._session.rank} on {socket.gethostname()}"

    def _say_start(self, claim: Claim) -> None:
        if self._session.rank == 0:
            attempt = claim.attempt
            for reason in claim.skipped:
                self._telemetry.event("warning", reason)
            begins = (
                f"goes on from step {attempt.restored_step}"
                if attempt.restored_step is not None
                else "starts"
            )
            if claim.crash is not None:
                self._telemetry.event(
                    "warning", f"attempt {claim.crash.attempt} broke off: {claim.crash.reason}"
                )
            if claim.crash is not None and claim.crash.out_of_memory is not None:
                self._telemetry.event(
                    "warning",
                    f"micro-batches have at most {attempt.max_tokens_per_microbatch} tokens, since "
                    "larger ones have not fitted",
                )
            if claim.recovers and self._assignment.trial is None:
                self._enter(State.RECOVERING, "the workers were started again")
            self._telemetry.event(
                "attempt",
                f"attempt {attempt.attempt} {begins} with {attempt.world_size} "
                f"worker{'s' if attempt.world_size > 1 else ''}",
                step=attempt.restored_step or 0,
            )

    def _drop_checkpoint_copies(self) -> None:
        """Removes local copies of checkpoints once all ranks of the node have loaded them, and
        before any makes another one."""
        self._agreement.barrier()
        if self._session.local_rank == 0:
            drop_checkpoint_copies(self._paths.run_id, cache_folder=cache_folder())
        self._agreement.barrier()

    def _describe_attempt(self) -> None:
        """Records what the attempt found out about its model and data."""
        prepared = self._prepared
        model = plain(prepared.trainee.model)
        self._attempt = self._attempt.model_copy(
            update={
                "num_parameters": sum(p.numel() for p in model.parameters()),
                "num_trained_parameters": sum(p.numel() for p in trained_parameters(model)),
                "total_steps": prepared.plan.total_steps,
                "steps_per_epoch": prepared.plan.steps_per_epoch,
                "rows_per_epoch": prepared.plan.num_rows,
                "data_digest": prepared.train.index.digest,
                "window": prepared.position.window,
                "lanes": prepared.position.lanes,
                "start_seconds": round(self._account.elapsed_seconds, 3),
            }
        )
        self._together(self._record_attempt)
        self._telemetry.track(
            Parameters(
                self._spec.model_dump(mode="json")
                | {"versions": dict(versions()), "data_digest": self._attempt.data_digest}
            )
        )

    def _record_attempt(self) -> None:
        if self._session.rank == 0:
            self._store.write(self._paths.attempt(self._attempt.attempt), self._attempt.to_bytes())
