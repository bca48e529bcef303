"""Checks of ``reference=served``: a server runs the references."""

from __future__ import annotations

from deltakd.rollouts.settings import RolloutSettings
from deltakd.types import Loss


def serving_problems(loss: Loss, rollout: RolloutSettings | None) -> list[str]:
    """Return what does not go with references that a server runs."""
    found = []
    if loss.needs_alignment:
        found.append(
            "reference=served sends the student's tokens, and the loss aligns them with those of another tokenizer; "
            "give reference=live or reference=cached, or a loss of one tokenizer"
        )
    if rollout is not None and rollout.mixes_teacher:
        found.append(
            "rollout.source=mixture runs the teacher token by token, and reference=served sends it whole rows; give "
            "reference=live, or rollout.source=student"
        )
    return found
