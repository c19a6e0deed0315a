"""Random numbers that depend on what they are for, and on nothing that happened before."""

from __future__ import annotations

import zlib

import numpy as np


def keyed(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A generator for one decision of a study: the same for the same seed, purpose and key."""
    words = [seed, zlib.crc32(purpose.encode()), *key]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def keyed_seed(seed: int, purpose: str, *key: int) -> int:
    """A seed of 31 bits for a library that wants one."""
    return int(keyed(seed, purpose, *key).integers(2**31))
