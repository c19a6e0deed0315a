"""Where a driver of this machine prints: a folder that is this user's alone, a file a run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from cluster.local import driver_log
from jobs.errors import EnvironmentFault

URI = "s3://shoal/runs/sentiment-1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of drivers' output, not made yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"shoal-{os.getuid()}"


def test_the_folder_is_made_for_this_user_alone_and_used_again(folder: Path) -> None:
    first = driver_log(URI)
    assert first.parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert driver_log(f"{URI}/") == first


def test_runs_of_one_name_in_two_stores_have_a_file_each(folder: Path) -> None:
    first, second = driver_log(URI), driver_log("s3://other/runs/sentiment-1")
    assert first != second
    assert all(path.name.startswith("sentiment-1-") for path in (first, second))


def test_a_folder_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(EnvironmentFault, match="0755") as caught:
        driver_log(URI)
    assert f"rm -r {folder}" in str(caught.value.problems[0].hint)


def test_a_link_in_place_of_the_folder_is_refused(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(EnvironmentFault, match="is no folder"):
        driver_log(URI)
    assert list(elsewhere.iterdir()) == []


def test_a_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    folder.rename(folder.parent / f"shoal-{owner + 1}")
    with pytest.raises(EnvironmentFault, match=f"belongs to the user with number {owner}"):
        driver_log(URI)
