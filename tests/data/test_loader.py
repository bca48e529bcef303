from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from deltakd.data.batches.data_module import DistillationData
from deltakd.data.batches.loader import BATCHES_AHEAD, EvalLoader, StepLoader, collate
from deltakd.data.encoding.encoded_set import Encoded, EncodedSet, flatten
from deltakd.types import IGNORE_INDEX, Batch

EOS = 2


def make_set(count: int = 21) -> EncodedSet:
    """Row r has ids 10 + r, a prompt of 2 tokens and a response of 1 + r mod 5 tokens with EOS."""
    ids = [[10 + row] * (2 + row % 5) + [EOS] for row in range(count)]
    labels = [[IGNORE_INDEX] * 2 + row[2:] for row in ids]
    flat, offsets = flatten(ids)
    return EncodedSet(flat, flatten(labels)[0], offsets, np.arange(count, dtype=np.int64) + 100)


def make_data(**changes: Any) -> DistillationData:
    options: dict[str, Any] = {"batch_size": 2, "accumulate": 2, "seed": 0, "max_epochs": 2, "max_steps": None}
    return DistillationData(make_set(), make_set(5), EOS, **options | changes)


def ids_of(batches: Any) -> list[list[int]]:
    return [batch.row_ids.tolist() for batch in batches]


def test_collate_pads_on_the_right_and_trains_eos_even_if_it_pads() -> None:
    batch = collate([Encoded([5, 6, EOS], [-100, 6, EOS], 3), Encoded([7, EOS], [-100, EOS], 4)], EOS, 1, 9)
    assert batch.input_ids.tolist() == [[5, 6, EOS], [7, EOS, EOS]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[-100, 6, EOS], [-100, EOS, -100]]
    assert batch.labels_N.tolist() == [6, EOS, EOS]
    assert batch.row_ids.tolist() == [3, 4]
    assert (batch.step, batch.step_tokens) == (1, 9)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.attention_mask.dtype == torch.int64


def test_step_tokens_are_those_of_the_labels() -> None:
    loader = make_data().train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 22
    for step in range(11):
        pair = batches[2 * step : 2 * step + 2]
        assert {batch.step for batch in pair} == {step}
        assert {batch.step_tokens for batch in pair} == {sum(len(batch.labels_N) for batch in pair)}


def test_resume_continues_where_it_stopped() -> None:
    whole = ids_of(make_data().train_dataloader())
    first = make_data().train_dataloader()
    batches = iter(first)
    taken = ids_of(next(batches) for _ in range(7))
    state = first.state_dict()
    assert state == {"position": 7}
    second = make_data().train_dataloader()
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert taken + ids_of(second) == whole
    assert len(second) == len(whole)
    assert ids_of(second) == whole[7:]
    with pytest.raises(ValueError, match="saved after 99 micro-batches, but this run has 22"):
        second.load_state_dict({"position": 99})


def test_evaluation_sees_every_row_once_by_length() -> None:
    data = make_set()
    batches = list(EvalLoader(data, 4, EOS))
    assert sorted(row for ids in ids_of(batches) for row in ids) == data.row_ids.tolist()
    assert [batch.input_ids.shape[1] for batch in batches] == sorted(batch.input_ids.shape[1] for batch in batches)
    assert [batch.step_tokens for batch in batches] == [len(batch.labels_N) for batch in batches]
    with pytest.raises(ValueError, match="val_batch_size = 0"):
        EvalLoader(data, 0, EOS)


def test_evaluation_on_two_ranks_gives_both_as_many_batches() -> None:
    ranks = [list(EvalLoader(make_set(), 5, EOS, rank, 2)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [3, 3]
    assert sum(batch.step_tokens for batches in ranks for batch in batches) == make_set().valid_tokens.sum()
    assert len(ranks[1][2].labels_N) == ranks[1][2].step_tokens == 0


def test_a_budget_of_tokens_instead_of_a_number_of_rows() -> None:
    data = make_data(batch_size=None, max_tokens=12)
    for batches in (data.train_dataloader(), data.val_loader()):
        assert all(batch.input_ids.numel() <= 12 for batch in batches)
    validated = ids_of(data.val_loader())
    assert sorted(row for ids in validated for row in ids) == make_set(5).row_ids.tolist()
    assert len(validated) == 3
    ranks = [list(EvalLoader(make_set(5), None, EOS, rank, 2, max_tokens=12)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [2, 2]
    assert sum(batch.step_tokens for batches in ranks for batch in batches) == make_set(5).valid_tokens.sum()
    with pytest.raises(ValueError, match="max_tokens_per_batch is 6, but validation row 4 has 7 tokens"):
        make_data(batch_size=None, max_tokens=6).val_loader()


def test_data_module() -> None:
    data = make_data(max_steps=4)
    assert data.total_steps == 4
    assert isinstance(data.train_dataloader(), StepLoader)
    loader = data.val_loader()
    assert loader is not None
    assert len(loader) == 3
    assert [len(batch.row_ids) for batch in make_data(val_batch_size=5).val_loader()] == [5]


class Recorder(lightning.LightningModule):
    """Trains one number and notes the rows it is shown."""

    def __init__(self, save_to: Path | None) -> None:
        super().__init__()
        self.save_to = save_to
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.row_ids.tolist())
        return self.weight.square().sum()

    def on_train_batch_end(self, *_: Any) -> None:
        if len(self.seen) == 8 and self.save_to is not None:
            self.trainer.save_checkpoint(self.save_to, weights_only=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, max_steps: int, resume: Path | None = None, save_to: Path | None = None) -> Recorder:
    module = Recorder(save_to)
    trainer = lightning.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=make_data(), ckpt_path=resume)
    assert trainer.global_step == max_steps
    return module


def test_lightning_resumes_in_the_middle_of_the_stream(tmp_path: Path) -> None:
    saved = tmp_path / "half.ckpt"
    whole = train(tmp_path, 11, save_to=saved)
    assert whole.seen == ids_of(make_data().train_dataloader())
    assert train(tmp_path, 11, resume=saved).seen == whole.seen[8:]


def test_lightning_continues_a_run_that_ended_early(tmp_path: Path) -> None:
    saved = tmp_path / "half.ckpt"
    first = train(tmp_path, 4, save_to=saved)
    assert first.seen + train(tmp_path, 11, resume=saved).seen == ids_of(make_data().train_dataloader())


def test_batches_are_made_ahead_in_a_thread_and_counted_when_they_are_handed_over() -> None:
    made: list[str] = []
    data = make_data()
    data.prepare_batch = lambda batch: made.append(threading.current_thread().name) or batch
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 5
    while len(made) < 1 + BATCHES_AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 1 + BATCHES_AHEAD
    assert set(made) == {"batches"}
    assert loader.state_dict() == {"position": 1}
    rest = ids_of(list(batches))
    resumed = make_data().train_dataloader()
    resumed.load_state_dict({"position": 1})
    assert ids_of(list(resumed)) == rest


def test_an_error_in_the_thread_is_raised_where_the_batch_is_taken() -> None:
    data = make_data()

    def prepare(batch: Batch) -> Batch:
        if batch.step:
            raise OSError("the cache is gone")
        return batch

    data.prepare_batch = prepare
    batches = iter(data.train_dataloader())
    next(batches)
    with pytest.raises(OSError, match="the cache is gone"):
        list(batches)
