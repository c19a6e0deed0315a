"""Ages (`10m`, `7d`) and times as values of options."""

from __future__ import annotations

import re
import time
from datetime import datetime

import click

_AGE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def to_age_seconds(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """Callback of an option: seconds of an age such as `7d`."""
    match = _AGE.fullmatch(value)
    if match is None:
        raise click.BadParameter(f"{value} is no age; write for example 30m, 12h or 7d", ctx, param)
    return float(match[1]) * _UNIT_SECONDS[match[2]]


def to_moment(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Callback of an option: Unix seconds of an age before now, or of an ISO 8601 time.

    A time without a zone is local, as the lines of logs show it.
    """
    if value is None:
        return None
    match = _AGE.fullmatch(value)
    if match is not None:
        return time.time() - float(match[1]) * _UNIT_SECONDS[match[2]]
    try:
        return datetime.fromisoformat(value.strip()).timestamp()
    except ValueError:
        raise click.BadParameter(
            f"{value} is no time; write an age such as 10m, 2h or 7d, "
            "or a time such as 2026-11-01T09:30",
            ctx,
            param,
        ) from None
