"""What the log says before the first step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deltakd.io.run_directory import RunDirectory

Train = Callable[..., RunDirectory]


@pytest.mark.parametrize(("batch_size", "said"), [(4, False), (20, True)])
def test_it_is_said_when_a_pass_takes_many_rows_of_the_next(
    train: Train, caplog: pytest.LogCaptureFixture, batch_size: int, said: bool
) -> None:
    train("sft", f"data.batch_size={batch_size}", "trainer.max_steps=2")
    told = "the last one of the first pass over 32 rows takes 8 rows of the next pass (25 % of a pass)"
    assert (told in caplog.text) == said
