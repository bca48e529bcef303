"""Checks of ``model.routes``, which gives each row a pair of teachers by its task."""

from __future__ import annotations

from collections.abc import Mapping

from deltakd.data import InstructionData, TextData
from deltakd.references import CacheSettings, LiveSettings, ReferenceSettings, ServedSettings
from deltakd.rollouts.settings import RolloutSettings
from deltakd.types import STUDENT_RAW, TEACHER, TEACHER_RAW, Loss


def route_problems(
    routes: Mapping[str, int] | None,
    loss: Loss | None,
    data: InstructionData | TextData | None,
    reference: ReferenceSettings | None,
    rollout: RolloutSettings | None,
) -> list[str]:
    """Return the problems of ``model.routes`` in combination with other groups."""
    if not routes:
        return []
    found = []
    if loss is not None and not loss.requires & {TEACHER, TEACHER_RAW}:
        found.append("model.routes chooses teachers by task, and the loss reads none; leave it out")
    elif loss is not None and loss.requires - {TEACHER, TEACHER_RAW, STUDENT_RAW}:
        found.append(
            f"model.routes gives each row one pair of teachers, and the loss reads {', '.join(sorted(loss.requires))} "
            "on every row; give a loss of one pair, or leave model.routes out"
        )
    if loss is not None and loss.needs_alignment:
        found.append("model.routes needs teachers with the student's tokenizer; give a loss that does not align tokens")
    if isinstance(data, TextData):
        found.append("model.routes goes by the rows' task, and data is plain text; leave it out")
    if isinstance(reference, CacheSettings):
        if reference.outside or reference.raw_url is not None:
            key = "reference.url" if reference.log_probs is None else "reference.log_probs"
            found.append(
                f"model.routes chooses among models that are loaded, and {key} gives one teacher; leave it out"
            )
    elif reference is not None and not isinstance(reference, LiveSettings | ServedSettings):
        found.append(
            "model.routes goes with references live, cached or served; give reference=live, reference=cached or "
            "reference=served"
        )
    if rollout is not None and rollout.mixes_teacher:
        found.append("rollout.source=mixture draws tokens with one teacher, and model.routes has several; give student")
    return found
