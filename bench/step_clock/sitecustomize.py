"""Notes when each optimizer step of a process was done. Python imports this file at its start.

bench/recovery.py puts this folder on PYTHONPATH, and names a folder in SHOAL_BENCH_STEPS; a process
that makes steps writes their times (Unix seconds) to a file of its own there, named after its id.
"""

import importlib.abc
import importlib.util
import os
import sys
import time

_FOLDER = os.environ.get("SHOAL_BENCH_STEPS")
_WATCHED = "torch.optim.optimizer"


def _arm(module):
    file = None

    def note(*_):
        nonlocal file
        if file is None:
            name = os.path.join(_FOLDER, str(os.getpid()))
            file = open(name, "a", buffering=1, encoding="ascii")  # noqa: SIM115 - till the end
        file.write(f"{time.time():.4f}\n")

    module.register_optimizer_step_post_hook(note)


class _Finder(importlib.abc.MetaPathFinder):
    """Arms torch's optimizers once they are loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_arm(module):
            execute(module)
            _arm(module)

        spec.loader.exec_module = execute_and_arm
        return spec


if _FOLDER:
    sys.meta_path.insert(0, _Finder())
