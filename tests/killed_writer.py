"""A writer that is killed in the middle of a large object."""

from __future__ import annotations

import subprocess
import sys

from cluster.storage import Store

_PROGRAM = """
import os, sys
from cluster.storage import Transfer, open_store

transfer = Transfer(part_bytes=5 * 2**20, num_threads=1, on_part=lambda: os._exit(9))
open_store(sys.argv[1], transfer=transfer).write(sys.argv[2], bytes(11 * 2**20))
"""


def kill_writer_of(store: Store, key: str) -> None:
    """Returns when a process has stored the first part of the object, and is gone."""
    ended = subprocess.run([sys.executable, "-c", _PROGRAM, store.uri, key], check=False)
    assert ended.returncode == 9
