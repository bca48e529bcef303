"""Teacher-forced measures of a finished student beyond ROUGE: the same for all methods, whatever their losses read."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, EncodedSet, encode_rows, with_answer
from deltakd.distributed.sharding import gathered, is_sharded, place
from deltakd.evaluation.measured_references import HeadSource, MeasuredReferences
from deltakd.evaluation.settings import EvaluationSettings
from deltakd.evaluation.teacher_forced import device_of, first_rows, measured_batches
from deltakd.evaluation.token_measures import (
    CALIBRATION_BINS,
    TokenMeasures,
    calibration_bins,
    expected_calibration_error,
)
from deltakd.generation.model_step import position_limit
from deltakd.io.progress import progress_bar
from deltakd.models import LanguageModel, ModelSettings
from deltakd.references import CacheSettings, LiveSettings, ReferenceSettings

log = logging.getLogger(__name__)

VALIDATION = "val"


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
        loaded: role -> frozen model already in memory.
        show_progress: show a progress bar.
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


@dataclass(frozen=True)
class Measured:
    """The results of measuring a student.

    Args:
        scores: ``<set>/<measure>``: ``perplexity``, ``ece`` and ``top1_agreement`` (per cent), ``kl_teacher`` (nats per
            token), ``shift_correlation``; measures that are not available are absent.
        counts: set -> ``rows`` and ``tokens`` measured, ``tokens_without_shift`` (those without a correlation), and
            the source of the ``references``.
    """

    scores: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)


def encode_set(
    name: str, evaluation: EvaluationSettings, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> EncodedSet:
    """Return the prompts of the set ``name`` with their first references, tokenised as in training.

    Raises:
        ValueError: the source can't be read, or no row is left.
    """
    data = evaluation.prompts_of(data)
    rows = [row for row in evaluation.rows_of(name, data) if row.references]
    answered = [with_answer(row, row.references[0]) for row in rows[: evaluation.measures.rows]]
    return encode_rows(
        answered,
        data.make_template(tokenizer),
        tokenizer,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        overlong=getattr(data, "overlong", "cut"),
        split_turns=getattr(data, "split_turns", False),
        cache_dir=data.cache_dir,
    )


def measure(subject: Subject, validation: EncodedSet | None) -> Measured:
    """Measure the student on validation rows and, if answers are generated, on the evaluation sets.

    A run that generates no answers is judged only on validation data. Each rank measures its share of the rows; the
    results cover all ranks. Collective: call on every rank.

    Args:
        subject: the student.
        validation: the run's tokenised validation rows, or None.
    """
    evaluation, found = subject.evaluation, Measured()
    if evaluation.measures.rows == 0:
        return found
    references = None
    if (subject.references.shards and place()[1] > 1) or any(is_sharded(model) for model in subject.loaded.values()):
        log.info(
            "The references are sharded, and no single rank can run one: only the student is measured. "
            "deltakd.evaluate run=... measures it beside them, on a device that holds them."
        )
    elif evaluation.measures.references != "none":
        cache = subject.references if isinstance(subject.references, CacheSettings) else None
        references = MeasuredReferences(
            subject.models,
            subject.tokenizer,
            subject.vocabulary,
            cache,
            subject.loaded,
            subject.references.placement,
            device_of(subject.model),
        )
    for name, encoded in _sets(subject, validation):
        rows = first_rows(encoded, evaluation.measures.rows)
        longest, positions = int(encoded.lengths[rows].max()), position_limit(subject.model)
        if positions is not None and longest > positions:
            log.warning("%s is not measured: a row has %d tokens, the student %d positions.", name, longest, positions)
            continue
        source = HeadSource([], frozenset(), subject.vocabulary, "none")
        if references is not None:
            source = references.source(name, encoded, rows)
        sums = _sums(subject, source, name, encoded, rows)
        scores = {f"{name}/{measure}": value for measure, value in _scores(sums, source).items()}
        found.scores.update({key: value for key, value in scores.items() if math.isfinite(value)})
        found.counts[name] = {"rows": len(rows), "tokens": int(sums["tokens"]), "references": source.name}
        if "correlated" in sums:
            found.counts[name]["tokens_without_shift"] = int(sums["tokens"] - sums["correlated"])
        unfinite = [key for key, value in scores.items() if not math.isfinite(value)]
        if unfinite:
            log.info("%s: no finite value, so it is left out.", ", ".join(unfinite))
    return found


def _sets(subject: Subject, validation: EncodedSet | None) -> Iterator[tuple[str, EncodedSet]]:
    if validation is not None and len(validation):
        yield VALIDATION, validation
    for name in subject.evaluation.sets if subject.evaluation.generate else ():
        try:
            yield name, encode_set(name, subject.evaluation, subject.data, subject.tokenizer)
        except ValueError as error:
            log.warning("%s is not measured beyond its answers: %s", name, error)


def _sums(
    subject: Subject, source: HeadSource, name: str, encoded: EncodedSet, rows: NDArray[np.int64]
) -> dict[str, Tensor]:
    """Return sums over the tokens of all ranks, float64. Collective: call on every rank."""
    share = place()
    total, done = _no_tokens(source), 0
    batches = measured_batches(
        subject.model, source, subject.tokenizer, encoded, rows, batch_size=subject.data.full_rows, share=share
    )
    with progress_bar(f"measures of {name}", len(rows[share[0] :: share[1]]), subject.show_progress) as advance:
        for batch in batches:
            for key, value in _add_up(batch.measures).items():
                total[key] = total[key] + value
            done += len(batch.rows)
            advance(done)
    of_ranks = gathered(total)
    return {key: torch.stack([of[key] for of in of_ranks]).sum(0) for key in total}


def _no_tokens(source: HeadSource) -> dict[str, Tensor]:
    """Return a zero for each sum that the source allows; the same keys on every rank."""
    none_N = torch.zeros(0, dtype=torch.float64)
    teacher = none_N if "teacher" in source.roles else None
    shift = none_N if len(source.roles) == 3 else None
    return _add_up(TokenMeasures(none_N, none_N, none_N, teacher, teacher, shift))


def _add_up(measured: TokenMeasures) -> dict[str, Tensor]:
    sums = {
        "tokens": torch.tensor(len(measured.nll), dtype=torch.float64),
        "nll": measured.nll.sum(),
        "bins": calibration_bins(measured.confidence, measured.correct),
    }
    if measured.kl_teacher is not None and measured.top1_agreement is not None:
        sums |= {"kl_teacher": measured.kl_teacher.sum(), "top1_agreement": measured.top1_agreement.sum()}
    if measured.correlation is not None:
        defined = ~measured.correlation.isnan()
        sums |= {"correlated": defined.double().sum(), "correlation": measured.correlation[defined].sum()}
    return {name: value.cpu() for name, value in sums.items()}


def _scores(sums: Mapping[str, Tensor], source: HeadSource) -> dict[str, float]:
    tokens = float(sums["tokens"])
    if not tokens:
        return {}
    mean = {name: float(sums[name]) / tokens for name in ("nll", "kl_teacher", "top1_agreement") if name in sums}
    assert sums["bins"].shape == (3, CALIBRATION_BINS)
    try:
        perplexity = math.exp(mean["nll"])
    except OverflowError:
        perplexity = math.inf
    scores = {"perplexity": perplexity, "ece": 100 * expected_calibration_error(sums["bins"])}
    if "kl_teacher" in mean:
        scores |= {"kl_teacher": mean["kl_teacher"], "top1_agreement": 100 * mean["top1_agreement"]}
    if "correlated" in sums:
        correlated = float(sums["correlated"])
        scores["shift_correlation"] = float(sums["correlation"]) / correlated if correlated else math.nan
    return scores
