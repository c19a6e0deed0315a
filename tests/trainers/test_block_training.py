"""Compiled blocks, and blocks whose activations are computed twice: the same numbers and names."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from jobs.errors import EnvironmentFault, SpecError
from jobs.record import State
from jobs.spec import JobSpec, Model
from tests import ranks
from tests.evidence import final_weights, losses
from tests.ranks import Kill, assignment_of, on_ranks, run_ranks
from tests.scene import Scene
from tests.tiny import tiny_model
from trainers.block_training import adapt_blocks, compile_ahead, compiler_settings
from trainers.loop import forward
from trainers.microbatch import Cutting
from trainers.parallel import seed_generators
from trainers.records import read_attempts
from trainers.session import Session

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings(
        # of torch's own, of what its compiler loads and looks at
        "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    ),
]

COMPILED = Model(source="x", compile=True)
RECOMPUTED = Model(source="x", activation_checkpointing=True)
BOTH = Model(source="x", compile=True, activation_checkpointing=True)
CUTTING = Cutting(max_tokens=512, launch_tokens=1)
VEC_ISA_OK = True
"""The compiler believes what the kernel says of the processor, without programs that try it."""


def encoder(folder: Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return model.train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, of three blocks."""
    return tiny_model(tmp_path_factory.mktemp("blocks"), layers=3, dropout=0.3)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes the ranks longer than all else that they do."""
    monkeypatch.setattr(ranks, "TIMEOUT_SECONDS", 600)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What Dynamo has traced; it runs as it is, so that no C++ is compiled."""
    found = list[Any]()

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def one_pass(model: nn.Module, *, rows: int = 4, tokens: int = 9) -> dict[str, torch.Tensor]:
    """The gradients of a forward and a backward pass with dropout, over rows with padding."""
    ids = torch.arange(rows * tokens).reshape(rows, tokens) % 150 + 5
    mask = torch.ones_like(ids)
    mask[-1, 3:] = 0
    model.zero_grad(set_to_none=True)
    seed_generators(7)
    model(input_ids=ids, attention_mask=mask).logits[:, 0].sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model: nn.Module) -> int:
    """What a pass keeps between forward and backward."""
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        one_pass(model)
    return total


def run_to_the_end(scene: Scene, run_id: str, spec: JobSpec, **options: Any) -> None:
    generation = options.pop("generation", 1)
    assignment = assignment_of(spec, run_id, generation=generation)
    outcome = run_ranks(assignment, world_size=spec.workers.count, **options)
    assert outcome is not None
    assert outcome.state is State.SUCCEEDED


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---------------------------------------------------------------------- activation checkpointing


def test_gradients_that_are_computed_twice_have_the_same_bits_for_a_part_of_the_memory(
    folder: Path,
) -> None:
    plain, recomputed = encoder(folder), encoder(folder)
    adapt_blocks(recomputed, RECOMPUTED)
    assert_same(one_pass(recomputed), one_pass(plain))
    assert saved_bytes(recomputed) < saved_bytes(plain) / 3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_that_compute_activations_twice_train_the_same_weights(
    scene: Scene, strategy: str
) -> None:
    workers = {"count": 2, "strategy": strategy}
    for run_id, own in (("plain", {}), ("recomputed", {"activation_checkpointing": True})):
        run_to_the_end(scene, run_id, scene.job(workers=workers, model=own))
    assert final_weights(scene.runs, "recomputed") == final_weights(scene.runs, "plain")


def test_a_resume_may_begin_to_compute_activations_twice(scene: Scene) -> None:
    spec = scene.job(train={"epochs": 2})
    assert scene.train(spec, "calm").state is State.SUCCEEDED
    run_ranks(assignment_of(spec, "killed"), world_size=1, kill=Kill("manifest", 1))
    changed = scene.job(train={"epochs": 2}, model={"activation_checkpointing": True})
    assert scene.train(changed, "killed", generation=2).state is State.SUCCEEDED
    assert read_attempts(scene.runs, scene.paths("killed"))[-1].restored_step == 5
    assert final_weights(scene.runs, "killed") == final_weights(scene.runs, "calm")


def test_blocks_with_batchnorm_are_not_computed_twice() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(2)) for _ in range(2))

    with pytest.raises(SpecError, match="BatchNorm"):
        adapt_blocks(Blocks(), RECOMPUTED)
    adapt_blocks(Blocks(), COMPILED)


# ------------------------------------------------------------------------------------- compiling


def test_one_compiled_code_serves_all_blocks_and_all_shapes(
    scene: Scene, folder: Path, graphs: list[Any]
) -> None:
    trainee = Scene(folder, scene.data, scene.folder).trainee(scene.job())
    adapt_blocks(trainee.model, COMPILED)
    with compiler_settings(COMPILED):
        compile_ahead(trainee, CUTTING, most_row_tokens=32)
        assert len(graphs) == 3  # several rows, with and without padding, and one row
        for rows, tokens in ((2, 3), (5, 17), (64, 8), (3, 32), (7, 7), (1, 12), (29, 11)):
            forward(trainee, trainee.task.empty_batch(rows=rows, tokens=tokens)).backward()
            if rows > 1:
                one_pass(trainee.model, rows=rows, tokens=max(4, tokens))
    assert len(graphs) == 3


@pytest.mark.parametrize("spec", [COMPILED, RECOMPUTED, BOTH], ids=["compiled", "twice", "both"])
def test_parameters_keep_their_names(folder: Path, spec: Model) -> None:
    plain, adapted = encoder(folder), encoder(folder)
    adapt_blocks(adapted, spec)
    assert list(adapted.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in adapted.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in adapted.named_modules()] == [n for n, _ in plain.named_modules()]


@dataclass(frozen=True)
class WithoutCpp:
    """In this process compiled blocks are traced, with their gradients if wanted, and no C++ is
    made of them; each graph leaves a file in a folder."""

    folder: Path
    gradients: bool = True

    def __call__(self) -> None:
        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            from torch._dynamo.backends.debugging import aot_eager

            traced = aot_eager(graph, inputs) if self.gradients else graph.forward
            (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
            return traced

        torch.compile = partial(torch.compile, backend=backend)  # type: ignore[assignment]


def test_sharded_blocks_are_compiled_as_those_of_one_process_and_computed_twice(
    scene: Scene,
) -> None:
    workers = {"count": 2, "strategy": "fsdp"}
    run_to_the_end(scene, "plain", scene.job(workers=workers))
    folder = scene.folder / "graphs"
    folder.mkdir()
    spec = scene.job(workers=workers, model={"compile": True, "activation_checkpointing": True})
    run_to_the_end(scene, "compiled", spec, before=WithoutCpp(folder))
    assert len(list(folder.iterdir())) == 2 * 3
    assert losses(scene.runs, "compiled") == pytest.approx(losses(scene.runs, "plain"), rel=1e-3)


def test_a_killed_run_of_compiled_blocks_ends_with_the_same_bits(scene: Scene) -> None:
    spec = scene.job(model={"compile": True})
    folder = scene.folder / "graphs"
    folder.mkdir()
    before = WithoutCpp(folder, gradients=False)
    run_to_the_end(scene, "calm", spec, before=before)
    run_ranks(assignment_of(spec, "killed"), world_size=1, kill=Kill("manifest", 1), before=before)
    run_to_the_end(scene, "killed", spec, generation=2, before=before)
    assert len(list(folder.iterdir())) == 3 * 3
    assert read_attempts(scene.runs, scene.paths("killed"))[-1].restored_step == 5
    assert final_weights(scene.runs, "killed") == final_weights(scene.runs, "calm")


def test_compiled_blocks_whose_activations_are_computed_twice_keep_little(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", torch.compile)  # what WithoutCpp replaces is put back
    torch._dynamo.reset()
    WithoutCpp(tmp_path)()
    both, plain = encoder(folder), encoder(folder)
    adapt_blocks(both, BOTH)
    with compiler_settings(BOTH):
        kept = saved_bytes(both)
    torch._dynamo.reset()
    assert list(tmp_path.iterdir())
    assert kept < saved_bytes(plain) / 3


def test_an_evaluation_runs_the_blocks_as_they_are(folder: Path, graphs: list[Any]) -> None:
    plain, compiled = encoder(folder).eval(), encoder(folder).eval()
    adapt_blocks(compiled, BOTH)
    ids = torch.arange(5, 17).reshape(2, 6)
    with torch.inference_mode():
        assert torch.equal(compiled(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert graphs == []
    with compiler_settings(BOTH):
        one_pass(compiled.train())
    assert graphs


def test_compiling_ahead_leaves_no_trace(scene: Scene, graphs: list[Any]) -> None:
    trainee = scene.trainee(scene.job())
    before = {name: tensor.clone() for name, tensor in trainee.model.state_dict().items()}
    adapt_blocks(trainee.model, COMPILED)
    with compiler_settings(COMPILED):
        compile_ahead(trainee, CUTTING, most_row_tokens=32)
    assert graphs
    assert_same(dict(trainee.model.state_dict()), before)
    assert all(p.grad is None for p in trainee.model.parameters())


def test_each_model_of_a_process_is_compiled_as_the_first_was(
    scene: Scene, graphs: list[Any]
) -> None:
    """What a process has met before would change what is compiled, and at last what is not."""
    for turn in range(1, 4):
        trainee = scene.trainee(scene.job())
        adapt_blocks(trainee.model, COMPILED)
        with compiler_settings(COMPILED):
            forward(trainee, trainee.task.empty_batch(rows=turn, tokens=9)).backward()
            compile_ahead(trainee, CUTTING, most_row_tokens=32)
        traced, graphs[:] = len(graphs), []
        assert traced >= 3


@pytest.mark.parametrize("most_row_tokens", [8, 11, 12, 512])
def test_what_is_compiled_ahead_depends_on_no_limit_and_is_never_square(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, most_row_tokens: int
) -> None:
    trainee, shapes = scene.trainee(scene.job()), list[tuple[int, int]]()
    monkeypatch.setattr(
        "trainers.block_training.spare_passes",
        lambda *_, **__: _Passes(lambda batch: shapes.append(tuple(batch["input_ids"].shape))),
    )
    for limit in (1, 10_000):
        compile_ahead(trainee, Cutting(limit, 1), most_row_tokens=most_row_tokens)
    assert shapes[:3] == shapes[3:]
    del shapes[3:]
    assert [rows > 1 for rows, _ in shapes] == [True, True, False]
    for rows, tokens in shapes:
        assert rows != tokens
        assert tokens <= most_row_tokens


class _Passes:
    def __init__(self, run: Callable[[Any], None]) -> None:
        self._run = run

    def __enter__(self) -> Callable[[Any], None]:
        return self._run

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("key", ["compile", "activation_checkpointing"])
def test_a_model_without_repeated_blocks_is_refused(key: str) -> None:
    with pytest.raises(SpecError, match=f"model.{key} is true, but this model has no list") as told:
        adapt_blocks(nn.Linear(1, 1), Model(source="x", **{key: True}))
    assert told.value.problems[0].hint == f"remove model.{key}"
    adapt_blocks(nn.Linear(1, 1), Model(source="x"))


def test_a_machine_without_a_compiler_is_named_before_the_first_step(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    outcome = scene.train(scene.job(model={"compile": True}))
    assert outcome.failure is not None
    assert outcome.failure.exit_code == EnvironmentFault.exit_code
    ((message, hint),) = outcome.failure.problems
    assert "has no C++ compiler named no-such-compiler" in message
    assert "apt-get install g++" in (hint or "")


class TestWithInductor:
    """Real C++, for a model of which the compiler makes few kernels: each takes it seconds."""

    @pytest.fixture(autouse=True)
    def _surroundings(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        # The compiler's own optimizations are most of its time.
        quick = tmp_path / "g++"
        quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
        quick.chmod(0o755)
        monkeypatch.setenv("CXX", str(quick))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
        monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", VEC_ISA_OK)
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_gradients_have_the_same_bits_compiled_anew_and_computed_twice(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiled, both = few_kernels(), few_kernels()
        adapt_blocks(compiled, COMPILED)
        adapt_blocks(both, BOTH)
        with compiler_settings(BOTH):
            first = gradients(compiled)
            assert_same(gradients(compiled), first)
            assert_same(gradients(both), first)
        # As on another machine.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
        [anew] = on_ranks(compiled_gradients, world_size=1)
        assert_same({name: torch.tensor(values) for name, values in anew.items()}, first)
        assert any((tmp_path / "other").rglob("*.so"))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.linear(self.norm(x)))


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def few_kernels() -> nn.Module:
    torch.manual_seed(5)
    return _Blocks().train()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of a pass with dropout."""
    model.zero_grad(set_to_none=True)
    seed_generators(7)
    model(torch.arange(88.0).reshape(11, 8).sin()).square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compiled_gradients(_: Session) -> dict[str, Any]:
    """In a process of its own."""
    torch._inductor.config.cpp.vec_isa_ok = VEC_ISA_OK
    model = few_kernels()
    adapt_blocks(model, COMPILED)
    with compiler_settings(COMPILED):
        return {name: tensor.tolist() for name, tensor in gradients(model).items()}
