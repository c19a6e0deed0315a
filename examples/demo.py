"""`make demo`: a real model learns on real data, through every layer that a cluster run uses.

What a user would type is typed, and shown. The object store with its data, and the report, stay
in .shoal/ in the checkout; nothing is left running.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import assets
import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import open_store

ROOT = Path(__file__).resolve().parent.parent
JOB = "examples/sentiment.yaml"
STORE_FOLDER = ".shoal/store"
REPORT = ".shoal/report.html"
DATA, MODEL = "s3://shoal/reviews", "s3://shoal/models/minilm"
SPLIT = "validation=700,test=1000"

_STOPPED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """0 if fine-tuning beats the baseline, 1 if not; the failed command's code if one fails."""
    os.chdir(ROOT)
    Path(".shoal").mkdir(exist_ok=True)
    with _the_only_demo():
        model, sentences = assets.minilm(), assets.movie_sentences()
        started = time.monotonic()
        with _object_store():
            rows = str(sentences.relative_to(ROOT))
            _shoal("prepare", rows, "--to", DATA, "--split", SPLIT, "--stratify", "label")
            _upload(model)
            _shoal("check", JOB)
            baseline = _baseline_accuracy()
            run_id = f"sentiment-{secrets.token_hex(3)}"
            _shoal("run", JOB, "--run-id", run_id)
            _shoal("report", run_id, "--output", REPORT)
            report = json.loads(_shoal("report", run_id, "--json", capture=True))
    return _tell(report, baseline=baseline, seconds=time.monotonic() - started)


# ---------------------------------------------------------------------------------- the steps


@contextlib.contextmanager
def _object_store() -> Iterator[None]:
    """The embedded store for the length of a block; its variables are set for all commands."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_", "SHOAL_"))]:
        del os.environ[name]
    try:
        for line in _shoal("up", "--folder", STORE_FOLDER, capture=True).splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            (os.environ[name],) = shlex.split(value)
        # The store's keys are all that is needed; profiles of this machine's user are not.
        os.environ |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        os.environ |= {"SHOAL_CACHE": str(ROOT / ".shoal" / "cache"), "HF_HUB_OFFLINE": "1"}
        yield
    except SystemExit:
        _say(f'# to look at what is there: eval "$(shoal up --folder {STORE_FOLDER})"')
        raise
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _shoal("down", "--folder", STORE_FOLDER)


def _upload(model: Path) -> None:
    """The model's folder into the store, as `aws s3 sync` would do it."""
    _say(f"# upload {model.relative_to(ROOT)} to {MODEL}")
    store = open_store(MODEL)
    for path in sorted(model.iterdir()):
        head = store.head(path.name)
        if head is None or head.num_bytes != path.stat().st_size:
            store.upload(path.name, path)


def _baseline_accuracy() -> float:
    """Test accuracy of TF-IDF with logistic regression on every row that the model is offered."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    _say("# TF-IDF with logistic regression on the same rows")
    offered = pa.concat_tables([_read("train"), _read("validation")])
    test = _read("test")
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=100_000),
        LogisticRegression(C=10, max_iter=1000),
    )
    classifier.fit(offered["text"].to_pylist(), offered["label"].to_pylist())
    accuracy = classifier.score(test["text"].to_pylist(), test["label"].to_pylist())
    print(f"accuracy {accuracy:.3f} after {len(offered):,} rows, on {len(test):,} others")
    return float(accuracy)


def _read(part: str) -> pa.Table:
    """Rows of a part of the data set, in the store's order."""
    store = open_store(f"{DATA}/{part}")
    shards = [head.key for head in store.list("shard-")]
    return pa.concat_tables([pq.read_table(io.BytesIO(store.read(shard))) for shard in shards])


def _tell(report: dict[str, object], *, baseline: float, seconds: float) -> int:
    """Print the table and what to type next; the exit code."""
    before, after = (_accuracy(report[key]) for key in ("before", "test"))
    run_id = report["run_id"]
    up, down = f"shoal up --folder {STORE_FOLDER}", f"shoal down --folder {STORE_FOLDER}"
    commands = {
        ". .venv/bin/activate": "put shoal on the PATH",
        f'eval "$({up})"': "start the store again",
        "shoal list": "the runs in it",
        f"shoal checkpoints {run_id}": "what was saved, and whether it is whole",
        f"shoal run {JOB} --set train.epochs=2": "another run, with a key changed",
        down: "stop the store; its data stays",
    }
    print(f"""
  Accuracy on {_rows(report["test"]):,} sentences that no model has seen

    MiniLM-L6 before fine-tuning      {before:.3f}
    TF-IDF with logistic regression   {baseline:.3f}
    MiniLM-L6 after fine-tuning       {after:.3f}

  Report  {ROOT / REPORT}
  Took    {seconds:.0f} s, installation and downloads apart

  Next
""")
    width = max(map(len, commands))
    for command, purpose in commands.items():
        print(f"    {command.ljust(width)}   {purpose}")
    if after > baseline:
        return 0
    print(
        f"\nerror: fine-tuning reached {after:.3f}, which is not above the baseline's "
        f"{baseline:.3f}\n\nhint: see the curves in {REPORT}",
        file=sys.stderr,
    )
    return 1


def _accuracy(evaluation: object) -> float:
    assert isinstance(evaluation, dict)
    return float(evaluation["metrics"]["accuracy"])


def _rows(evaluation: object) -> int:
    assert isinstance(evaluation, dict)
    return int(evaluation["rows"])


# ------------------------------------------------------------------------------------ commands


def _shoal(*arguments: str, capture: bool = False) -> str:
    """Run a shoal command as a user would, and show it; its stdout if `capture`.

    It has a process group of its own, so that a signal reaches it once, through us: the second
    Ctrl-C would kill a run that the first asks to save its state. Ends the demo with the
    command's exit code if that is not 0.
    """
    _say(f"$ {shlex.join(['shoal', *arguments])}")
    program = Path(sys.executable).with_name("shoal")
    interrupted = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        command.send_signal(signal.SIGINT)

    with subprocess.Popen(
        [program, *arguments],
        stdout=subprocess.PIPE if capture else None,
        text=True,
        process_group=0,
    ) as command:
        before = {
            number: signal.signal(number, pass_on)
            for number in _SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            stdout, _ = command.communicate()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if command.returncode or interrupted:
        sys.exit(command.returncode or _STOPPED)
    return stdout or ""


def _say(line: str) -> None:
    print(f"\n{line}", flush=True)


@contextlib.contextmanager
def _the_only_demo() -> Iterator[None]:
    """Two demos in one checkout would stop each other's store."""
    lock = filelock.FileLock(".shoal/demo.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        sys.exit("error: a demo runs in this checkout already\n\nhint: wait for it, or stop it")
    try:
        yield
    finally:
        lock.release()


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(_STOPPED)


if __name__ == "__main__":
    for signal_number in _SIGNALS:
        signal.signal(signal_number, _stop)
    sys.exit(main())
