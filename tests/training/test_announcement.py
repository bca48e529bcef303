"""The log before the first step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deltakd.config.build import make_caching_settings
from deltakd.config.compose import compose_config
from deltakd.data import InstructionData, Row
from deltakd.io.run_directory import RunDirectory
from deltakd.training.announce import warn_of_verbatim_prompts
from deltakd.training.caching import fill_cache
from tests.tiny import World

Train = Callable[..., RunDirectory]


@pytest.mark.parametrize(("batch_size", "said"), [(4, False), (20, True)])
def test_it_is_said_when_a_pass_takes_many_rows_of_the_next(
    train: Train, caplog: pytest.LogCaptureFixture, batch_size: int, said: bool
) -> None:
    train("sft", f"data.batch_size={batch_size}", "trainer.max_steps=2")
    told = "the last one of the first pass over 32 rows takes 8 rows of the next pass (25 % of a pass)"
    assert (told in caplog.text) == said


def lines(caplog: pytest.LogCaptureFixture, start: str) -> list[str]:
    return [message for message in caplog.messages if message.startswith(start)]


def test_the_first_row_is_shown_as_it_is_trained(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    train("sft", "trainer.max_steps=1")
    (said,) = lines(caplog, "The first training row")
    head, row = said.split("\n")
    assert head.startswith("The first training row (row 0, ")
    assert re.fullmatch(r"Repeat \d: (.*)>⟦\1<\|endoftext\|>⟧", row)
    caplog.clear()
    train("sft", "trainer.max_steps=1", "data.preview=none", name="other")
    assert not lines(caplog, "The first training row")


def test_models_that_training_does_not_read_are_named_and_what_becomes_of_them(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    train("sft", "trainer.max_steps=1")
    train("kd", "trainer.max_steps=1", "evaluation.measures.rows=2", name="measured")
    train("delta_kd", "trainer.max_steps=1", name="all")
    assert lines(caplog, "Training does not read") == [
        "Training does not read model.teacher and model.teacher_raw; they are not loaded.",
        "Training does not read model.teacher_raw; it is loaded afterwards, to measure the student.",
    ]


def test_a_cached_run_says_that_it_reads_the_cache(
    train: Train, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = ("reference=cached", f"reference.path={tmp_path / 'cache'}", "trainer.max_steps=1")
    fill_cache(make_caching_settings(compose_config("train", world.overrides(tmp_path / "run", "kd", *overrides))))
    caplog.set_level("INFO")
    train("kd", *overrides, "evaluation.measures.rows=2")
    assert f"Training reads model.teacher from the cache {tmp_path / 'cache'}" in caplog.text
    assert "does not read model.teacher_raw;" in caplog.text
    assert "does not read model.teacher " not in caplog.text


def test_whole_prompts_beside_a_chat_template_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    data = InstructionData(train="t.jsonl", template="chat")
    rows = [Row(id=0, prompt="2 + 2 ="), Row(id=1, instruction="2 + 2 ="), Row(id=2, prompt="3 + 3 =")]
    warn_of_verbatim_prompts(data, rows)
    assert "data.template=chat leaves 2 of 3 training rows as they are" in caplog.text
    caplog.clear()
    warn_of_verbatim_prompts(replace(data, template="alpaca"), rows)
    warn_of_verbatim_prompts(data, rows[1:2])
    assert not caplog.text


def test_a_run_that_is_refused_while_it_loads_leaves_nothing(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has positions for 128 tokens only"):
        train("kd", "data.max_length=200", name="new/run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scale", "said"), [(1.3, False), (1.5, True)])
def test_a_target_beyond_the_published_cliff_is_warned_of(
    train: Train, caplog: pytest.LogCaptureFixture, scale: float, said: bool
) -> None:
    train("delta_shift", f"delta_weight={scale}", "trainer.max_steps=1")
    assert ("a factor of up to 1.5 on the teacher's logits" in caplog.text) == said
