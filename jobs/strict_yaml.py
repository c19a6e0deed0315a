"""YAML as a job file may use it: 3e-5 is a number, a key given twice is an error.

PyYAML follows YAML 1.1, in which 3e-5 is a text; and it lets the last of two equal keys win.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from jobs.errors import Problem, SpecError

_INDENT_WITH_SPACES = "indent with spaces; YAML allows no tabs there"


@dataclass(frozen=True)
class Document:
    """What a YAML text holds."""

    value: Any
    """Plain values; None for an empty text."""
    lines: Mapping[tuple[int | str, ...], int]
    """Line, from 1, of each key and each item of a list, by its path."""
    repeated: tuple[Problem, ...]
    """Keys that stand twice in one group."""


def read_yaml(text: str, *, where: str) -> Document:
    """The values of one YAML document; raises SpecError, naming the line, if it is not one."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        # `deep` also makes PyYAML refuse a value that contains itself.
        value = None if node is None else loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        raise SpecError(_syntax_problem(error, text, where)) from None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise SpecError(
            Problem(f"{where} is not valid YAML: {reason}", "save it as plain UTF-8 text")
        ) from None
    except ValueError as error:
        # A value that looks like a date and is none, such as 2024-13-45.
        raise SpecError(
            Problem(f"{where} is not valid YAML: {error}", "quote texts that look like dates")
        ) from None
    return Document(
        value=value,
        lines={} if node is None else dict(_lines(node, ())),
        repeated=tuple(
            Problem(
                f"{where}, line {line}: {key} stands twice, first in line {first}",
                "remove one of the two",
            )
            for key, first, line in loader.repeated
        ),
    )


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[tuple[str, int, int]] = []
        """(key, line of the first, line of the second), lines from 1."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in first_lines:
                self.repeated.append((key.value, first_lines[key.value], line))
            first_lines.setdefault(key.value, line)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+|[-+]?\.\d+[eE][-+]?\d+"),
    list("-+0123456789."),
)


def _lines(
    node: yaml.Node, path: tuple[int | str, ...]
) -> Iterator[tuple[tuple[int | str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield (*path, key.value), key.start_mark.line + 1
                yield from _lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for place, value in enumerate(node.value):
            yield (*path, place), value.start_mark.line + 1
            yield from _lines(value, (*path, place))


def _syntax_problem(error: yaml.MarkedYAMLError, text: str, where: str) -> Problem:
    problem = str(error.problem or error.context)
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return Problem(f"{where} is not valid YAML: {problem}")
    lines = text.splitlines()
    shown = lines[mark.line].strip() if mark.line < len(lines) else ""
    at = f"{where}, line {mark.line + 1}"
    if "'\\t'" in problem:
        return Problem(f"{at}: a tab stands where YAML allows only spaces", _INDENT_WITH_SPACES)
    if "python/" in problem or "could not determine a constructor" in problem:
        return Problem(
            f"{at}: tags of programming languages are not read: {shown}", "write a plain value"
        )
    if problem.startswith("mapping values are not allowed"):
        return Problem(
            f"{at}: a second ':' in one line: {shown}",
            "quote a text that holds ': ', and start each key on a line of its own",
        )
    if "but found another document" in problem:
        return Problem(f"{at}: a second document starts", "keep one job in a file")
    if "unconstructable recursive node" in problem:
        return Problem(f"{at}: a value contains itself: {shown}", "write the value out")
    ends_early = "<stream end>" in problem or "unexpected end of stream" in problem
    if ends_early and error.context_mark is not None:
        opened = error.context_mark.line
        return Problem(
            f"{where}, line {opened + 1}: what opens here is not closed: {lines[opened].strip()}",
            "add the missing bracket or quote",
        )
    if "unhashable key" in problem:
        return Problem(f"{at}: a list or a group stands as a key: {shown}", "keys are plain words")
    return Problem(
        f"{at} is not valid YAML: {problem}" + (f": {shown}" if shown else ""),
        "keys of one group start in the same column" if "block" in str(error) else None,
    )
