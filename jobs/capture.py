"""What a process and its children print, as lines of its log too."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def captured_output(take: Callable[[str], None]) -> Iterator[None]:
    """Inside the block each line on stdout or stderr also goes to `take`, from a thread.

    Works on the file descriptors, so it covers C++ code and child processes. Where they went
    before, they still go; where that cannot take them, `take` is told so once.
    """
    read_end, write_end = os.pipe()
    saved = os.dup(1), os.dup(2)
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(write_end)
    thread = threading.Thread(
        target=_pump, args=(read_end, saved[1], take), name="shoal-output", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        # Children that live on may hold the pipe open: do not wait for them for ever.
        thread.join(timeout=1.0)


def _pump(read_end: int, out: int, take: Callable[[str], None]) -> None:
    rest = b""
    refused = False
    # Whatever happens to what is read, reading goes on: who prints into a full pipe hangs.
    while block := os.read(read_end, 2**16):
        error = _write_all(out, block)
        if error is not None and not refused:
            refused = True
            take(f"the output cannot be written where it went: {error}")
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.strip():
                take(line.decode(errors="replace"))
    if rest.strip():
        take(rest.decode(errors="replace"))


def _write_all(out: int, block: bytes) -> OSError | None:
    """Writes the whole block; the error, where the rest of it could not be written."""
    left = memoryview(block)
    try:
        while left:
            left = left[os.write(out, left) :]
    except OSError as error:
        return error
    return None
