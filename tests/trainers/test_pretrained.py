"""model.source: a folder, a store, a run, a name on the hub; what is said of each that is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

from cluster.storage import DamagedObject, Store
from jobs.errors import DataError, EnvironmentFault, ShoalError, SpecError, render_error
from jobs.spec import JobSpec, StoreAccess
from tests.scene import Scene
from trainers.data.tokenizers import load_tokenization
from trainers.finish import build_result
from trainers.pretrained import pretrained_folder
from trainers.tasks.text_classification import load_tokenizer


def spec_of(scene: Scene, source: str, *, revision: str | None = None) -> JobSpec:
    return scene.job(model={"source": source, "revision": revision})


def found(scene: Scene, source: str, *, revision: str | None = None) -> Path:
    spec = spec_of(scene, source, revision=revision)
    return pretrained_folder(spec, cache_folder=scene.folder / "cache")


def refused(scene: Scene, source: str, **keys: Any) -> tuple[ShoalError, str]:
    """The error, and its message and hint."""
    with pytest.raises(ShoalError) as raised:
        found(scene, source, **keys)
    [problem] = raised.value.problems
    return raised.value, f"{problem.message} | {problem.hint}"


@pytest.fixture
def model(scene: Scene) -> Path:
    """A copy of the model's folder that a test may change."""
    return Path(shutil.copytree(scene.model, scene.folder / "own-model"))


def upload(store: Store, folder: Path) -> None:
    for path in folder.iterdir():
        store.upload(path.name, path)


def weights(folder: Path) -> dict[str, bytes]:
    return {n: t.tobytes() for n, t in load_file(folder / "model.safetensors").items()}


# --------------------------------------------------------------------------- folders and stores


def test_a_local_folder_is_taken_as_it_is(scene: Scene, model: Path) -> None:
    assert found(scene, str(model)) == model


def test_a_folder_of_a_store_is_fetched_once_and_followed_when_it_changes(
    scene: Scene, model: Path, s3_store: Store
) -> None:
    store = s3_store.within("model")
    upload(store, model)
    store.write("pytorch_model.bin", b"not fetched")
    folder = found(scene, store.uri)
    assert weights(folder) == weights(model)
    assert not (folder / "pytorch_model.bin").exists()
    assert found(scene, store.uri) == folder
    config = json.loads((model / "config.json").read_text()) | {"hidden_dropout_prob": 0.4}
    store.write("config.json", json.dumps(config).encode())
    changed = found(scene, store.uri)
    assert changed != folder
    assert json.loads((changed / "config.json").read_text())["hidden_dropout_prob"] == 0.4


def test_legacy_weights_are_refused(scene: Scene, model: Path, s3_store: Store) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    upload(s3_store, model)
    for source in (str(model), s3_store.uri):
        error, said = refused(scene, source)
        assert isinstance(error, SpecError)
        assert "has no safetensors weights, only pytorch_model.bin" in said
        assert "save_pretrained" in said


def test_a_folder_without_weights_is_refused(scene: Scene, model: Path) -> None:
    (model / "model.safetensors").unlink()
    _, said = refused(scene, str(model))
    assert f"{model} has no safetensors weights |" in said


def test_a_folder_without_a_configuration_is_refused(
    scene: Scene, model: Path, s3_store: Store
) -> None:
    (model / "config.json").unlink()
    upload(s3_store, model)
    for source in (str(model), s3_store.uri):
        _, said = refused(scene, source)
        assert f"{source} has no config.json" in said


def test_an_empty_place_in_a_store_is_refused(scene: Scene, s3_store: Store) -> None:
    error, said = refused(scene, s3_store.uri + "/nothing")
    assert error.exit_code == 2
    assert "nothing is there" in said


def test_a_folder_that_is_missing_is_no_name_of_the_hub(scene: Scene) -> None:
    for source in ("./models/missing", str(scene.folder / "missing"), "~/missing", "a/b/c"):
        error, said = refused(scene, source)
        assert isinstance(error, SpecError)
        assert "there is no such folder" in said


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_model_without_a_tokenizer_that_loads_is_refused(model: Path, damage: str) -> None:
    for path in model.glob("tokenizer*"):
        path.write_text("{") if damage == "broken" else path.unlink()
    with pytest.raises(SpecError, match="holds no tokenizer"):
        load_tokenizer(model)


def test_data_is_not_prepared_with_an_empty_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DataError, match=r"no tokenizer can be loaded from .*: it holds no"):
        load_tokenization(str(model), max_tokens=32, access=StoreAccess())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b'{"model_type": "no-such-model"}', b"\xff" * 64])
def test_a_damaged_model_file_is_the_users_error(
    scene: Scene, model: Path, name: str, content: bytes
) -> None:
    task = scene.trainee(scene.job()).task
    (model / name).write_bytes(content)
    with pytest.raises(SpecError, match="holds no model for text-classification"):
        task.build_model(model, dropout=None, seed=0)


# ----------------------------------------------------------------------------------------- runs


@pytest.fixture
def trained(scene: Scene) -> Path:
    """The best model of the run `teacher`, which has ended."""
    spec = scene.job(train={"epochs": 1})
    outcome = scene.train(spec, "teacher")
    paths = scene.paths("teacher")
    result = build_result(scene.runs, paths, generation=1, ended=outcome)
    scene.runs.write(paths.result, result.to_bytes())
    return scene.run_folder("teacher") / str(result.best_checkpoint) / "model"


def test_a_run_is_taken_by_its_id_its_folder_and_its_uri(scene: Scene, trained: Path) -> None:
    folder = scene.run_folder("teacher")
    for source in ("teacher", str(folder), f"file://{folder}"):
        assert weights(found(scene, source)) == weights(trained)


def test_a_run_whose_result_is_damaged_is_refused_with_a_way_out(
    scene: Scene, trained: Path
) -> None:
    key = scene.paths("teacher").result
    scene.runs.write(key, scene.runs.read(key).replace(b"step-", b"stop-"))
    with pytest.raises(DamagedObject, match=r"teacher/result\.json is damaged") as refused:
        found(scene, "teacher")
    assert f"shoal resume {scene.runs.uri}/teacher" in render_error(refused.value)


def test_a_run_in_another_store_is_taken_by_its_uri(
    scene: Scene, trained: Path, s3_store: Store
) -> None:
    for head in list(scene.runs.list("teacher/")):
        s3_store.write(head.key, scene.runs.read(head.key))
    assert weights(found(scene, f"{s3_store.uri}/teacher")) == weights(trained)


def test_a_run_begins_with_the_weights_of_another(scene: Scene, trained: Path) -> None:
    outcome = scene.train(spec_of(scene, "teacher"), "pupil")
    assert outcome.state == "SUCCEEDED"


def test_a_run_that_has_not_ended_is_refused(scene: Scene) -> None:
    scene.runs.write(scene.paths("going").spec, scene.job().to_bytes())
    for source in ("going", str(scene.run_folder("going"))):
        error, said = refused(scene, source)
        assert isinstance(error, SpecError)
        assert "model.source is the run going, which has no model yet" in said
        assert "shoal status" in said


def test_a_damaged_model_of_a_run_is_refused(scene: Scene, trained: Path) -> None:
    content = bytearray((trained / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (trained / "model.safetensors").write_bytes(content)
    error, said = refused(scene, "teacher")
    assert error.exit_code == 3
    assert "model.safetensors is damaged" in said


# ------------------------------------------------------------------------------------------ hub


def test_a_model_of_the_hub_needs_a_revision(scene: Scene) -> None:
    error, said = refused(scene, "someone/encoder")
    assert isinstance(error, SpecError)
    assert "model.revision is missing" in said


def test_a_hub_that_is_not_reached_is_the_environments_fault(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(scene.folder / "hub"))
    error, said = refused(scene, "someone/encoder", revision="main")
    assert isinstance(error, EnvironmentFault)
    assert "someone/encoder cannot be fetched from the hub (HF_HUB_OFFLINE is set)" in said


@pytest.mark.parametrize("name", ["some..one/encoder", "-encoder", "someone/encoder.git"])
def test_a_name_that_the_hub_does_not_allow_is_the_users_error(scene: Scene, name: str) -> None:
    error, said = refused(scene, name, revision="main")
    assert isinstance(error, SpecError)
    assert name in said


def test_a_model_of_the_hub_is_fetched_at_its_revision_without_legacy_weights(
    scene: Scene, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert found(scene, "someone/encoder", revision="abc") == model
    assert (asked["name"], asked["revision"]) == ("someone/encoder", "abc")
    assert "*.safetensors" in asked["patterns"]
    assert not any(pattern.endswith("bin") for pattern in asked["patterns"])
