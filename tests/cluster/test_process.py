"""Whether a process has ended, where this user may not see it; the rest is in test_lease.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.process import identify

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
AS_NOBODY_WITHOUT_PROC = f"""
mount -t proc -o hidepid=2 proc /proc || exit 77
exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups "$@"
"""
LOOK = """
import sys
sys.path[:0] = {paths!r}
from cluster.process import ProcessIdentity
print(ProcessIdentity(*{fields!r}).has_ended)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hide processes")
def test_a_process_that_is_hidden_from_this_user_is_not_taken_for_gone() -> None:
    me = identify()
    fields = (me.host, me.boot, me.pid, me.started)
    found = subprocess.run(
        ["unshare", "--mount", "sh", "-c", AS_NOBODY_WITHOUT_PROC, "sh", sys.executable, "-c",
         LOOK.format(paths=[str(ROOT), *sys.path], fields=fields)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode == 77 or "unshare failed" in found.stderr:
        pytest.skip(f"no mounts can be made here: {found.stderr}")
    if "Permission denied" in found.stderr:
        pytest.skip("another user cannot run this Python")
    assert found.stdout == "None\n", found.stderr
