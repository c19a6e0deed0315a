"""What tests of trackers share: which packages they need, and a run that is tracked, and dies."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips tests where a package is missing. None is loaded: processes that run other tests would
    do so as well, and for seconds."""
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


KILLED_AT_STEP_8 = """
import os, signal, sys
from trainers import __main__ as module, worker
from trainers.tracking.feeds import close_all

stepped = worker._Rank.stepped

def dying(self, batch, progress):
    stepped(self, batch, progress)
    if progress.step == 8:
        self._saving.make_durable()  # step 5
        close_all(self._telemetry._feeds)  # the steps after it are tracked, but not saved
        os.kill(os.getpid(), signal.SIGKILL)

worker._Rank.stepped = dying
sys.argv[0] = "trainers"
module.main()
"""
"""In place of `-m trainers`: all seven steps before its death are tracked, five of them saved."""
