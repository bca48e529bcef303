"""Log lines before training: which models are not loaded, and one row as it will be trained."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, EncodedSet, Row
from deltakd.data.encoding.preview import BRACKETS, COLOUR, count_trained, preview_row
from deltakd.evaluation.measured_references import WANTED
from deltakd.kernels import KernelOptions
from deltakd.rollouts.settings import RolloutSettings
from deltakd.training.settings import RunSettings
from deltakd.types import STUDENT, STUDENT_RAW, Loss

log = logging.getLogger(__name__)

#: The factor v on the teacher's logits above which extrapolation is reported to break (docs/design.md#plane).
EXTRAPOLATION_CLIFF = 1.3


def announce_models(settings: RunSettings) -> None:
    """Log which of the config's models are not loaded for training, and if they are loaded later."""
    own = (STUDENT, *settings.specs)
    named = [role for role, spec in settings.model.specs.items() if role not in own and spec.path]
    elsewhere = [role for role in named if role in settings.read_roles]
    cached = elsewhere if settings.cache is not None else []
    served = elsewhere if settings.served is not None else []
    # A raw student's path is the student's by default, not one that the user gave.
    unread = [role for role in named if role not in (STUDENT_RAW, *cached, *served)]
    measures = settings.evaluation.measures
    measured = measures.rows != 0 and measures.references != "none"
    if cached:
        assert settings.cache is not None
        later = "; the measures afterwards load the models for what it lacks" if measured else ""
        log.info("Training reads %s from the cache %s%s.", _listed(cached), settings.cache.path, later)
    later_read = [role for role in unread if measured and role in WANTED and settings.served is None]
    for roles, what in (
        (later_read, "loaded afterwards, to measure the student"),
        ([role for role in unread if role not in later_read], "not loaded"),
    ):
        if roles:
            they_are = "it is" if len(roles) == 1 else "they are"
            log.info("Training does not read %s; %s %s.", _listed(roles), they_are, what)


def announce_kernels(kernels: KernelOptions, device: torch.device) -> None:
    """Log how heads are multiplied on a GPU; a CPU has one way."""
    if device.type == "cuda":
        log.info("The loss on %s: %s.", device, ", ".join(f"{k}={v}" for k, v in kernels.record(device).items()))


def _listed(roles: Sequence[str]) -> str:
    names = [f"model.{role}" for role in roles]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def warn_of_extrapolation(loss: Loss) -> None:
    """Warn of a target that goes further beyond the teacher than published runs survived."""
    if loss.requires and loss.teacher_factor > EXTRAPOLATION_CLIFF:
        log.warning(
            "The target puts a factor of up to %.3g on the teacher's logits. Above about %.1f, formats of answers are "
            "reported to collapse (arXiv 2605.08737): watch the validation scores%s, or lower loss.scale, "
            "loss.target.v, loss.target.weights or delta_weight, whichever the loss has.",
            loss.teacher_factor,
            EXTRAPOLATION_CLIFF,
            " and rollout/finished_fraction" if loss.needs_sampled_tokens else "",
        )


def warn_of_own_labels(loss: Loss, rollout: RolloutSettings) -> None:
    """Warn of the cross-entropy of labels that the student sampled itself."""
    if loss.ce_weight == 0 or loss.needs_pairs or not rollout.samples_itself:
        return
    if loss.requires:
        log.warning(
            "The loss mixes in the cross-entropy of the labels, which are the student's own samples: its expected "
            "gradient is 0, so it only adds noise. Give loss.ce_weight=0."
        )
        return
    log.warning(
        "The loss is the cross-entropy of the labels, which are the student's own samples: its expected gradient is 0, "
        "so it teaches nothing. Give rollout=none, or a loss that reads a teacher."
    )


def preview_data(data: DataConfig, train: EncodedSet, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log the first training row as it will be trained, or the prompt to answer, as set by ``data.preview``."""
    if data.preview == "none" or not len(train):
        return
    row = train[0]
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text = preview_row(row, tokenizer, ids=data.preview == "ids", marks=COLOUR if in_colour else BRACKETS)
    if not count_trained(row):
        log.info(
            "The first prompt that the student answers (row %d, %d tokens):\n%s", row.row_id, len(row.input_ids), text
        )
        return
    log.info(
        "The first training row (row %d, %d tokens); the %d trained tokens are %s:\n%s",
        row.row_id,
        len(row.input_ids),
        count_trained(row),
        "green" if in_colour else f"in {BRACKETS.before} {BRACKETS.after}",
        text,
    )


def warn_of_verbatim_prompts(data: DataConfig, rows: Sequence[Row]) -> None:
    """Warn of rows that a chat template does not wrap because they are already whole prompts."""
    count = sum(row.prompt is not None for row in rows)
    if data.template == "chat" and count:
        log.warning(
            "data.template=chat leaves %d of %d training rows as they are: their key `prompt` is taken for a whole "
            "prompt with its special tokens. Give the question as `instruction`, or as `messages`, to put it into the "
            "template.",
            count,
            len(rows),
        )
