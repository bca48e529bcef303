"""Frozen models beside the student: when they run, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltakd.models import LanguageModel, ModelSpec, load_model
from deltakd.references import LiveReferences
from deltakd.types import IGNORE_INDEX, Batch
from tests.tiny import save_model

V = 300


@pytest.fixture
def models(tmp_path: Path) -> dict[str, LanguageModel]:
    roles = {"teacher": 1, "teacher_raw": 2}
    return {
        role: LanguageModel(
            load_model(role, ModelSpec(str(save_model(tmp_path / role, seed=seed, vocab_size=V))), vocabulary=V), V
        )
        for role, seed in roles.items()
    }


def make_batch() -> Batch:
    ids = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = IGNORE_INDEX
    return Batch(ids, torch.ones_like(ids), labels, torch.arange(2), 0, 10)


def calls_of(models: dict[str, LanguageModel]) -> list[str]:
    """The roles in the order in which they run from now on."""
    calls: list[str] = []
    for role, model in models.items():
        model.register_forward_hook(lambda *_, role=role: calls.append(role))
    return calls


def test_beside_the_student_they_run_before_it(models: dict[str, LanguageModel]) -> None:
    """So that their activations are gone before the student's exist."""
    references, calls = LiveReferences(models), calls_of(models)
    pending = references.start(make_batch())
    assert calls == ["teacher", "teacher_raw"]
    expected = references(make_batch())
    for role, head in pending().items():
        assert torch.equal(head.hidden, expected[role].hidden)


def test_on_another_device_they_run_after_the_student_has_been_queued(models: dict[str, LanguageModel]) -> None:
    """The meta device stands for the student's: it shows where things are sent."""
    expected = LiveReferences(models)(make_batch())
    references, calls = LiveReferences(models, placement="cpu"), calls_of(models)
    references.to(torch.device("meta"))
    pending = references.start(make_batch())
    assert calls == []
    heads = pending()
    assert calls == ["teacher", "teacher_raw"]
    assert {head.hidden.device.type for head in heads.values()} == {"meta"}
    assert {head.weight.device.type for head in heads.values()} == {"meta"}
    assert heads["teacher"].hidden.shape == expected["teacher"].hidden.shape
    assert next(models["teacher"].parameters()).device.type == "cpu"
