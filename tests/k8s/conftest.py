"""Runs and studies as drivers leave them are made by modules beside the tests of jobs."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "jobs"))
