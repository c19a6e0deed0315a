"""The hook that runs before a pod of Ray ends: `python -m cluster.drain`.

Sends SIGTERM to `ray start --block`, which drains its node: workers hear of it and save their
state. Kubernetes sends that signal to the pod's first process alone, which may be a shell that
passes nothing on. A second SIGTERM changes nothing for Ray.
"""

from __future__ import annotations

import itertools
import os
import sys

import psutil


def main() -> int:
    """0 where a node was told, 1 where none runs here."""
    told = 0
    for process in psutil.process_iter(["cmdline"]):
        if is_node(process.info["cmdline"] or []):
            process.terminate()
            told += 1
    if not told:
        sys.stderr.write("shoal: no `ray start` runs in this pod, so that nobody was told\n")
    return 0 if told else 1


def is_node(command: list[str]) -> bool:
    """Whether a command line is that of `ray start`: the script, with or without its interpreter.
    Not that of a shell with the same words in one text."""
    names = [os.path.basename(word) for word in command[:3]]
    return ("ray", "start") in itertools.pairwise(names)


if __name__ == "__main__":
    sys.exit(main())
