"""The small size of bench/growth.py: every point of every curve is there, and drawn."""

from __future__ import annotations

from pathlib import Path

from tests.bench.small import small


def test_all_curves_are_measured_and_drawn(tmp_path: Path) -> None:
    found = small("growth.py", tmp_path, "--picture", str(tmp_path / "growth.png"))
    assert found["is_right"]
    assert set(found["ranks"]) == {"1", "2"}
    assert set(found["shards"]) == {"10", "100"}
    assert set(found["rows"]) == {"1000000", "1000000000"}
    for rounds in found["shards"].values():
        for one in rounds:
            # The first batch is read after the index is opened; an index holds 32 bytes a group.
            assert one["first_batch_seconds"] > 0
            assert one["bytes_of_row_group"] <= 32
    [few], [many] = found["rows"].values()
    assert many["row_groups"] == 488_282
    # 16 bytes a row group stay; less than ten times as much is there at the peak.
    assert few["peak_mib"] < many["peak_mib"] < 10 * 16 * many["row_groups"] / 2**20
    for rounds in found["models"].values():
        assert all(min(one.values()) > 0 for one in rounds)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
