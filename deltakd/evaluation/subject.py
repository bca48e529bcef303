"""A student to measure, and the references to measure it against."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from torch import nn
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig
from deltakd.distributed.sharding import is_sharded, place
from deltakd.evaluation.measured_references import WANTED, MeasuredReferences
from deltakd.evaluation.settings import EvaluationSettings
from deltakd.evaluation.span_measures import SpanTeacher
from deltakd.models import LanguageModel, ModelSettings
from deltakd.references import CacheSettings, LiveSettings, ReferenceSettings, ServedReferences
from deltakd.references.routed import names_of_pair
from deltakd.types import device_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A student and everything needed to measure it.

    Args:
        models: the models that the run names.
        evaluation: the group ``evaluation``.
        data: the group ``data``.
        tokenizer: the student's.
        vocabulary: number of tokens.
        model: the student, in eval mode, on its device.
        references: the group ``reference``; a ``CacheSettings`` names a cache.
        loaded: role -> frozen model already in memory, of those with the student's tokenizer.
        show_progress: show a progress bar.
        teacher: with a tokenizer of its own; None: there is none.
        served: references that a server runs; None: there are none.
    """

    models: ModelSettings
    evaluation: EvaluationSettings
    data: DataConfig
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    model: nn.Module
    references: ReferenceSettings = field(default_factory=LiveSettings)
    loaded: Mapping[str, LanguageModel] = field(default_factory=dict)
    show_progress: bool = True
    teacher: SpanTeacher | None = None
    served: ServedReferences | None = None


def of_pair(loaded: Mapping[str, LanguageModel], pair: int) -> dict[str, LanguageModel]:
    """Return role -> model of those loaded, in which the teachers of a pair are ``teacher`` and ``teacher_raw``."""
    roles = names_of_pair(WANTED, pair)
    # Roles that share a model share it under their other names, too.
    named = {id(model): model.with_roles(roles) for model in loaded.values()}
    return {role: named[id(loaded[held])] for role, held in roles.items() if held in loaded}


@final
class Judges:
    """The references to measure a student against, one source for each pair of teachers.

    Args:
        subject: the student.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._made: dict[int, MeasuredReferences | None] = {}

    def of_pair(self, pair: int | None) -> MeasuredReferences | None:
        """Return the source in which the teachers are those of a pair; None for no pair, or if none can be run."""
        if pair is not None and pair not in self._made:
            self._made[pair] = self._source(pair)
        return None if pair is None else self._made[pair]

    def _source(self, pair: int) -> MeasuredReferences | None:
        subject, evaluation = self._subject, self._subject.evaluation
        sharded = any(is_sharded(model) for model in subject.loaded.values())
        if (subject.references.shards and place()[1] > 1) or sharded:
            log.info(
                "The references are sharded, and no single rank can run one: only the student is measured. "
                "deltakd.evaluate run=... measures it beside them, on a device that holds them."
            )
            return None
        if evaluation.measures.references == "none":
            return None
        models = subject.models.of_pair(pair)
        earlier = [made for made in self._made.values() if made is not None]
        loaded = {role: model for made in earlier for role, model in made.held_for(models).items()}
        return MeasuredReferences(
            models,
            subject.tokenizer,
            subject.vocabulary,
            subject.references if isinstance(subject.references, CacheSettings) else None,
            loaded | of_pair(subject.loaded, pair),
            subject.references.placement,
            device_of(subject.model),
            subject.served,
            pair,
        )
