"""What only a GPU can show; skipped on a machine without one. Needs no Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load as load_tensors

from tests.evidence import final_weights, losses, rows_by_epoch
from tests.scene import Scene
from tests.tiny import tiny_model, tiny_reviews, tiny_tree
from trainers.records import read_attempts, read_manifests
from trainers.snapshot import Snapshot
from trainers.state import saved_state

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SMALL_GPU = """
import sys
import torch
from trainers.__main__ import main

total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(450 * 2**20 / total, 0)
sys.argv[0] = "trainers"
main()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A model and data sets that keep a GPU busy for some seconds: 1,600 rows."""
    folder = tmp_path_factory.mktemp("gpu")
    model = tiny_model(folder / "model", layers=4, hidden=128)
    data = tiny_reviews(str(folder / "data"), rows=1600, rows_per_group=200, held_out=64)
    return model, data


@pytest.fixture
def scene(
    world: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Scene:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return Scene(*world, tmp_path)


def job_file(scene: Scene, *, strategy: str = "ddp", epochs: int = 2, **parts: Any) -> str:
    """A job of 100 steps an epoch, 16 rows each, with a checkpoint every 10, all on one GPU."""
    given = {
        "workers": {"count": 1, "gpus": 1, "strategy": strategy},
        "train": {"epochs": epochs, "log_rows": True, "evaluate_every_steps": 50},
        "batching": {"global_batch_size": 16},
        "checkpoint": {"every_steps": 10},
    }
    tree = tiny_tree(
        scene.model, {**scene.data, "seed": 3}, str(scene.runs_folder), **(given | parts)
    )
    path = scene.folder / f"{strategy}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def started(job: str, run_id: str, *, program: tuple[str, ...] = ("-m", "trainers")) -> Any:
    return subprocess.Popen(
        [sys.executable, *program, job, "--run-id", run_id],
        # Without it cuBLAS may choose another algorithm in a process of its own.
        env=os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(job: str, run_id: str, **options: Any) -> tuple[int, str]:
    """Exit code and output of the whole run."""
    process = started(job, run_id, **options)
    said, _ = process.communicate(timeout=240)
    return process.returncode, said


def newest_step(scene: Scene, run_id: str) -> int:
    return max((m.step for m in read_manifests(scene.runs, scene.paths(run_id))), default=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_run_ends_with_the_same_bits_and_goes_on_under_the_other_strategy(
    scene: Scene, strategy: str
) -> None:
    job = job_file(scene, strategy=strategy)
    code, said = ended(job, "calm")
    assert code == 0, said

    process = started(job, "killed")
    deadline = time.monotonic() + 120
    while newest_step(scene, "killed") < 60:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"it ended or hung: {process.communicate()[0]}")
        time.sleep(0.05)
    process.kill()
    process.communicate()
    step = newest_step(scene, "killed")
    assert step < 200
    code, said = ended(job, "killed")
    assert code == 0, said
    attempts = read_attempts(scene.runs, scene.paths("killed"))
    assert [attempt.restored_step for attempt in attempts] == [None, step]
    assert all(attempt.device == torch.cuda.get_device_name() for attempt in attempts)
    assert final_weights(scene.runs, "killed") == final_weights(scene.runs, "calm")
    assert losses(scene.runs, "killed") == losses(scene.runs, "calm")
    rows = rows_by_epoch(scene.runs, "killed")
    assert all(set(epoch.values()) == {1} for epoch in rows.values())

    other = "ddp" if strategy == "fsdp" else "fsdp"
    longer = job_file(scene, strategy=other, epochs=3)
    code, said = ended(longer, "killed")
    assert code == 0, said
    attempts = read_attempts(scene.runs, scene.paths("killed"))
    assert attempts[-1].restored_step == 200
    assert newest_step(scene, "killed") == 300


def test_what_does_not_fit_into_the_gpu_is_halved(scene: Scene) -> None:
    batching = {"global_batch_size": 1024, "max_tokens_per_microbatch": 32768}
    job = job_file(scene, batching=batching)
    code, said = ended(job, "run", program=("-c", SMALL_GPU))
    assert code == 3, said  # a restart helps: nothing is wrong with the job
    assert "does not fit into memory (the limit was 32768 tokens)" in said
    for _ in range(3):
        if code == 0:
            break
        code, said = ended(job, "run", program=("-c", SMALL_GPU))
    assert code == 0, said
    sizes = [a.max_tokens_per_microbatch for a in read_attempts(scene.runs, scene.paths())]
    assert sizes[-1] is not None
    assert sizes[-1] < 32768


def test_a_gradient_that_is_not_finite_ends_the_run_with_a_hint(scene: Scene) -> None:
    job = job_file(scene, optimizer={"learning_rate": 1e30, "schedule": "constant"})
    code, said = ended(job, "run")
    assert code == 1, said
    assert "the gradient is not finite" in said
    assert "lower optimizer.learning_rate" in said


def test_a_snapshot_is_pinned_and_does_not_change_with_the_training(scene: Scene) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    from jobs.spec import Optimizer
    from trainers.loop import Trainee
    from trainers.optim import build_optimizer

    device = torch.device("cuda")
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=4)).to(device)
    optimizer = build_optimizer(model, Optimizer(learning_rate=1e-4))
    task: Any = None
    trainee = Trainee(task, model, optimizer, device, torch.float32)
    ids = torch.randint(0, 30_000, (16, 64), device=device)
    labels = torch.zeros(16, dtype=torch.long, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()

    step()
    snapshot = Snapshot()
    files = snapshot.take(trainee)
    # The copies are asked for while the device still works on the steps before.
    for _ in range(3):
        step()
    expected = {
        name: {key: value.cpu().clone() for key, value in tensors.items()}
        for name, tensors in saved_state(trainee).files.items()
    }
    assert snapshot.take(trainee).keys() == files.keys()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    assert expected.keys() <= files.keys()
    for name, tensors in expected.items():
        held = load_tensors(bytes(files[name]))
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[key], value) for key, value in tensors.items())
        assert torch.frombuffer(files[name], dtype=torch.uint8).is_pinned()
