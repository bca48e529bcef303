"""The step and its module by themselves, without a run around them."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from deltakd.data.batches.data_module import DistillationData
from deltakd.data.encoding.encoded_set import EncodedSet, flatten
from deltakd.losses import Distillation, ForwardKL, SupervisedFineTuning, delta_target
from deltakd.models import LanguageModel, ModelSpec, load_model
from deltakd.references import LiveReferences
from deltakd.training.module import DistillationModule
from deltakd.training.optim import AdamW
from deltakd.training.step import DistillationStep
from deltakd.types import IGNORE_INDEX, AlignedStream, Alignment, Batch
from tests.tiny import save_model

V = 60


def open_model(directory: Path, seed: int, width: int = 16) -> LanguageModel:
    """A model without dropout, whose logits are far from uniform."""
    path = directory / f"{seed}"
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.3}
    save_model(path, seed=seed, width=width, vocab_size=V, **options)
    return LanguageModel(load_model("student", ModelSpec(str(path)), vocabulary=V), V)


def make_batch() -> Batch:
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = IGNORE_INDEX
    labels[0, 7:] = IGNORE_INDEX
    return Batch(ids, torch.ones_like(ids), labels, torch.arange(3), 0, 13)


def logits_at_labels(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """[N, V] logits by transformers alone, and [N] labels."""
    logits_BTV = model.causal_lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    shifted_BT = batch.labels[:, 1:]
    return logits_BTV[:, :-1][shifted_BT != IGNORE_INDEX], shifted_BT[shifted_BT != IGNORE_INDEX]


def test_a_step_is_its_formula_over_whole_logits_in_value_and_gradient(tmp_path: Path) -> None:
    """Delta-KD by hand: z = z_t + α (z_s0 − z_t0), 0.2 · CE + 0.8 · τ² · KL, summed over the valid tokens."""
    student, raw = open_model(tmp_path, 1), open_model(tmp_path, 4)
    pair = {"teacher": open_model(tmp_path, 2, 24), "teacher_raw": open_model(tmp_path, 3, 24)}
    loss = Distillation(delta_target(0.7), ForwardKL(), temperature=2.0, ce_weight=0.2, temperature_squared=True)
    step = DistillationStep(student.train(), LiveReferences(pair | {"student_raw": raw}), loss)
    batch = make_batch()
    total, parts = step(batch)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    z, labels = logits_at_labels(student, batch)
    with torch.no_grad():
        z_t, z_t0, z_s0 = (logits_at_labels(m, batch)[0] for m in (pair["teacher"], pair["teacher_raw"], raw))
        target = ((z_t + 0.7 * (z_s0 - z_t0)) / 2).softmax(-1)
    cross_entropy = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    divergence = (target * (target.log() - (z / 2).log_softmax(-1))).sum()
    expected = 0.2 * cross_entropy + 0.8 * 4 * divergence
    expected.backward()
    assert len(labels) == batch.step_tokens
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts["ce"].item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    for name, p in student.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


def test_references_are_no_part_of_the_module(tmp_path: Path) -> None:
    """Not of its state, its parameters, its mode or its dtype."""
    student, teacher = open_model(tmp_path, 1), open_model(tmp_path, 2)
    module = DistillationModule(
        student, LiveReferences({"teacher": teacher}), SupervisedFineTuning(), AdamW(), total_steps=1, seed=0
    )
    assert all(name.startswith("step.student.") for name in module.state_dict())
    assert {id(p) for p in module.parameters()} == {id(p) for p in student.parameters()}
    module.train().double()
    assert not teacher.training
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.filterwarnings("ignore:You have overridden `transfer_batch_to_device`")
def test_any_trainer_of_lightning_trains_the_module(tmp_path: Path) -> None:
    """Its own loop with PyTorch alone gives the same student: two micro-batches a step, each token weighs the same."""
    rows = [[5 + row, 7, 9, *range(10, 11 + row % 4), 2] for row in range(12)]
    labels = [[IGNORE_INDEX] * 2 + row[2:] for row in rows]
    flat, offsets = flatten(rows)
    train_set = EncodedSet(flat, flatten(labels)[0], offsets, np.arange(12, dtype=np.int64))
    data = DistillationData(train_set, None, 2, batch_size=3, accumulate=2, seed=0, max_epochs=2, max_steps=None)
    student, other = open_model(tmp_path / "a", 1), open_model(tmp_path / "b", 1)
    optim = AdamW(lr=0.01, eps=1e-4, schedule="constant")
    module = DistillationModule(student, None, SupervisedFineTuning(), optim, data.total_steps, seed=0)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == data.total_steps == 4

    optimizer, _ = optim.build(other, data.total_steps)
    batches = list(data.train_dataloader())
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        (z, y), (z_2, y_2) = (logits_at_labels(other, batch) for batch in (first, second))
        loss = torch.nn.functional.cross_entropy(torch.cat([z, z_2]), torch.cat([y, y_2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert module.step_metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(student.parameters(), other.parameters(), strict=True):
        # Four steps move a weight by 0.04; the keys' biases, whose gradient is zero but for rounding, by 1e-5.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)


def test_lightning_can_walk_through_a_batch_of_two_tokenizers() -> None:
    """DeepSpeed's precision plugin does, and refuses frozen dataclasses."""
    batch, spans = make_batch(), torch.arange(13)
    batch.other = AlignedStream(make_batch(), Alignment.of(spans, spans))
    walked = apply_to_collection(batch, torch.Tensor, torch.Tensor.double)
    assert walked.other.stream.labels.dtype == torch.float64
    assert list(walked.other.alignment.chunks(9)) == list(batch.other.alignment.chunks(9))
