"""Adapters: small checkpoints, exact resumes, and models that load without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from cluster.storage import open_store
from jobs.checkpoints import consolidate
from jobs.checks.adaptation import check_adapter, trained_parameters
from jobs.checks.weights import read_weights
from jobs.record import ADAPTER_WEIGHTS, Outcome
from jobs.runs import RunReader
from jobs.spec import JobSpec, LoraAdapter
from tests.ranks import Kill, assignment_of, run_ranks
from tests.scene import Scene
from tests.tiny import tiny_model
from trainers.adapted_folder import adapt, load_model
from trainers.adapter_targets import auto_targets
from trainers.adapters import add_adapter
from trainers.evaluate import evaluate_run
from trainers.finish import build_result, write_result
from trainers.freezing import freeze

MERGED: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "dropout": 0.1},
    "dora": {"kind": "dora", "rank": 2, "target_modules": ["query", "layer.?.output.dense"]},
    "ia3": {"kind": "ia3"},
}
PROMPTS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt-tuning", "virtual_tokens": 3},
    "prefix": {"kind": "prefix-tuning", "virtual_tokens": 3},
}
ADAPTERS = MERGED | PROMPTS
IDS = torch.tensor([[2, 70, 80, 9, 3], [2, 40, 3, 0, 0]])
MASK = (IDS != 0).long()
LARGEST_DIFFERENCE = 1e-4


@pytest.fixture(scope="session")
def tiny_world(
    tiny_world: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """With a model whose layers count: those of the others give nearly nothing, being untrained."""
    model, data = tiny_world
    folder = shutil.copytree(model, tmp_path_factory.mktemp("adapters") / "model")
    weights = load_file(folder / "model.safetensors")
    louder = {name: 8 * t if "encoder" in name and t.ndim > 1 else t for name, t in weights.items()}
    save_file(louder, folder / "model.safetensors", {"format": "pt"})
    return folder, data


def job(scene: Scene, adapter: Mapping[str, Any], **parts: Any) -> JobSpec:
    own = {"optimizer": {"learning_rate": 0.05, "schedule": "constant"}, **parts}
    model = {"adapter": dict(adapter), **own.pop("model", {})}
    return scene.job(model=model, **own)


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=MASK).logits
    return logits


@pytest.fixture(scope="module")
def adapted_model(request: pytest.FixtureRequest) -> Callable[[Scene, JobSpec, Path], Any]:
    def build(scene: Scene, spec: JobSpec, checkpoint: Path) -> Any:
        """The unmerged model of a checkpoint."""
        from trainers.preparation import build_model
        from trainers.session import ProcessSession

        task = scene.trainee(spec).task
        with ProcessSession(use_gpu=False) as session:
            return build_model(
                task, scene.model, spec, session, dropout=None, adapter_in=checkpoint
            )

    return build


# ------------------------------------------------------------------ checkpoints and exported models


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_run_saves_an_adapter_resumes_bit_by_bit_and_leaves_a_model_that_loads(
    scene: Scene,
    kind: str,
    adapted_model: Callable[[Scene, JobSpec, Path], Any],
) -> None:
    spec = job(scene, ADAPTERS[kind])
    assert scene.train(spec).state == "SUCCEEDED"
    scene.crash(spec, "broken")
    assert scene.train(spec, "broken", generation=2).state == "SUCCEEDED"
    assert scene.manifests("broken")[-1].parent_step == 5
    assert scene.tensors("broken") == scene.tensors()
    checkpoint = scene.checkpoint_folder(scene.manifests()[-1])

    base = load_file(scene.model / "model.safetensors")
    assert (checkpoint / ADAPTER_WEIGHTS).stat().st_size < 0.6 * sum(
        t.nbytes for t in base.values()
    )
    unmerged = adapted_model(scene, spec, checkpoint)
    held = load_file(checkpoint / "optimizer.safetensors")
    trained = {name for name, p in unmerged.named_parameters() if p.requires_grad}
    assert {name.rpartition("/")[0] for name in held} == trained
    assert {"classifier.weight", "classifier.bias"} < trained

    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint / "model")
    loaded = plain if kind in MERGED else load_model(checkpoint / "model")
    assert (outputs(loaded) - outputs(unmerged)).abs().max() < LARGEST_DIFFERENCE
    untrained = AutoModelForSequenceClassification.from_pretrained(scene.model)
    untrained.classifier = plain.classifier
    assert (outputs(loaded) - outputs(untrained)).abs().max() > 100 * LARGEST_DIFFERENCE


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [*MERGED, "prompt"])
def test_peft_loads_the_adapter_of_a_checkpoint(
    scene: Scene, kind: str, adapted_model: Callable[[Scene, JobSpec, Path], Any]
) -> None:
    from peft import PeftModel

    spec = job(scene, ADAPTERS[kind], train={"epochs": 1})
    scene.train(spec)
    checkpoint = scene.checkpoint_folder(scene.manifests()[-1])
    base = AutoModelForSequenceClassification.from_pretrained(scene.model)
    theirs = PeftModel.from_pretrained(base, checkpoint / "adapter")
    ours = adapted_model(scene, spec, checkpoint)
    assert (outputs(theirs) - outputs(ours)).abs().max() < LARGEST_DIFFERENCE


def test_a_killed_group_with_an_adapter_ends_with_the_same_bits(scene: Scene) -> None:
    spec = job(scene, MERGED["lora"], workers={"count": 2})
    run_ranks(assignment_of(spec, "calm"), world_size=2)
    run_ranks(assignment_of(spec, "killed"), world_size=2, kill=Kill("manifest", 1))
    run_ranks(assignment_of(spec, "killed", generation=2), world_size=2)
    assert scene.manifests("killed")[-1].parent_step == 5
    assert scene.tensors("killed") == scene.tensors("calm")


def finish(scene: Scene, outcome: Outcome, run_id: str = "run") -> None:
    paths = scene.paths(run_id)
    write_spec(scene, run_id)
    write_result(scene.runs, paths, build_result(scene.runs, paths, generation=1, ended=outcome))


def write_spec(scene: Scene, run_id: str) -> None:
    scene.runs.write(scene.paths(run_id).spec, SPECS[run_id].to_bytes())


SPECS: dict[str, JobSpec] = {}
"""Of the runs of a test, which only a driver writes."""


@pytest.mark.parametrize("kind", ["dora", "prompt"])
def test_a_run_goes_on_from_the_model_of_an_adapted_one(scene: Scene, kind: str) -> None:
    first = SPECS["run"] = job(scene, ADAPTERS[kind], train={"epochs": 1})
    outcome = scene.train(first)
    finish(scene, outcome)
    second = job(scene, ADAPTERS[kind], model={"source": "run"}, train={"epochs": 1})
    after = scene.train(second, "second")
    assert outcome.test is not None
    assert after.before is not None
    assert after.before["metrics"] == pytest.approx(outcome.test["metrics"], rel=1e-3)


def test_virtual_tokens_of_a_model_are_not_left_out(scene: Scene) -> None:
    SPECS["run"] = job(scene, PROMPTS["prompt"], train={"epochs": 1})
    finish(scene, scene.train(SPECS["run"]))
    outcome = scene.train(scene.job(model={"source": "run"}), "second")
    assert outcome.failure is not None
    [(message, hint)] = outcome.failure.problems
    assert "3 virtual tokens" in message
    assert hint is not None
    assert "{kind: prompt-tuning, virtual_tokens: 3}" in hint


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_checkpoint_with_an_adapter_only_is_evaluated_and_made_a_model(
    scene: Scene, kind: str
) -> None:
    SPECS["run"] = job(scene, ADAPTERS[kind], data={"validation": None})
    scene.crash(SPECS["run"])
    write_spec(scene, "run")
    [manifest] = scene.manifests()
    assert manifest.has_adapter
    assert not manifest.has_model
    measured = evaluate_run(scene.runs, "run", scene.data["test"], scene.folder / "predictions")
    assert measured["step"] == 5
    reader = RunReader(scene.runs, "run")
    consolidate(reader, 5, to=str(scene.folder / "whole"))
    model = load_model(scene.folder / "whole")
    checkpoint = scene.checkpoint_folder(manifest)
    head = load_file(checkpoint / ADAPTER_WEIGHTS)
    name = next(name for name in head if name.endswith("classifier.weight"))
    assert torch.equal(model.classifier.weight, head[name])
    assert {path.name for path in (scene.folder / "whole").iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }


def test_an_adapter_is_not_put_on_another_model(scene: Scene) -> None:
    folder = shutil.copytree(scene.model, scene.folder / "model")
    spec = job(scene, MERGED["lora"], model={"source": str(folder)})
    scene.crash(spec)
    tiny_model(folder, seed=1)
    outcome = scene.train(spec, generation=2)
    assert outcome.failure is not None
    assert outcome.failure.state == "FAILED_SPEC"
    assert "another model" in outcome.failure.problems[0][0]


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("adapter", "named", "near"),
    [
        ({"kind": "lora", "target_modules": ["quary"]}, "quary", "query"),
        ({"kind": "lora", "target_modules": ["query", "classifier"]}, "classifier", ""),
        ({"kind": "ia3", "target_modules": ["attention.self.kez"]}, "self.kez", "self.key"),
    ],
)
def test_layers_that_there_are_not_are_told_with_the_nearest(
    scene: Scene, adapter: dict[str, Any], named: str, near: str
) -> None:
    outcome = scene.train(job(scene, adapter))
    assert outcome.failure is not None
    [(message, hint)] = outcome.failure.problems
    assert named in message
    assert hint is not None
    assert near in hint
    assert outcome.step == 0


def test_all_linear_layers_are_those_of_the_body(scene: Scene) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(scene.model)
    add_adapter(model, LoraAdapter(kind="lora", target_modules="all-linear"), seed=0)
    adapted = {
        name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name
    }
    assert len(adapted) == 2 * 6 + 1
    assert "bert.pooler.dense" in adapted
    assert "classifier" not in adapted


def test_weights_that_were_not_found_are_trained(scene: Scene, tmp_path: Path) -> None:
    """The pooler lies in the body, and a model that was trained without one has none."""
    folder = shutil.copytree(scene.model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in weights.items() if not name.startswith("pooler")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    spec = job(scene, MERGED["lora"], model={"source": str(folder)})
    task = scene.trainee(spec).task
    model = task.build_model(folder, dropout=None, seed=0)
    adapt(model, spec, folder=folder)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"bert.pooler.dense.weight", "classifier.weight"} < trained


@pytest.mark.parametrize("kind", PROMPTS)
def test_padding_changes_nothing_beside_virtual_tokens(scene: Scene, kind: str) -> None:
    spec = job(scene, PROMPTS[kind])
    model: Any = scene.trainee(spec).task.build_model(scene.model, dropout=None, seed=0)
    alone = outputs(model)
    adapt(model, spec, folder=scene.model)
    padded = outputs(model)
    with torch.no_grad():
        short = model(input_ids=IDS[1:, :3]).logits
    assert (short[0] - padded[1]).abs().max() < LARGEST_DIFFERENCE
    assert (padded - alone).abs().max() > 10 * LARGEST_DIFFERENCE


def test_virtual_tokens_need_positions(scene: Scene) -> None:
    adapter = {"kind": "prompt-tuning", "virtual_tokens": 40}
    outcome = scene.train(job(scene, adapter))
    assert outcome.failure is not None
    assert "max_tokens: 24" in (outcome.failure.problems[0][1] or "")


@pytest.mark.parametrize("kind", [None, "all-linear", *ADAPTERS])
def test_the_check_counts_the_weights_that_are_trained(scene: Scene, kind: str | None) -> None:
    adapter = None if kind is None else ADAPTERS.get(kind, {"kind": "lora", "target_modules": kind})
    spec = scene.job(model={"adapter": adapter} if adapter else {"freeze": ["layer.?", "pooler"]})
    model = scene.trainee(spec).task.build_model(scene.model, dropout=None, seed=0)
    adapt(model, spec, folder=scene.model)
    freeze(model, spec.model.freeze)
    store = open_store(scene.model)
    weights = read_weights(store, {head.key: head.num_bytes for head in store.list()})
    config = json.loads(store.read("config.json"))
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(spec, weights, config) == expected
    assert not list(check_adapter(spec, weights, config, "it"))[1:]


def test_the_check_names_the_nearest_layers(scene: Scene) -> None:
    spec = job(scene, {"kind": "lora", "target_modules": ["quary", "value"]})
    store = open_store(scene.model)
    weights = read_weights(store, {head.key: head.num_bytes for head in store.list()})
    [finding] = check_adapter(spec, weights, {"model_type": "bert"}, "it")
    assert finding.verdict == "problem"
    assert "quary" in finding.message
    assert finding.hint == "did you mean query?"
    auto = job(scene, {"kind": "lora"})
    [finding] = check_adapter(auto, weights, {"model_type": "of my own"}, "it")
    assert "auto, which is not known for a of my own model" in finding.message


def test_auto_is_what_peft_takes_where_both_know_a_model() -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    lora = LoraAdapter(kind="lora")
    both = [(name, auto_targets(lora, name)) for name in THEIRS]
    known = {name: list(targets.modules) for name, targets in both if targets is not None}
    assert len(known) > 15
    assert known | {"phi": THEIRS["phi"]} == {name: THEIRS[name] for name in known}
