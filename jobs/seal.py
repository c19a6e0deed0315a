"""Digests in the JSON objects of a run folder, by which a changed bit is found when they are read.

An object without a digest, as an older version wrote it, is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

DIGEST = "digest"
"""Key of the digest."""


def sealed(tree: Mapping[str, Any]) -> bytes:
    """The JSON object with a digest of itself, as it is stored."""
    return json.dumps(dict(tree) | {DIGEST: _digest(tree)}, indent=1).encode()


def unsealed(tree: object) -> dict[str, Any]:
    """The object without its digest; raises ValueError where it is not the one of its digest."""
    if not isinstance(tree, dict):
        raise ValueError("it holds no keys")
    rest = {key: value for key, value in tree.items() if key != DIGEST}
    if DIGEST in tree and tree[DIGEST] != _digest(rest):
        raise ValueError("it is damaged: its digest is another")
    return rest


def _digest(tree: Mapping[str, Any]) -> str:
    """sha256 of a JSON object, however it was laid out."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
