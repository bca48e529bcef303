"""Teacher-forced measures of a finished student beyond ROUGE: the same for all methods, whatever their losses read."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, EncodedSet, encode_rows, with_answer
from deltakd.data.encoding.two_tokenizers import Coding
from deltakd.data.routing import with_tasks
from deltakd.distributed.sharding import gathered, place
from deltakd.evaluation.measured_references import WANTED, HeadSource, MeasuredReferences
from deltakd.evaluation.retention import FACTS, RETAINED, TEXT, recalled, retained_sets
from deltakd.evaluation.settings import EvaluationSettings
from deltakd.evaluation.span_measures import span_sums
from deltakd.evaluation.subject import Judges, Subject
from deltakd.evaluation.teacher_forced import MeasuredBatch, first_rows, measured_batches
from deltakd.evaluation.token_measures import CALIBRATION_BINS, calibration_bins, expected_calibration_error
from deltakd.generation.model_step import position_limit
from deltakd.io.progress import progress_bar
from deltakd.types import STUDENT_RAW

log = logging.getLogger(__name__)

VALIDATION = "val"
#: Measures that are means over tokens, where their references are there.
_MEANS = ("kl_teacher", "kl_raw_student", "top1_agreement")


@dataclass(frozen=True)
class Measured:
    """The results of measuring a student.

    Args:
        scores: ``<set>/<measure>``: ``perplexity``, ``ece`` and ``top1_agreement`` (per cent), ``kl_teacher`` and
            ``kl_raw_student`` (nats per token), ``shift_correlation``; of a teacher with another tokenizer
            ``span_kl_teacher`` (nats per span, see ``span_kl``); and ``retained/perplexity``,
            ``retained/kl_raw_student``, ``retained/fact_recall`` (per cent), with ``retained/perplexity_before`` and
            ``retained/fact_recall_before`` of the raw student. Measures that are not available are absent.
        counts: set -> ``rows`` and ``tokens`` measured, ``tokens_without_shift`` (those without a correlation), and
            the source of the ``references``.
    """

    scores: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(
        self,
        name: str,
        scores: Mapping[str, float],
        tokens: int,
        rows: int,
        references: str,
        counted_as: str | None = None,
    ) -> None:
        """Add the scores of a set, those that are finite; its counts have its own name if none is given."""
        named = {f"{name}/{measure}": value for measure, value in scores.items()}
        self.scores.update({key: value for key, value in named.items() if math.isfinite(value)})
        self.counts[counted_as or name] = {"rows": rows, "tokens": tokens, "references": references}
        unfinite = [key for key, value in named.items() if not math.isfinite(value)]
        if unfinite:
            log.info("%s: no finite value, so it is left out.", ", ".join(unfinite))


def encode_set(
    name: str,
    evaluation: EvaluationSettings,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    teachers: Coding | None = None,
    routes: Mapping[str, int] | None = None,
) -> EncodedSet:
    """Return the prompts of the set ``name`` with their first references, tokenised as in training.

    Args:
        name: of the set.
        evaluation: the group ``evaluation``.
        data: the group ``data``.
        tokenizer: the student's.
        teachers: as for ``encode_rows``.
        routes: ``model.routes``.

    Raises:
        ValueError: the source can't be read, or no row is left.
    """
    data = evaluation.prompts_of(data)
    rows = [row for row in evaluation.rows_of(name, data) if row.references]
    answered = [with_answer(row, row.references[0]) for row in rows[: evaluation.measures.rows]]
    encoded = encode_rows(
        answered,
        data.make_template(tokenizer),
        tokenizer,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        overlong=getattr(data, "overlong", "cut"),
        split_turns=getattr(data, "split_turns", False),
        cache_dir=data.cache_dir,
        teachers=teachers,
    )
    return with_tasks(encoded, answered, routes)


def measure(subject: Subject, validation: EncodedSet | None) -> Measured:
    """Measure the student on validation rows, if answers are generated on the evaluation sets, and what it retains.

    A run that generates no answers is judged only on validation data. Each rank measures its share of the rows; the
    results cover all ranks. Collective: call on every rank.

    Args:
        subject: the student.
        validation: the run's tokenised validation rows, or None.
    """
    evaluation, found = subject.evaluation, Measured()
    if evaluation.measures.rows == 0:
        return found
    judges = Judges(subject)
    wanted: Collection[str] = WANTED
    if subject.teacher is not None:
        wanted = (STUDENT_RAW,)
        log.info(
            "kl_teacher, top1_agreement and shift_correlation need one vocabulary and are left out: the teacher has a "
            "tokenizer of its own. span_kl_teacher takes their place."
        )
    for name, encoded in _sets(subject, validation):
        parts = [
            (task, _measured_set(subject, judges.of_pair(pair), name, encoded, rows, wanted, _add_up))
            for task, pair, rows in _by_task(encoded, first_rows(encoded, evaluation.measures.rows))
        ]
        whole = _together([part for _, part in parts if part is not None])
        named = [(f"{name}/{task}", part) for task, part in parts if task is not None] if len(parts) > 1 else []
        for each, part in [(name, whole), *named]:
            if part is not None:
                found.add(each, _scores(part.sums), int(part.sums["tokens"]), part.rows, part.source)
                if "correlated" in part.sums:
                    without = int(part.sums["tokens"] - part.sums["correlated"])
                    found.counts[each]["tokens_without_shift"] = without
        if whole is not None:
            _add_spans(found, subject, name, encoded)
    for name, encoded in _retained(subject):
        rows = first_rows(encoded, evaluation.measures.rows)
        part = _measured_set(subject, judges.of_pair(1), name, encoded, rows, (STUDENT_RAW,), _ADDED[name])
        if part is not None:
            tokens = int(part.sums["tokens"])
            found.add(RETAINED, _SCORED[name](part.sums), tokens, part.rows, part.source, counted_as=name)
    return found


def _by_task(
    encoded: EncodedSet, rows: NDArray[np.int64]
) -> Iterator[tuple[str | None, int | None, NDArray[np.int64]]]:
    """Yield task, number of its pair of teachers, and rows; all rows at once if the set has no tasks."""
    tasks = encoded.tasks
    if tasks is None:
        yield None, 1, rows
        return
    for number, (name, pair) in enumerate(zip(tasks.names, tasks.routes, strict=True)):
        own = rows[tasks.numbers[rows] == number]
        if len(own):
            yield name, pair if tasks.routed else 1, own


def _add_spans(found: Measured, subject: Subject, name: str, encoded: EncodedSet) -> None:
    """Measure a set's first rows against a teacher with another tokenizer. Collective: call on every rank."""
    if subject.teacher is None or encoded.other is None:
        return
    rows = first_rows(encoded, subject.evaluation.measures.rows)
    options: dict[str, Any] = {"vocabulary": subject.vocabulary, "batch_size": subject.data.full_rows}
    own: Sums | None = None
    try:
        own = dict(span_sums(subject.model, subject.teacher, encoded, rows, share=place(), **options))
    except ValueError as error:
        # A cache of references holds the run's rows only.
        log.info("%s is not measured against the teacher: %s", name, error)
    of_ranks = [of for of in gathered(own) if of is not None]
    if len(of_ranks) < place()[1]:
        return
    spans, total = (sum(float(of[key]) for of in of_ranks) for key in ("spans", "span_kl_teacher"))
    if spans and math.isfinite(total):
        found.scores[f"{name}/span_kl_teacher"] = total / spans
    found.counts[name]["spans"] = int(spans)


def _sets(subject: Subject, validation: EncodedSet | None) -> Iterator[tuple[str, EncodedSet]]:
    if validation is not None and len(validation):
        yield VALIDATION, validation
    for name in subject.evaluation.sets if subject.evaluation.generate else ():
        try:
            teachers, routes = None if subject.teacher is None else subject.teacher.coding, subject.models.routes
            yield name, encode_set(name, subject.evaluation, subject.data, subject.tokenizer, teachers, routes)
        except ValueError as error:
            log.warning("%s is not measured beyond its answers: %s", name, error)


def _retained(subject: Subject) -> Iterator[tuple[str, EncodedSet]]:
    try:
        yield from retained_sets(subject.evaluation.measures, subject.data, subject.tokenizer)
    except ValueError as error:
        log.warning("What the student keeps is not measured: %s", error)


#: Sums over the tokens of a batch, float64, on the CPU.
Sums = dict[str, Tensor]


class _Part(NamedTuple):
    """The sums over some rows.

    Args:
        sums: over the tokens of all ranks.
        source: of the references.
        rows: number of them.
    """

    sums: Sums
    source: str
    rows: int


def _together(parts: Sequence[_Part]) -> _Part | None:
    """Return the sums over the rows of all parts; a mean that a part lacks is none of the whole."""
    if len(parts) < 2:
        return parts[0] if parts else None
    common = [key for key in parts[0].sums if all(key in part.sums for part in parts)]
    sums = {key: torch.stack([part.sums[key] for part in parts]).sum(0) for key in common}
    sources = dict.fromkeys(part.source for part in parts)
    return _Part(sums, " and ".join(sources), sum(part.rows for part in parts))


def _measured_set(
    subject: Subject,
    references: MeasuredReferences | None,
    name: str,
    encoded: EncodedSet,
    rows: NDArray[np.int64],
    wanted: Collection[str],
    add_up: Callable[[MeasuredBatch], Sums],
) -> _Part | None:
    """Measure some rows of a set; None if the student has too few positions. Collective: call on every rank."""
    longest, positions = int(encoded.lengths[rows].max()), position_limit(subject.model)
    if positions is not None and longest > positions:
        log.warning("%s is not measured: a row has %d tokens, the student %d positions.", name, longest, positions)
        return None
    source = HeadSource([], frozenset(), subject.vocabulary, "none")
    if references is not None:
        source = references.source(name, encoded, rows, wanted)
    share = place()
    own: Sums = {}
    done = 0
    batches = measured_batches(
        subject.model,
        source,
        subject.tokenizer,
        encoded,
        rows,
        batch_size=subject.data.full_rows,
        share=share,
        with_before=add_up is not _add_up,
    )
    with progress_bar(f"measures of {name}", len(rows[share[0] :: share[1]]), subject.show_progress) as advance:
        for batch in batches:
            for key, value in add_up(batch).items():
                own[key] = own.get(key, torch.zeros(())) + value.cpu()
            done += len(batch.rows)
            advance(done)
    # A rank may have had no row.
    of_ranks = gathered(own)
    keys = dict.fromkeys(key for of in of_ranks for key in of)
    sums = {key: torch.stack([of[key] for of in of_ranks if key in of]).sum(0) for key in keys}
    return _Part(sums, source.name, len(rows))


def _add_up(batch: MeasuredBatch) -> Sums:
    measured = batch.measures
    sums = {
        "tokens": torch.tensor(len(measured.nll), dtype=torch.float64),
        "nll": measured.nll.sum(),
        "bins": calibration_bins(measured.confidence, measured.correct),
    }
    for name in _MEANS:
        values = getattr(measured, name)
        if values is not None:
            sums[name] = values.sum()
    if measured.correlation is not None:
        defined = ~measured.correlation.isnan()
        sums |= {"correlated": defined.double().sum(), "correlation": measured.correlation[defined].sum()}
    return sums


def _add_up_text(batch: MeasuredBatch) -> Sums:
    return _add_up(batch) | ({} if batch.before is None else {"nll_before": batch.before.nll.sum()})


def _add_up_facts(batch: MeasuredBatch) -> Sums:
    sums = {
        "tokens": torch.tensor(sum(batch.tokens), dtype=torch.float64),
        "facts": torch.tensor(sum(count > 0 for count in batch.tokens), dtype=torch.float64),
        "recalled": recalled(batch.measures.correct, batch.tokens),
    }
    before = batch.before
    return sums | ({} if before is None else {"recalled_before": recalled(before.correct, batch.tokens)})


def _scores(sums: Mapping[str, Tensor]) -> dict[str, float]:
    tokens = float(sums["tokens"])
    if not tokens:
        return {}
    mean = {name: float(sums[name]) / tokens for name in ("nll", *_MEANS) if name in sums}
    assert sums["bins"].shape == (3, CALIBRATION_BINS)
    scores = {"perplexity": _perplexity(mean.pop("nll")), "ece": 100 * expected_calibration_error(sums["bins"])}
    scores |= {name: 100 * value if name == "top1_agreement" else value for name, value in mean.items()}
    if "correlated" in sums:
        correlated = float(sums["correlated"])
        scores["shift_correlation"] = float(sums["correlation"]) / correlated if correlated else math.nan
    return scores


def _text_scores(sums: Mapping[str, Tensor]) -> dict[str, float]:
    scores = {key: value for key, value in _scores(sums).items() if key != "ece"}
    if scores and "nll_before" in sums:
        scores["perplexity_before"] = _perplexity(float(sums["nll_before"] / sums["tokens"]))
    return scores


def _fact_scores(sums: Mapping[str, Tensor]) -> dict[str, float]:
    facts = float(sums["facts"])
    named = {"fact_recall": "recalled", "fact_recall_before": "recalled_before"}
    return {name: 100 * float(sums[key]) / facts for name, key in named.items() if facts and key in sums}


def _perplexity(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


_ADDED = {TEXT: _add_up_text, FACTS: _add_up_facts}
_SCORED = {TEXT: _text_scores, FACTS: _fact_scores}
