"""The small size of bench/stream.py: every reader that this Python has gives every row."""

from __future__ import annotations

from pathlib import Path

from tests.bench.small import small


def test_readers_give_all_rows(tmp_path: Path) -> None:
    """The peers that come from PyPI are left out: tests need no network."""
    found = small("stream.py", tmp_path, "--readers", "pyarrow_read,raw_get")
    assert found["is_right"]
    assert set(found["passes"]) == {"shoal", "pyarrow_read", "raw_get"}
    [shoal] = found["passes"]["shoal"]
    assert shoal["cold"]["rows"] == shoal["warm"]["rows"] == found["rows"]
    assert shoal["resume"]["rows"] < found["rows"]
    assert set(found["ranks"]) == {"2"}
