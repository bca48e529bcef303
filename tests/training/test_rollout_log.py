"""The watch over the finished fraction."""

from __future__ import annotations

import pytest

from deltakd.training.callbacks.rollout_log import WINDOW, FallWatch


@pytest.mark.parametrize("resumed", [False, True])
def test_a_lasting_fall_is_noticed_once_and_a_short_one_is_not(resumed: bool) -> None:
    watch = FallWatch()
    noticed = []
    values = [0.9] * WINDOW + [0.1, 0.1] + [0.9] * WINDOW + [0.5] * 3 * WINDOW
    for number, value in enumerate(values):
        if resumed:
            state, watch = watch.state_dict(), FallWatch()
            watch.load_state_dict(state)
        found = watch.add(value)
        if found is not None:
            noticed.append((number, found))
    ((number, (before, now)),) = noticed
    assert number > 2 * WINDOW + 2
    assert before == pytest.approx(0.9)
    assert now < 0.7
