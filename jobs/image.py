"""References to container images: REGISTRY/NAME:TAG@DIGEST. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_NAME_CHARACTERS = 255
_IMAGE = re.compile(
    r"(?P<name>"
    r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?(:\d+)?/)?"  # registry
    r"[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"  # repository
    r")(:(?P<tag>[A-Za-z0-9_][-.A-Za-z0-9_]{0,127}))?"
    r"(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
"""As the OCI distribution specification has it."""


@dataclass(frozen=True)
class ImageReference:
    """The parts of a reference."""

    registry: str
    """`docker.io` where none is named."""
    tag: str | None
    digest: str | None

    @property
    def is_fixed(self) -> bool:
        """Whether it means the same image tomorrow, as far as tags are not moved."""
        return self.digest is not None or self.tag not in (None, "latest")


def parse_image(text: str) -> ImageReference | None:
    """The parts of a reference; None for what is none."""
    match = _IMAGE.fullmatch(text)
    if match is None or len(match["name"]) > MAX_NAME_CHARACTERS:
        return None
    first, slash, _ = match["name"].partition("/")
    has_registry = bool(slash) and ("." in first or ":" in first or first == "localhost")
    registry = first if has_registry else "docker.io"
    return ImageReference(registry, match["tag"], match["digest"])
