"""No part of an optimiser step reads a value that a device has computed, so a GPU's queue never runs empty.

The oracle is PyTorch's ``meta`` device, whose tensors have no values: whatever reads one, or brings in a tensor that
stayed on the CPU, raises.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.data.batches.data_module import DistillationData
from deltakd.data.encoding.encoded_set import EncodedSet, flatten
from deltakd.distributed.sharding import gradient_norm
from deltakd.io.errors import NonFiniteLossError
from deltakd.losses import SupervisedFineTuning
from deltakd.models import LanguageModel, ModelSpec, load_model
from deltakd.references import LiveReferences
from deltakd.training.module import DistillationModule
from deltakd.training.optim import AdamW
from deltakd.training.readings import HostCopy, StepReading, StepSums
from deltakd.training.step import DistillationStep
from deltakd.types import Batch, Loss
from tests.losses.by_name import NAMES, SAMPLED, loss_named
from tests.tiny import save_model
from tests.training.test_step import V, make_batch, open_model

META = torch.device("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``meta`` device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.fixture(scope="module")
def without_values(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return open_model(tmp_path_factory.mktemp("models"), 1).to(META)


def batch_without_values(sampled: bool = False) -> Batch:
    batch = make_batch()
    log_probs = torch.zeros(batch.labels.shape) if sampled else None
    return replace(batch, sampled_log_probs=log_probs).to(META)


def take_step(student: LanguageModel, references: LiveReferences | None, loss: Loss, batch: Batch) -> StepReading:
    """An optimiser step of two micro-batches as the module takes it, without Lightning."""
    step = DistillationStep(student.train(), references, loss)
    optimizer, _ = AdamW().build(student, 10)
    sums = StepSums()
    for _ in range(2):
        total, parts = step(batch)
        total.backward()
        sums.add({"loss": total.detach(), **parts}, batch.row_ids)
    reading = StepReading(0, sums, gradient_norm(student), lambda values: values)
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return reading


@pytest.mark.parametrize("name", [*NAMES, *SAMPLED])
def test_no_loss_reads_from_the_device(without_values: LanguageModel, name: str) -> None:
    loss = loss_named(name)
    references = LiveReferences(dict.fromkeys(loss.requires, without_values), placement="meta")
    references.to(META)
    student = LanguageModel(type(without_values.causal_lm)(without_values.causal_lm.config).to(META), V)
    reading = take_step(student, references if loss.requires else None, loss, batch_without_values(name in SAMPLED))
    assert reading.loss.device == META
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        reading.metrics()


@pytest.mark.parametrize("family", ["opt", "llama", "gemma2", "qwen2", "mistral", "bloom", "gpt_neox"])
def test_no_architecture_reads_from_the_device(tmp_path: Path, family: str) -> None:
    sizes: dict[str, Any] = {"sliding_window": 4} if family in ("gemma2", "mistral") else {}
    if family == "bloom":
        sizes = {"n_layer": 2, "n_head": 2}
    save_model(tmp_path, seed=1, family=family, vocab_size=V, **sizes)
    student = LanguageModel(load_model("student", ModelSpec(str(tmp_path)), vocabulary=V), V).to(META)
    take_step(student, None, SupervisedFineTuning(), batch_without_values())


def test_the_oracle_notices_a_read(without_values: LanguageModel) -> None:
    class Reading(SupervisedFineTuning):
        def __call__(self, logits: Any, labels: Tensor) -> Any:
            assert bool((labels >= 0).all())
            return super().__call__(logits, labels)

        fused_form = None

    student = LanguageModel(type(without_values.causal_lm)(without_values.causal_lm.config).to(META), V)
    with pytest.raises(RuntimeError, match="meta"):
        take_step(student, None, Reading(), batch_without_values())


def test_numbers_wait_on_the_device_until_they_are_read() -> None:
    """What a copy reads is what the numbers were when it was made."""
    values = torch.tensor([1.5, -2.0])
    copy = HostCopy(values.clone())
    assert copy.read() == [1.5, -2.0]


def make_run(tmp_path: Path, steps: int, accumulate: int = 2) -> tuple[DistillationModule, DistillationData]:
    rows = [[5 + row, 7, 9, *range(10, 11 + row % 4), 2] for row in range(12)]
    flat, offsets = flatten(rows)
    encoded = EncodedSet(flat, flat, offsets, np.arange(100, 112, dtype=np.int64))
    data = DistillationData(
        encoded, None, 2, batch_size=2, accumulate=accumulate, seed=0, max_epochs=None, max_steps=steps
    )
    student = open_model(tmp_path, 1)
    return DistillationModule(student, None, SupervisedFineTuning(), AdamW(lr=0.01), steps, seed=0), data


def fit(module: DistillationModule, data: DistillationData, *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=data.accumulate,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)


class Poison(L.Callback):
    """Makes the loss of one micro-batch NaN, and records the steps at which the host reads metrics."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, micro_batch: int | None = None) -> None:
        self.read_at: list[tuple[int, int]] = []
        self.step = 0
        original, read = DistillationStep.forward, StepReading.metrics
        count = iter(range(1000))

        def forward(step: DistillationStep, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            total, parts = original(step, batch)
            self.step = batch.step
            return (total * math.nan if next(count) == micro_batch else total), parts

        def metrics(reading: StepReading) -> dict[str, float]:
            if not reading._read:
                self.read_at.append((reading.step, self.step))
            return read(reading)

        monkeypatch.setattr(DistillationStep, "forward", forward)
        monkeypatch.setattr(StepReading, "metrics", metrics)


IGNORED = "ignore:You have overridden `transfer_batch_to_device`"


@pytest.mark.filterwarnings(IGNORED)
def test_metrics_are_read_once_the_next_step_is_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = make_run(tmp_path, steps=5)
    watched = Poison(monkeypatch)
    fit(module, data, watched)
    assert watched.read_at == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4)]
    assert math.isfinite(module.step_metrics["train/loss"])


@pytest.mark.filterwarnings(IGNORED)
def test_a_callback_adds_metrics_without_reading_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Add(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            step = trainer.global_step
            module.add_metrics(lambda metrics: {"added/step": step, "added/twice": 2 * metrics["train/loss"]})

    module, data = make_run(tmp_path, steps=3, accumulate=1)
    watched = Poison(monkeypatch)
    fit(module, data, watched, Add())
    assert watched.read_at == [(0, 1), (1, 2), (2, 2)]
    assert module.step_metrics["added/step"] == 3
    assert module.step_metrics["added/twice"] == 2 * module.step_metrics["train/loss"]


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize(("poisoned", "last"), [(5, False), (9, True)])
def test_a_loss_that_is_not_finite_is_found_a_step_late_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: int, last: bool
) -> None:
    module, data = make_run(tmp_path, steps=5)
    rows = [batch.row_ids.tolist() for batch in data.train_dataloader()][poisoned]
    step = poisoned // 2
    with pytest.raises(NonFiniteLossError) as raised:
        fit(module, data, watched := Poison(monkeypatch, poisoned))
    assert f"the loss is nan at optimiser step {step}, rows {rows} of the training set" in str(raised.value)
    assert watched.step == (step if last else step + 1)


@pytest.mark.filterwarnings(IGNORED)
def test_no_checkpoint_holds_weights_that_a_bad_step_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved at the end of the bad step itself, by a callback that knows nothing of it."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3 and trainer.fit_loop.batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "bad.ckpt")

    module, data = make_run(tmp_path, steps=5)
    with pytest.raises(NonFiniteLossError, match="optimiser step 2"):
        fit(module, data, Poison(monkeypatch, 4), Save())
    assert not (tmp_path / "bad.ckpt").exists()
