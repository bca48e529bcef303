"""The loss that balances a student's experts: as the architecture's own training has it, and only where asked for."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltakd.data import Encoded, collate
from deltakd.io.run_directory import RunDirectory
from deltakd.losses import SupervisedFineTuning
from deltakd.models import LanguageModel
from deltakd.models.experts import router_loss_problem
from deltakd.training.step import DistillationStep
from deltakd.types import Batch
from tests.distributed.processes import on_ranks
from tests.models.test_architectures import ROWS, V, build
from tests.references.serving.test_server_process import train as train_at
from tests.tiny import World, save_model

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
                  "shared_expert_intermediate_size": 8, "decoder_sparse_step": 1},
    "qwen3_next": {},
}  # fmt: skip


def batch_of(rows: list[list[int]]) -> Batch:
    return collate([Encoded(row, [-100, -100, *row[2:]], i) for i, row in enumerate(rows)], 1, 0, 0)


def by_hand(model: LanguageModel, rows: list[list[int]], experts: int, chosen: int) -> float:
    """Experts × Σ over experts of (how many choices it gets a token) × (its mean probability), over all layers."""
    logits = []
    for row in rows:
        output: Any = model.causal_lm(torch.tensor([row]), output_router_logits=True)
        logits += [one.detach().double().numpy() for one in output.router_logits]
    given = np.concatenate(logits)
    probabilities = np.exp(given) / np.exp(given).sum(1, keepdims=True)
    counts = np.bincount(np.argsort(-given, axis=1)[:, :chosen].ravel(), minlength=experts)
    return float(experts * (counts / len(given) * probabilities.mean(0)).sum())


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_router_loss_is_its_formula_over_the_real_tokens(kind: str) -> None:
    """Padding counts nothing; the head is the one without it; checkpointed layers give the same gradients."""
    model = LanguageModel(build(kind, **MIXTURES[kind]), V)
    batch = batch_of(ROWS)
    assert router_loss_problem(model.causal_lm) is None
    head, value = model.head_and_router_loss(batch)
    assert float(value.detach()) == pytest.approx(by_hand(model, ROWS, 4, 2), rel=1e-5)
    assert torch.equal(head.hidden, model.head(batch).hidden)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("gate" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())
    model.zero_grad()
    model.train()
    model.causal_lm.gradient_checkpointing_enable()
    model.head_and_router_loss(batch)[1].backward()
    for name, p in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_a_step_adds_it_by_the_valid_tokens_in_training_alone() -> None:
    model = LanguageModel(build("mixtral", **MIXTURES["mixtral"]), V)
    plain = DistillationStep(model, None, SupervisedFineTuning())
    step = DistillationStep(model, None, SupervisedFineTuning(), router_aux_loss_coef=0.5)
    batch = batch_of(ROWS)
    total, parts = step.train()(batch)
    own, _ = plain(batch)
    summed = by_hand(model, ROWS, 4, 2) * len(batch.valid_N)
    assert float(parts["router_aux_loss"]) == pytest.approx(summed, rel=1e-5)
    assert float(total.detach()) == pytest.approx(float(own.detach()) + 0.5 * summed, rel=1e-5)
    total, parts = step.eval()(batch)
    assert float(total.detach()) == pytest.approx(float(own.detach()), rel=1e-6)
    assert "router_aux_loss" not in parts


def test_a_model_without_such_a_loss_is_refused_by_name() -> None:
    assert "LlamaForCausalLM has no experts to balance" in str(router_loss_problem(build("llama")))
    deepseek = build("deepseek_v3", n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                     q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
                     first_k_dense_replace=0, moe_intermediate_size=8)  # fmt: skip
    assert "balances its experts by another way" in str(router_loss_problem(deepseek))


def mixture(directory: Path) -> Path:
    return save_model(directory, seed=0, family="mixtral", num_local_experts=4, num_experts_per_tok=1)


def readings(run: RunDirectory, name: str) -> list[float]:
    with (run.path / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_a_run_logs_it_as_a_metric_of_its_own(train: Callable[..., RunDirectory], tmp_path: Path) -> None:
    student = f"model.student.path={mixture(tmp_path / 'mixture')}"
    run = train("sft", student, "model.router_aux_loss_coef=0.1", "trainer.max_steps=3", "data.batch_size=4")
    assert len(readings(run, "train/router_aux_loss")) == 3
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no experts to balance; leave it out"):
        train("sft", "model.router_aux_loss_coef=0.1", name="dense")


@pytest.mark.slow
def test_two_ranks_balance_as_one_that_accumulates(world: World, tmp_path: Path) -> None:
    shared = (
        f"model.student.path={mixture(tmp_path / 'mixture')}",
        "model.router_aux_loss_coef=0.1",
        "trainer.accelerator=cpu",
        "trainer.max_steps=3",
        "data.batch_size=4",
    )
    one, two = tmp_path / "one", tmp_path / "two"
    train_at(world.overrides(one, "sft", *shared, "trainer.accumulate_grad_batches=2"), one)
    on_ranks(2, train_at, world.overrides(two, "sft", *shared, "strategy=ddp", "trainer.devices=2"), two)
    for name in ("train/router_aux_loss", "train/loss"):
        found = [readings(RunDirectory(path), name) for path in (one, two)]
        assert found[0] == pytest.approx(found[1], rel=1e-4)
