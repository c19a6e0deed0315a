"""Which metrics there are, from the code that exports them: names, with their labels."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from synthetic import START, running
from synthetic_study import running_study

from cluster.storage import Store, open_store
from jobs.exporter import _Run
from jobs.prometheus import exposition
from jobs.runs import RunReader
from jobs.status import read_status

Metrics = dict[str, set[str]]
TRAINERS = Path(__file__).parent.parent.parent / "trainers"


def of_drivers(folder: Path) -> Metrics:
    """What the driver of a run serves, and that of a study."""
    store = open_store(folder)
    run, study = running(store, now=START), running_study(store, now=START)
    found = _metrics(store, run.run_id)
    for name, labels in _metrics(store, study.run_id).items():
        found.setdefault(name, set()).update(labels)
    for family in _Run(RunReader(store, run.run_id)).collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _metrics(store: Store, run_id: str) -> Metrics:
    reader = RunReader(store, run_id)
    text = exposition(read_status(reader), reader.metrics_lines())
    found: Metrics = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def keys_of_training_lines() -> set[str]:
    """What the first rank tells of its steps, from its source."""
    tree = ast.parse((TRAINERS / "worker.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Dict):
            continue
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        values = dict(zip(keys, node.values, strict=True))
        kind = values.get("kind")
        if isinstance(kind, ast.Constant) and kind.value == "train":
            return {str(key) for key in keys}
    raise AssertionError("trainers/worker.py tells of no training")


def of_ray() -> set[str]:
    """Names of what a node of Ray exports of itself, from Ray's source."""
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    reporter = Path(found.origin).parent / "dashboard/modules/reporter/reporter_agent.py"
    names = re.findall(r'Gauge\(\s*"(node_\w+)"', reporter.read_text(encoding="utf-8"))
    assert len(names) > 20
    return {f"ray_{name}" for name in names}
