"""Why a run waits or has failed: evidence -> explanations, the one that explains most first. Pure.

What the run's folder says of a failure that the user made comes first. Then the rules, in the order
in which one thing leads to the next: what is not admitted has no pods, what cannot be made is not
scheduled, what is not scheduled does not start, what does not start does not crash. Where no rule
fits, the newest warning and the last lines are all that is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.record import State
from jobs.status import RunStatus
from jobs.status_view import progress_text
from jobs.why import creation, ending, printed, queueing, scheduling, starting
from jobs.why.evidence import Evidence
from jobs.why.facts import Fact, facts_of
from jobs.why.redaction import redacted
from jobs.why.rule import Context, Finding, Rule, short

_BEFORE_LINES = (
    *queueing.RULES,
    *creation.RULES,
    *starting.RULES,
    *scheduling.RULES,
    *ending.LOST_RULES,
)
_AFTER_LINES = (*ending.CRASH_RULES, *ending.OPERATOR_RULES)
RULES: tuple[Rule, ...] = (*_BEFORE_LINES, *printed.RULES, *_AFTER_LINES)
"""All rules. A fact is explained by the first that fits it."""

_ANYWHERE = ("ray-memory", "gpu-memory", "disk-full")
"""Rules about lines that fit runs that are not on Kubernetes: those have their own hints else."""
_LINES_SHOWN = 10
_GOING_WELL = (State.RUNNING, State.STOPPING)


@dataclass(frozen=True)
class Explanations:
    """What is known of a run's state, for people and programs."""

    status: RunStatus
    found: tuple[Finding, ...]
    """The one that explains most first; never empty."""
    lines: tuple[str, ...]
    """What was printed last, of a run that has failed."""
    missing: tuple[str, ...]
    """What could not be looked at, with what is lost."""

    def to_json(self) -> dict[str, Any]:
        """One JSON document with stable keys."""
        first = self.found[0]
        situation = self.status.situation
        return {
            "run_id": self.status.run_id,
            "uri": self.status.uri,
            "state": situation.state,
            "is_over": situation.is_over,
            "cause": first.cause,
            "remedy": first.remedy or None,
            "explanations": [
                {
                    "rule": finding.rule,
                    "cause": finding.cause,
                    "remedy": finding.remedy or None,
                    "evidence": list(finding.evidence),
                }
                for finding in self.found
            ],
            "lines": list(self.lines),
            "missing": list(self.missing),
            "problems": list(self.status.problems),
        }


def explain(evidence: Evidence) -> Explanations:
    """Every explanation of a run, without what looks like a secret in what others wrote."""
    status = evidence.status
    context = Context(evidence.spec, status.uri, status.situation.is_over)
    has_failed = status.situation.is_over and status.situation.exit_code not in (0, 130)
    return Explanations(
        status,
        tuple(_ordered(evidence, context)),
        tuple(redacted(line) for line in _last_lines(evidence)) if has_failed else (),
        evidence.cluster.missing,
    )


def _ordered(evidence: Evidence, context: Context) -> list[Finding]:
    situation = evidence.status.situation
    facts = facts_of(evidence)
    if situation.is_over and situation.exit_code in (0, 130):
        return [_folder(evidence, context)]
    if situation.state in _GOING_WELL:
        # What is wrong with some pods does not keep it: it is told besides.
        beside = _match(_BEFORE_LINES, _of_now(facts), context)
        return [_folder(evidence, context), *(finding for finding, _ in beside)]
    own = _folder(evidence, context)
    if _is_final(evidence):
        return [own]
    before = _match(_BEFORE_LINES, facts, context)
    lines = _lines_findings(evidence, facts, context)
    after = _match(_AFTER_LINES, facts, context, explained=[*before, *lines])
    found = [*_no_rayjob(evidence, context), *(finding for finding, _ in (*before, *lines))]
    rest = [finding for finding, _ in after]
    if not (found or rest):
        rest += _newest(facts, context)
    if evidence.status.result is not None or evidence.kuberay is None:
        return [*found, own, *rest]
    # What it says of its end, without a result, it has from KubeRay.
    is_repeated = situation.is_over and (found or rest)
    return [*found, *rest] if is_repeated else [*found, *rest, own]


# -------------------------------------------------------------------------------------- the rules

_Explained = list[tuple[Finding, frozenset[str]]]
"""Findings with the subjects that they explain."""


def _match(
    rules: Sequence[Rule],
    facts: Sequence[Fact],
    context: Context,
    *,
    explained: _Explained | None = None,
) -> _Explained:
    """What the rules say of the facts; each fact is left to the first rule that fits it."""
    before = list(explained or ())
    found: _Explained = []
    left = [fact for fact in facts if fact.source not in ("printed", "folder")]
    for rule in rules:
        pairs = [(fact, rule.fields_of(fact, context)) for fact in left]
        filled = [(fact, fields) for fact, fields in pairs if fields is not None]
        left = [fact for fact, fields in pairs if fields is None]
        if rule.yields:
            known = {subject for _, subjects in (*before, *found) for subject in subjects}
            is_any = bool(before or found)
            filled = [
                (fact, fields)
                for fact, fields in filled
                if fact.subject not in known
                and not (is_any and fact.source in ("ray cluster", "rayjob"))
            ]
        subjects = frozenset(fact.subject for fact, _ in filled)
        found += [(finding, subjects) for finding in rule.findings(filled)]
    return found


def _lines_findings(evidence: Evidence, facts: Sequence[Fact], context: Context) -> _Explained:
    """What the last lines tell, where something has ended: lines of what goes on may be of what it
    has got over."""
    situation = evidence.status.situation
    has_ended = any(fact.source == "container" and fact.role != "" for fact in facts)
    has_never_begun = situation.generation == 0 and bool(evidence.lines)
    is_recovering = situation.state is State.RECOVERING
    if not (situation.is_over or is_recovering or has_ended or has_never_begun):
        return []
    found: list[Finding] = []
    left = list(facts)
    for rule in printed.RULES:
        if evidence.kuberay is None and rule.name not in _ANYWHERE:
            continue
        pairs = [(fact, rule.fields_of(fact, context)) for fact in left]
        filled = [(fact, fields) for fact, fields in pairs if fields is not None]
        left = [fact for fact, fields in pairs if fields is None]
        found += rule.findings(filled[-1:])
    return [(finding, frozenset()) for finding in (*printed.own_errors(facts, context), *found)]


def _of_now(facts: Sequence[Fact]) -> list[Fact]:
    """Facts about pods that are there and are not well, of a run that goes on."""
    return [
        fact
        for fact in facts
        if fact.pod is not None and not (fact.source == "container" and fact.time)
    ]


def _newest(facts: Sequence[Fact], context: Context) -> Iterator[Finding]:
    """What nobody has a rule for: the newest warning, or what a pod says of itself."""
    warnings = [fact for fact in facts if fact.is_warning]
    own = [fact for fact in facts if fact.source in ("pod", "container")]
    newest = (warnings or own)[-1:]
    for fact in newest:
        kind = "pod" if fact.role else "rayjobs.ray.io"
        namespace = context.fields["namespace"]
        yield Finding(
            "newest-warning",
            f"the newest warning about {fact.subject} is {fact.reason}: {short(fact.message)}",
            f"see more with: kubectl describe {kind} {fact.subject} --namespace {namespace}; "
            f"shoal logs {context.run} --pods",
            (fact.text,),
        )


# ------------------------------------------------------------------------------------- the folder


def _is_final(evidence: Evidence) -> bool:
    """Whether the run's own word explains its end: it was the user's, or the store's."""
    result = evidence.status.result
    if result is None or not evidence.status.situation.is_over:
        return False
    failure = result.failure or (result.outcome.failure if result.outcome else None)
    return result.state.ends_retries or (failure is not None and failure.is_of_place)


_WAITS = (
    (
        re.compile(r"waits for nodes|it is tried again"),
        "add nodes, or have fewer workers: {again} --set workers.count=N; it waits for "
        "retries.wait_minutes",
    ),
    (
        re.compile(r"waits for the store|the store was away"),
        "see whether the store answers: shoal list --store {store}; the run waits for "
        "retries.wait_minutes, and goes on by itself",
    ),
    (re.compile(r"^no driver has started yet"), "if none starts within a minute: {again}"),
)
"""What a run says of itself while it waits -> what to type."""


def _no_rayjob(evidence: Evidence, context: Context) -> Iterator[Finding]:
    situation = evidence.status.situation
    if evidence.cluster.has_no_rayjob and situation.generation == 0 and not situation.is_over:
        namespace, run = context.fields["namespace"], context.run
        yield Finding(
            "no-rayjob",
            f"the run is recorded, but the namespace {namespace} has no RayJob of it",
            f"make one: shoal resume {run}; or: shoal render {run} | kubectl apply -f -; if it is "
            "in another cluster, name that with --context",
            (),
        )


def _folder(evidence: Evidence, context: Context) -> Finding:
    """What `shoal status` says, with what to type."""
    status = evidence.status
    situation = status.situation
    state, hint = situation.state, situation.hint
    cause = situation.cause or _said(status)
    proof = [
        f"attempt {n} broke off: {crash.reason}" for n, crash in sorted(status.crashes.items())
    ]
    if state is State.RUNNING:
        cause = f"it works: {cause if status.study else progress_text(status)}"
        straggler = (status.train or {}).get("straggler")
        proof += [straggler["message"]] if straggler else []
        hint = hint or f"follow it with: shoal watch {context.run}"
    elif state is State.SUCCEEDED:
        hint = hint or f"see what it has learned: shoal report {context.run}"
    elif not situation.is_over:
        fields = {**context.fields, "store": evidence.spec.store.uri}
        waits = (remedy.format_map(fields) for known, remedy in _WAITS if known.search(cause))
        is_ours = evidence.kuberay is None or situation.generation > 0
        known = next(waits, None) if is_ours else None
        hint = hint or known or f"follow it with: shoal watch {context.run}"
    elif evidence.study_uri is not None:
        hint = f"see more: shoal logs {context.run}; its study: shoal why {evidence.study_uri}"
    elif state is not State.PRUNED:
        hint = hint or f"see more: shoal logs {context.run}; then: {context.again}"
    shown = tuple(redacted(short(text)) for text in proof[-_LINES_SHOWN:])
    return Finding("run", redacted(cause), hint or "", shown)


def _said(status: RunStatus) -> str:
    said = {
        State.SUCCEEDED: "it has done all of its steps",
        State.STOPPED: "it was stopped on request",
        State.STARTING: "its workers are being started",
    }
    return said.get(status.situation.state, f"it is {status.situation.state}")


def _last_lines(evidence: Evidence) -> tuple[str, ...]:
    """Of the folder; where that has none, of the pods; where those are gone, what Ray passed on."""
    rayjob = evidence.status.rayjob
    of_pods = [f"{p.pod}: {line}" for p in evidence.cluster.printed for line in p.lines[-4:]]
    passed_on = rayjob.message.splitlines() if rayjob else []
    return tuple((evidence.lines or of_pods or passed_on)[-_LINES_SHOWN:])
