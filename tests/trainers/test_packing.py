"""Packing: what padded rows give, without their padding, and a model that is not fit is refused."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    T5Config,
)

from jobs.errors import SpecError
from jobs.record import State
from jobs.runs import RunReader
from tests.evidence import final_weights, losses
from tests.ranks import Kill, assignment_of, on_ranks, run_ranks
from tests.scene import Scene
from trainers.evaluate import evaluate_run
from trainers.freezing import freeze
from trainers.packing import (
    Packing,
    attend_by_length,
    attend_jagged,
    pack_blocks,
    packed_attention,
    packed_tensors,
    packing_arguments,
)
from trainers.parallel import local_part, plain, replicate, shard
from trainers.session import ProcessSession, Session
from trainers.tasks.task import Batch

CPU = torch.device("cpu")
ALONE = ProcessSession(use_gpu=False)
SIZES = {"vocab_size": 60, "num_labels": 3, "initializer_range": 0.3}
BERT_LIKE = SIZES | {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
ALLOWED = {
    "bert": BertConfig(**BERT_LIKE),
    "roberta": RobertaConfig(**BERT_LIKE),
    "electra": ElectraConfig(**BERT_LIKE, embedding_size=8),
    "distilbert": DistilBertConfig(
        **SIZES, dim=16, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=40,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    ),
}  # fmt: skip
REFUSED = {
    "modernbert": (
        ModernBertConfig(**BERT_LIKE, pad_token_id=0, global_attn_every_n_layers=1),
        "its layers cannot compute it",
    ),
    "deberta-v2": (
        DebertaV2Config(**BERT_LIKE, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        "its attention cannot be exchanged",
    ),
    "mpnet": (MPNetConfig(**BERT_LIKE), "its attention cannot be exchanged"),
    "albert": (AlbertConfig(**BERT_LIKE, embedding_size=8), "it has no repeated layers"),
    "gpt2": (
        GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=40, pad_token_id=0),
        "its layers cannot compute it",
    ),
    "t5": (
        T5Config(**SIZES, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        "its layers cannot compute it",
    ),
}
LENGTHS = [(9, 4, 4, 4, 1), (7,), (1,), (6, 6), (12, 7, 3, 2)]


def model_of(config: Any, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForSequenceClassification.from_config(deepcopy(config))
    return model


def batch_of(lengths: Sequence[int], *, packed: bool = True, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    rows = np.array(lengths)
    mask = np.arange(rows.max())[None, :] < rows[:, None]
    ids = np.where(mask, rng.integers(5, 60, mask.shape), 1)
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask).long()}
    return batch | (packed_tensors(rows) if packed else {})


def forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        **packing_arguments(batch),
    ).logits
    return logits


def packed_model(config: Any, *, seed: int = 0) -> nn.Module:
    model = model_of(config, seed=seed)
    pack_blocks(model, forward, batch_of((5, 3, 3, 1)))
    return model


def gradients(model: nn.Module, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Of the losses of some passes, all of them forward first."""
    model.train()
    model.zero_grad()
    passed = [forward(model, batch) for batch in batches]
    for logits in passed:
        classes = torch.arange(len(logits), device=logits.device) % 3
        cross_entropy(logits.float(), classes).backward()
    return {
        n.replace("_checkpoint_wrapped_module.", ""): p.grad.clone()
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=2e-5, rtol=1e-4, err_msg=name)


# ------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("kind", ALLOWED)
def test_logits_and_gradients_are_those_of_padded_rows(kind: str) -> None:
    padded, packed = model_of(ALLOWED[kind]), packed_model(ALLOWED[kind])
    for lengths in LENGTHS:
        one, other = batch_of(lengths, packed=False), batch_of(lengths)
        torch.testing.assert_close(forward(packed, other), forward(padded, one))
        assert_close(gradients(packed, [other]), gradients(padded, [one]))


@pytest.mark.parametrize("frozen", [["embeddings"], ["embeddings", "encoder"], ["encoder.layer.0"]])
def test_frozen_parts_change_nothing_about_it(frozen: list[str]) -> None:
    padded, packed = model_of(ALLOWED["bert"]), packed_model(ALLOWED["bert"])
    freeze(padded, frozen)
    freeze(packed, frozen)
    expected = gradients(padded, [batch_of(LENGTHS[0], packed=False)])
    assert_close(gradients(packed, [batch_of(LENGTHS[0])]), expected)


def test_layers_compute_real_tokens_only() -> None:
    model = packed_model(ALLOWED["bert"])
    shapes = []
    for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
        layer.attention.register_forward_hook(lambda *call: shapes.append(call[-1][0].shape))
    forward(model, batch_of((9, 4, 1)))
    assert shapes == [(1, 14, 16)] * 3


@pytest.mark.parametrize("kind", ALLOWED)
def test_a_row_does_not_see_its_neighbours(kind: str) -> None:
    model = packed_model(ALLOWED[kind])
    batch = batch_of((6, 4, 4, 2))
    before = forward(model, batch)
    batch["input_ids"][1, 2] += 1
    after = forward(model, batch)
    others = [0, 2, 3]
    assert torch.equal(after[others], before[others])
    assert not torch.allclose(after[1], before[1])


def test_a_row_without_tokens_is_one_of_padding() -> None:
    model = packed_model(ALLOWED["bert"])
    batch = batch_of((3, 0))
    expected = forward(model, batch_of((1,)) | {"input_ids": torch.tensor([[1]])})
    torch.testing.assert_close(forward(model, batch)[1:], expected)


@pytest.mark.parametrize("hooks", ["outside", "inside"])
def test_layers_that_are_computed_again_have_the_packing_of_their_own_pass(hooks: str) -> None:
    expected = gradients(model_of(ALLOWED["bert"]), [batch_of(n, packed=False) for n in LENGTHS])
    model = packed_model(ALLOWED["bert"])
    layers = model.bert.encoder.layer  # type: ignore[union-attr]
    for number, layer in enumerate(layers):  # type: ignore[arg-type]
        if hooks == "outside":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        else:
            layers[number] = checkpoint_wrapper(layer)  # type: ignore[index]
    assert_close(gradients(model, [batch_of(lengths) for lengths in LENGTHS]), expected)


def test_it_computes_in_bfloat16_under_autocast() -> None:
    batch = batch_of(LENGTHS[0])
    model = packed_model(ALLOWED["bert"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = forward(model, batch)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), forward(model, batch), atol=0.2, rtol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("dtype", "atol", "rtol"), [(torch.float32, 2e-5, 1e-3), (torch.bfloat16, 0.05, 0.1)]
)
def test_a_gpu_gives_the_same_and_the_host_does_not_wait_for_it(
    dtype: torch.dtype, atol: float, rtol: float
) -> None:
    expected = gradients(model_of(ALLOWED["bert"]), [batch_of(LENGTHS[0], packed=False)])
    model = packed_model(ALLOWED["bert"]).cuda()
    batch = {name: tensor.cuda() for name, tensor in batch_of(LENGTHS[0]).items()}
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        gradients(model, [batch])  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = gradients(model, [batch])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].cpu(), gradient, atol=atol, rtol=rtol)


# ------------------------------------------------------------------------------------ attention


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("lengths", LENGTHS)
def test_both_attentions_give_the_same(lengths: tuple[int, ...]) -> None:
    """That for a GPU, for which a CPU has a slow way, too; in training and in evaluations."""
    tensors = packed_tensors(np.array(lengths))
    packing = Packing(len(lengths), max(lengths), *tensors.values())
    torch.manual_seed(0)
    given = torch.randn(3, sum(lengths), 2, 8, requires_grad=True)
    found = []
    for attend in (attend_by_length, attend_jagged):
        attended = attend(*given.unbind(), packing, dropout=0.0, scaling=0.3)
        assert attended.shape == (sum(lengths), 2, 8)
        with torch.no_grad():
            alike = attend(*given.unbind(), packing, dropout=0.0, scaling=0.3)
        found.append([attended, *torch.autograd.grad(attended.square().sum(), given), alike])
    torch.testing.assert_close(*found)


def test_dropout_of_attention_is_drawn_from_the_seed() -> None:
    config = BertConfig(**BERT_LIKE | {"attention_probs_dropout_prob": 0.5})
    model, batch = packed_model(config).train(), batch_of((6, 3, 3))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(forward(model, batch))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2])


@pytest.mark.parametrize("what", ["position_bias", "sliding_window", "is_causal"])
def test_what_it_does_not_heed_is_no_attention_of_ours(what: str) -> None:
    packing = Packing(1, 2, *packed_tensors(np.array([2])).values())
    states = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=what):
        packed_attention(nn.Identity(), states, states, states, None, packing=packing, **{what: 1})


# -------------------------------------------------------------------------------------- refusal


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_does_not_allow_it_is_refused(kind: str) -> None:
    config, why = REFUSED[kind]
    with pytest.raises(SpecError) as caught:
        packed_model(config)
    (problem,) = caught.value.problems
    assert f"batching.packing is true, but a {kind} model does not allow it: {why}" in (
        problem.message
    )
    assert problem.hint == "remove batching.packing"


def test_a_model_that_mixes_rows_is_refused() -> None:
    """One whose layers look at the token before, as a convolution does; its head tells nothing."""
    model = model_of(ALLOWED["bert"])
    nn.init.zeros_(model.classifier.weight)  # type: ignore[arg-type,union-attr]
    dense = model.bert.encoder.layer[1].output.dense  # type: ignore[index,union-attr]
    dense.register_forward_hook(lambda module, args, output: output + output.roll(1, dims=1))
    with pytest.raises(SpecError, match="what it computes would change"):
        pack_blocks(model, forward, batch_of((5, 3, 3, 1)))


# ---------------------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class PackedPasses:
    """Gradients of three passes of rows that the ranks share out, summed up before they are
    averaged; a rank that has no rows computes some that weigh nothing."""

    strategy: str

    def __call__(self, session: Session) -> dict[str, Any]:
        torch.set_num_threads(1)
        world, rank = session.world_size, session.rank
        model = packed_model(ALLOWED["bert"])
        freeze(model, ["embeddings", "encoder.layer.0"])
        if self.strategy == "fsdp":
            model = shard(model, device=CPU, dtype=torch.float32)
        elif self.strategy == "ddp":
            spare = batch_of([2])
            model = replicate(
                model,
                device=CPU,
                world_size=world,
                loss_of=lambda model: 0 * forward(model, spare).sum(),
            )
        model.train()
        for number, lengths in enumerate([(9, 4, 4, 1), (1,), (6, 6, 2)]):
            rows = range(len(lengths))[rank::world]
            held = batch_of(lengths, seed=number)
            own = batch_of([lengths[row] for row in rows] or [2])
            longest = own["input_ids"].shape[1]
            if rows:
                own["input_ids"] = held["input_ids"][list(rows), :longest]
            losses = cross_entropy(
                forward(model, own), torch.zeros(max(1, len(rows))).long(), reduction="none"
            )
            (losses.sum() * (world if rows else 0)).backward()
        named = plain(model).named_parameters()
        return {n: local_part(p.grad).numpy() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_have_the_gradients_of_one(strategy: str) -> None:
    alone = PackedPasses("none")(ALONE)
    ranks = on_ranks(PackedPasses(strategy), world_size=2)
    if strategy == "fsdp":
        ranks = [{n: np.concatenate([rank[n] for rank in ranks]) for n in ranks[0]}]
    for rank in ranks:
        assert_close(rank, alone)


# ----------------------------------------------------------------------------------------- runs


def packed_job(scene: Scene, *, packing: bool = True, **parts: Any) -> Any:
    batching = {"packing": packing, "max_tokens_per_microbatch": 64, "launch_tokens": 8}
    return scene.job(batching=batching, **parts)


def test_a_run_computes_no_padding_and_learns_the_same(scene: Scene) -> None:
    spec = packed_job(scene, model={"dropout": 0.0})
    assert scene.train(spec, "packed").state is State.SUCCEEDED
    lines = RunReader(scene.runs, "packed").metrics()
    assert {line["padding_share"] for line in lines if line["kind"] == "train"} == {0.0}
    padded = packed_job(scene, packing=False, model={"dropout": 0.0})
    assert scene.train(padded, "padded").state is State.SUCCEEDED
    assert losses(scene.runs, "packed") == pytest.approx(losses(scene.runs, "padded"), abs=1e-4)
    measured = evaluate_run(scene.runs, "packed", scene.data["test"], scene.folder / "rows.parquet")
    assert measured["rows"] == 11
    # The folder that the run leaves is that of any model.
    folder = Path(scene.runs_folder, "packed")
    assert "shoal_packed" not in "".join(p.read_text() for p in folder.rglob("config.json"))


def test_a_killed_run_ends_with_the_same_bits(scene: Scene) -> None:
    """On two ranks, whose rows are cut into different numbers of micro-batches."""
    spec = packed_job(scene, workers={"count": 2})
    assert run_ranks(assignment_of(spec, "calm"), world_size=2) is not None
    assert run_ranks(assignment_of(spec, "killed"), world_size=2, kill=Kill("step", 7)) is None
    resumed = assignment_of(spec, "killed", generation=2)
    assert run_ranks(resumed, world_size=2) is not None
    assert final_weights(scene.runs, "killed") == final_weights(scene.runs, "calm")
