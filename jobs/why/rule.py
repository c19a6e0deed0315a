"""What a fact means: a rule is a pattern of facts, a sentence about them, and what to type.

    Rule.fields_of(fact, context)    ->  what a fact fills in; None where the rule does not fit
    Rule.findings(filled)            ->  the rule's sentence for each group of facts alike. Pure

Sentences and remedies are templates. They may use the named groups of the patterns, the fields of
`Context`, what the rule's `more` computes, and `{who}`: all pods that the sentence is true of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from jobs.spec import JobSpec, KubeRayCluster
from jobs.why.facts import Fact, Role, Source

_WHO = "\0"
"""Stands for who it is, until all facts of a sentence are together."""
_EVIDENCE_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """What a rule says of facts that are alike."""

    rule: str
    """Name of the rule, stable."""
    cause: str
    remedy: str
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """What sentences of a run refer to."""

    spec: JobSpec
    run: str
    """Its URI."""
    is_over: bool

    @property
    def fields(self) -> dict[str, str]:
        cluster = self.spec.cluster
        there = cluster if isinstance(cluster, KubeRayCluster) else None
        workers = self.spec.workers
        return {
            "run": self.run,
            "again": self.again,
            "namespace": there.namespace if there else "default",
            "image": there.image if there else "",
            "queue": (there.queue if there else None) or "",
            "account": (there.service_account if there else None) or "default",
            "priority": (there.priority_class if there else None) or "",
            "count": str(workers.count),
            "more_memory": _doubled(workers.memory_gib or 4),
            "more_head_memory": _doubled(there.head.memory_gib if there else 4),
            "cache": f"{self.spec.data.cache_gib:g}",
            "more_deadline": _doubled((there.deadline_minutes if there else None) or 60),
            "more_start": _doubled((there.start_deadline_minutes if there else None) or 30),
        }

    @property
    def again(self) -> str:
        """What starts the run again; `--set` may follow."""
        resume = f"shoal resume {self.run}"
        return resume if self.is_over else f"shoal stop {self.run} --wait; then: {resume}"


More = Callable[[Fact, Context], Mapping[str, str]]
"""Computes fields of a rule's templates."""


@dataclass(frozen=True)
class Rule:
    """A kind of facts, and what it means."""

    name: str
    of: frozenset[Source]
    cause: str
    remedy: str
    reason: str = ""
    """Pattern of the whole reason; empty: any."""
    message: str = ""
    """Pattern of a part of the message; empty: any."""
    role: Role | None = None
    """Of pods of this role alone; None: of any."""
    more: More | None = None
    yields: bool = False
    """Whether it says nothing of a subject that a rule above it has explained."""

    def findings(self, filled: Iterable[tuple[Fact, Mapping[str, str]]]) -> Iterator[Finding]:
        """One for each sentence that comes of facts with their fields, with the newest of these
        facts as evidence."""
        together: dict[tuple[str, str], list[Fact]] = {}
        for fact, fields in filled:
            said = self.cause.format_map(fields), self.remedy.format_map(fields)
            together.setdefault(said, []).append(fact)
        for (cause, remedy), alike in together.items():
            whom = who(alike)
            texts = dict.fromkeys(fact.text for fact in reversed(alike))
            shown = tuple(texts)[:_EVIDENCE_SHOWN]
            yield Finding(self.name, cause.replace(_WHO, whom), remedy.replace(_WHO, whom), shown)

    def fields_of(self, fact: Fact, context: Context) -> dict[str, str] | None:
        """Fields of the templates; None where the rule does not fit."""
        if fact.source not in self.of or self.role not in (None, fact.role):
            return None
        by_reason = self._reason.fullmatch(fact.reason) if self.reason else None
        by_message = self._message.search(fact.message) if self.message else None
        if (self.reason and by_reason is None) or (self.message and by_message is None):
            return None
        fields = {
            **context.fields,
            "who": _WHO,
            "pod": fact.subject,
            "reason": fact.reason,
            "said": short(fact.message),
        }
        for found in (by_reason, by_message):
            if found is not None:
                fields |= {k: short(v or "") for k, v in found.groupdict().items()}
        return fields if self.more is None else {**fields, **self.more(fact, context)}

    @cached_property
    def _reason(self) -> re.Pattern[str]:
        return re.compile(self.reason)

    @cached_property
    def _message(self) -> re.Pattern[str]:
        return re.compile(self.message)


def who(facts: Iterable[Fact]) -> str:
    """`the head`, `3 workers`, `the head and a worker`: whose facts these are."""
    by_role: dict[str, set[str]] = {}
    for fact in facts:
        by_role.setdefault(fact.role, set()).add(fact.subject)
    parts = []
    for role, subjects in sorted(by_role.items()):
        if role == "worker":
            parts.append("a worker" if len(subjects) == 1 else f"{len(subjects)} workers")
        else:
            parts.append(f"the {role}" if role else "the run")
    return " and ".join(parts)


def short(text: str, limit: int = 300) -> str:
    """The text on one line, cut where it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _doubled(value: float) -> str:
    return f"{math.ceil(2 * value)}"
