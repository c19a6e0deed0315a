"""Amounts as Kubernetes writes them: `500m` cores, `1.5Gi`, `1e3`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal

Amounts = dict[str, Decimal]
"""Resource -> how much of it: cores, bytes, devices."""

_QUANTITY = re.compile(r"(?P<number>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)(?P<suffix>[a-zA-Z]*)")
_UNITS = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    **{unit: Decimal(1000) ** power for power, unit in enumerate("kMGTPE", start=1)},
    **{f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)},
}
_IN_BYTES = ("memory", "storage", "ephemeral-storage")


def parse_quantity(text: object) -> Decimal:
    """The number that a quantity stands for; ValueError for what is none."""
    match = _QUANTITY.fullmatch(str(text))
    if match is None or match["suffix"] not in _UNITS:
        raise ValueError(f"{text!r} is no quantity of Kubernetes")
    return Decimal(match["number"]) * _UNITS[match["suffix"]]


def parse_amounts(tree: Mapping[str, object] | None) -> Amounts:
    return {name: parse_quantity(text) for name, text in (tree or {}).items()}


def sum_amounts(several: Iterable[Mapping[str, Decimal]]) -> Amounts:
    total: Amounts = {}
    for amounts in several:
        for name, amount in amounts.items():
            total[name] = total.get(name, Decimal(0)) + amount
    return total


def scaled(amounts: Mapping[str, Decimal], number: int) -> Amounts:
    return {name: amount * number for name, amount in amounts.items()}


def show_amount(resource: str, amount: Decimal) -> str:
    """`2.5 cores`, `12.5 GiB of memory`, `4 nvidia.com/gpu`; `resource` may also be one of a quota,
    such as requests.cpu."""
    name = resource.removeprefix("requests.").removeprefix("limits.")
    if name == "cpu":
        return f"{_plain(amount)} core{'' if amount == 1 else 's'}"
    if name.rpartition("/")[2].removeprefix("requests.") in _IN_BYTES:
        kinds = {"memory": "memory", "ephemeral-storage": "disk"}
        return f"{_plain(amount / 2**30)} GiB of {kinds.get(name, name)}"
    return f"{_plain(amount)} {name}"


def show_amounts(amounts: Mapping[str, Decimal]) -> str:
    return ", ".join(show_amount(name, amount) for name, amount in amounts.items())


def _plain(amount: Decimal) -> str:
    return f"{amount.quantize(Decimal('0.001')).normalize():f}"
