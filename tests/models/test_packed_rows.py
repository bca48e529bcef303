"""Rows that lie end to end give the values and gradients of padded rows."""

from __future__ import annotations

import csv
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltakd.cache import make_cache
from deltakd.data.batches.data_module import DistillationData
from deltakd.data.batches.packed_rows import pack_rows, place_rows
from deltakd.data.encoding.encoded_set import EncodedSet, flatten
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models import LanguageModel, ModelSpec, load_model
from deltakd.models.packing_check import check_packing
from deltakd.references import LiveReferences
from deltakd.training.step import DistillationStep
from deltakd.types import IGNORE_INDEX, Batch
from tests.losses.by_name import NAMES, loss_named
from tests.tiny import World, save_model
from tests.training.test_step import V, open_model

LENGTHS = (7, 3, 12, 1, 12, 5)


def make_batch() -> Batch:
    """Rows of several lengths, one of a single token, in no order."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, V, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[2, :5] = IGNORE_INDEX
    return Batch(ids, mask.long(), labels, torch.arange(len(LENGTHS)), 0, int((labels[:, 1:] >= 0).sum()))


@pytest.mark.parametrize("length", [1, 16, 1000])
def test_every_row_lies_in_a_sequence_with_its_positions_and_its_valid_tokens(length: int) -> None:
    batch = pack_rows(make_batch(), length)
    packed = batch.packed
    assert packed is not None
    starts = packed.starts.tolist()
    flat, positions = packed.input_ids.flatten(), packed.position_ids.flatten()
    assert starts[-1] == len(flat)
    pieces = [flat[a:b].tolist() for a, b in pairwise(starts)]
    for row, n in enumerate(LENGTHS):
        assert batch.input_ids[row, :n].tolist() in pieces
    assert all(positions[a:b].tolist() == list(range(b - a)) for a, b in pairwise(starts))
    assert packed.longest == max(b - a for a, b in pairwise(starts)) == max(LENGTHS)
    assert torch.equal(flat[packed.valid], batch.input_ids.flatten()[batch.valid_N])
    assert packed.input_ids.shape[1] <= max(length, max(LENGTHS))


def test_longest_first_each_into_the_first_sequence_with_room() -> None:
    assert place_rows([3, 9, 4, 2, 6], 10) == [(2, 0), (0, 0), (1, 6), (2, 3), (1, 0)]


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_the_same_in_value_and_gradient(tmp_path: Path, name: str) -> None:
    loss = loss_named(name)
    student = open_model(tmp_path, 1)
    roles = {role: open_model(tmp_path, 2 + number) for number, role in enumerate(sorted(loss.requires))}
    step = DistillationStep(student.train(), LiveReferences(roles) if roles else None, loss)
    found = []
    for batch in (make_batch(), pack_rows(make_batch(), 16)):
        student.zero_grad()
        total, parts = step(batch)
        total.backward()
        found.append((total.detach(), parts, [p.grad.clone() for p in student.parameters()]))
    (total, parts, gradients), (packed_total, packed_parts, packed_gradients) = found
    torch.testing.assert_close(packed_total, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_parts, parts, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, kind) for family in ("gpt2", "llama", "qwen2", "mistral", "gpt_neox") for kind in ("sdpa", "eager")]
    + [("gemma2", "eager"), ("mixtral", "sdpa"), ("phi", "sdpa")],
)
def test_architectures_run_packed_rows(tmp_path: Path, family: str, attention: str) -> None:
    sizes: dict[str, Any] = {"sliding_window": 4} if family in ("gemma2", "mistral") else {}
    sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1} if family == "mixtral" else {}
    save_model(tmp_path, seed=1, family=family, vocab_size=V, initializer_range=0.3, **sizes)
    model = LanguageModel(load_model("student", ModelSpec(str(tmp_path)), vocabulary=V), V).eval()
    model.causal_lm.set_attn_implementation(attention)
    check_packing("student", model)
    alone, packed = model(make_batch()), model(pack_rows(make_batch(), 16))
    torch.testing.assert_close(packed.hidden, alone.hidden, rtol=1e-3, atol=1e-4)


def test_a_model_with_a_state_is_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path, seed=1, family="mamba", vocab_size=V, state_size=4, width=32)
    model = LanguageModel(load_model("student", ModelSpec(str(tmp_path)), vocabulary=V), V)
    with pytest.raises(ValueError, match=r"MambaForCausalLM \(model.student\) keeps a state.* give data.packing=false"):
        check_packing("student", model)


@pytest.mark.parametrize(("family", "sizes"), [("bloom", {"n_layer": 2, "n_head": 2}), ("opt", {})])
def test_a_model_that_would_see_other_rows_is_refused_by_name(
    tmp_path: Path, family: str, sizes: dict[str, Any]
) -> None:
    """BLOOM takes no position ids, and OPT as transformers writes it makes a mask of its own."""
    save_model(tmp_path, seed=1, family=family, vocab_size=V, initializer_range=0.3, **sizes)
    model = LanguageModel(load_model("student", ModelSpec(str(tmp_path)), vocabulary=V), V)
    with pytest.raises(ValueError, match=rf"(?i){family}\w+ \(model.student\) .* give data.packing=false"):
        check_packing("student", model)


def losses(run: RunDirectory) -> list[float]:
    with (run.path / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.mark.slow
def test_runs_with_packed_rows_are_the_runs_without(
    train: Callable[..., RunDirectory], world: World, tmp_path: Path
) -> None:
    """References live and cached; without dropout, which falls elsewhere."""
    still = save_model(tmp_path / "still", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    models = (f"model.student.path={still}", f"model.student_raw.path={still}")
    cache = ("reference=cached", f"reference.path={tmp_path / 'cache'}")
    plain = losses(train("delta_kd", *models, name="plain"))
    make_cache(world.overrides(tmp_path / "unused", "delta_kd", *models, *cache))
    packed = train("delta_kd", *models, "data.packing=true", name="packed")
    assert losses(packed) == pytest.approx(plain, rel=1e-4)
    cached = train("delta_kd", *models, *cache, "data.packing=true", name="cached")
    assert losses(cached) == pytest.approx(plain, rel=1e-4)


def test_loaders_pack_what_they_hand_out() -> None:
    rows = [list(range(5, 8 + row)) for row in range(8)]
    flat, offsets = flatten(rows)
    encoded = EncodedSet(flat, flat, offsets, np.arange(8, dtype=np.int64))
    options = {"batch_size": 4, "accumulate": 1, "seed": 0, "max_epochs": 1, "max_steps": None}
    data = DistillationData(encoded, encoded, 2, **options, packing=True)
    for batch in (*data.train_dataloader(), *(data.val_loader() or ())):
        assert batch.packed is not None
        assert batch.positions == batch.packed.input_ids.numel() == batch.real_positions
        assert torch.equal(batch.packed.input_ids.flatten()[batch.packed.valid + 1], batch.labels_N)


def test_rollouts_are_refused(train: Callable[..., RunDirectory]) -> None:
    with pytest.raises(ConfigError, match=r"data.packing=true; give data.packing=false, or rollout=none"):
        train("kd", "data.packing=true", "rollout=student")
