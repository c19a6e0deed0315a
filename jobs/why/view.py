"""What `shoal why` prints: the state, what explains it, on what evidence, and what to type."""

from __future__ import annotations

import sys

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from jobs.terminal import print_to, show_warnings, state_text
from jobs.why.explain import Explanations
from jobs.why.rule import Finding


def show_explanations(told: Explanations) -> None:
    """Print it all on stdout; what could not be looked at, on stderr."""
    status = told.status
    parts = [Text.assemble((status.run_id, "bold"), "  ", state_text(status.situation.state))]
    first, *others = told.found
    body: list[Text | Padding] = [*_finding(first)]
    for finding in others:
        body += [Text(""), Text("besides:", style="dim"), *_finding(finding)]
    if told.lines:
        body += [Text(""), Text("printed last:", style="dim")]
        body += [Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in told.lines]
    print_to(sys.stdout, Group(*parts, Text(""), *body))
    show_warnings((*told.missing, *status.problems))


def _finding(finding: Finding) -> list[Text | Padding]:
    shown: list[Text | Padding] = [Text(finding.cause)]
    shown += [Padding(Text(text, style="dim"), (0, 0, 0, 2)) for text in finding.evidence]
    if finding.remedy:
        shown.append(Text(f"hint: {finding.remedy}", style="cyan"))
    return shown
