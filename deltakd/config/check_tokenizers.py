"""Checks of the models' tokenizers, as far as these lie on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from deltakd.data import InstructionData, TextData
from deltakd.models import ModelSettings, ModelSpec
from deltakd.models.roles import open_tokenizer, open_vocabularies
from deltakd.models.tokenizers import OtherTokenizerError
from deltakd.rollouts.settings import RolloutSettings
from deltakd.training.vocabulary_check import vocabulary_problems
from deltakd.types import STUDENT, Loss


def tokenizer_problems(
    models: ModelSettings,
    specs: Mapping[str, ModelSpec],
    loss: Loss | None,
    data: InstructionData | TextData | None,
    rollout: RolloutSettings | None,
) -> list[str]:
    """Return why the tokenizers of models in local directories don't go together, or not with other settings.

    A tokenizer that can't be opened is left out: the run says so when it opens it.

    Args:
        models: the group ``model``.
        specs: role -> model to load.
        loss: decides whether teachers may have a tokenizer of their own.
        data, rollout: the groups of these names; None: they could not be built.
    """
    local = {role: spec for role, spec in specs.items() if os.path.isdir(spec.tokenizer or spec.path or "")}
    if loss is None or data is None or rollout is None or STUDENT not in local or models.tokenizer.train_on:
        return []
    try:
        tokenizer = open_tokenizer(models, Path())
        vocabularies = open_vocabularies(models, local, tokenizer, aligns=loss.needs_alignment)
    except OtherTokenizerError as error:
        return [str(error)]
    except ValueError:
        return []
    return vocabulary_problems(vocabularies, tokenizer, loss, data, rollout)
