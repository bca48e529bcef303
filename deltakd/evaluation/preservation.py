"""Shift preservation of a finished run: its student against the other three models on its own held-out rows.

Models, rows, order and arithmetic are those of the run's summary (``measures``), so equal names mean equal numbers.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, Encoded, EncodedSet
from deltakd.data.encoding.encoded_set import ANY_TASK
from deltakd.data.encoding.token_cache import fingerprint
from deltakd.data.routing import with_tasks
from deltakd.data.sources.records import missing_sources
from deltakd.evaluation.answer_tokens import AnswerToken, Pieces
from deltakd.evaluation.measured_references import WANTED, MeasuredReferences
from deltakd.evaluation.settings import MeasureSettings
from deltakd.evaluation.teacher_forced import MeasuredBatch, first_rows, measured_batches
from deltakd.evaluation.token_groups import (
    CLASSES,
    MEASURES,
    POSITIONS,
    Group,
    Preservation,
    ViewedRow,
    ViewedToken,
    position_bin,
    summarise,
    summarise_tokens,
)
from deltakd.evaluation.token_measures import top_candidates
from deltakd.generation.model_step import position_limit
from deltakd.io.files import write_text
from deltakd.io.progress import progress_bar
from deltakd.io.run_directory import RunDirectory
from deltakd.models import ModelSettings, ModelSpec, load_config, load_tokenizer
from deltakd.models.identity import model_fingerprint, model_identity, spec_of
from deltakd.models.roles import open_exported
from deltakd.models.vocabulary import vocabulary_of
from deltakd.references import CacheSettings, ReferenceSettings
from deltakd.references.routed import names_of_pair, routed_roles
from deltakd.types import ROLES, STUDENT, Head

__all__ = ["FILE", "Preservation", "RecordedRun", "measure_preservation"]

log = logging.getLogger(__name__)

#: Name of the result in the run directory.
FILE = "preservation.json"
#: Version of the definitions; results of another version are measured again.
VERSION = 2
#: Most probable tokens shown for each model.
CANDIDATES = 5
#: Start of the sentences of ``missing`` about data.
_ROWS = "held-out rows"


@dataclass(frozen=True)
class RecordedRun:
    """A finished run as its directory describes it.

    Args:
        directory: the run directory.
        name: the run's name.
        models: the models that its config names.
        data: where its rows came from.
        measures: the settings of its summary's measures.
        references: the group ``reference``; a ``CacheSettings`` names a cache.
        device: where to measure.
    """

    directory: RunDirectory
    name: str
    models: ModelSettings
    data: DataConfig
    measures: MeasureSettings
    references: ReferenceSettings
    device: torch.device


def measure_preservation(run: RecordedRun, limit: int | None = None, views: int = 4) -> Preservation:
    """Measure how much of its teacher's shift a run's student preserves, on the run's own held-out rows.

    The models are the exported student and those that the run's config names, whether its loss read them or not; they
    come from the run's reference cache if it has them. The result is kept in ``preservation.json`` and reused while
    models, rows, ``limit`` and ``views`` are unchanged; a model or file that no longer exists counts as unchanged.

    Args:
        run: the run.
        limit: first N held-out rows; None: as in the summary, ``evaluation.measures.rows`` of the run.
        views: the token view shows the first N rows.

    Returns:
        The results, or what is missing if the student, a model or the rows are absent or unusable.

    Raises:
        ValueError: ``limit`` below 1 or ``views`` below 0.
    """
    if (limit is not None and limit < 1) or views < 0:
        raise ValueError(f"limit is {limit} and views {views}; give at least 1 row to measure and 0 or more to view")
    directory = run.directory
    if not (directory.student / "config.json").is_file():
        return Preservation(missing=[f"student: {directory.path} has no student/, so it is not a finished run"])
    rows = run.measures.rows if limit is None else limit
    if rows == 0:
        return Preservation(
            missing=[f"{_ROWS}: the run has evaluation.measures.rows=0; --preservation ROWS measures it all the same"]
        )
    subject = _Subject(run, rows, views)
    stored, held_out, missing_data = _read(directory.path / FILE), None, subject.missing_data()
    # Reading the rows takes seconds: only if they will be used.
    if not missing_data and (stored is not None or not subject.missing_models):
        try:
            held_out = subject.held_out()
        except ValueError as error:
            missing_data = [f"{_ROWS}: {error}"]
    if stored is not None and _agrees(stored.measured_on, subject.identity(held_out)):
        return stored
    if held_out is None or subject.missing_models:
        return Preservation(missing=subject.missing_models + missing_data)
    try:
        figures = _measure(subject, held_out)
    except ValueError as error:
        return Preservation(missing=[f"{STUDENT}: {error}"])
    if not figures.missing:
        write_text(directory.path / FILE, json.dumps(figures.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
    return figures


def _read(path: Path) -> Preservation | None:
    """Return the stored result; None if there is none or it can't be read."""
    try:
        return Preservation.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s can't be read (%s): it is measured again.", path, error)
        return None


def _agrees(held: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return True if stored results match the current models and rows; a value of None (absent) matches anything."""
    return all(value is None or held.get(key) == value for key, value in now.items())


@dataclass(frozen=True)
class _Subject:
    """A run, and the number of its held-out rows to measure (None: all)."""

    run: RecordedRun
    limit: int | None
    views: int

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(
            str(self.run.directory.student), "the student", trust_remote_code=self.run.models.trust_remote_code
        )

    @cached_property
    def vocabulary(self) -> int:
        """V of the exported student."""
        spec = ModelSpec(path=str(self.run.directory.student))
        config = load_config("student", spec, trust_remote_code=self.run.models.trust_remote_code)
        return vocabulary_of(self.tokenizer, config)

    @property
    def pairs(self) -> list[int]:
        """Numbers of the pairs of teachers that judge rows."""
        return sorted(set((self.run.models.routes or {ANY_TASK: 1}).values()))

    def references(self, pair: int, earlier: MeasuredReferences | None = None) -> MeasuredReferences:
        """Return the source of the frozen models, with the teachers of a pair.

        Args:
            pair: its number.
            earlier: of another pair, which may hold some of these models.
        """
        given, models = self.run.references, self.run.models.of_pair(pair)
        return MeasuredReferences(
            models,
            self.tokenizer,
            self.vocabulary,
            given if isinstance(given, CacheSettings) else None,
            {} if earlier is None else earlier.held_for(models),
            given.placement,
            self.run.device,
            pair=pair,
        )

    @cached_property
    def missing_models(self) -> list[str]:
        """The models that are not available, one sentence each."""
        reasons = {role: reason for pair in self.pairs for role, reason in self.references(pair).missing().items()}
        return [f"{role}: {reason}" for role, reason in reasons.items()]

    def missing_data(self) -> list[str]:
        """Return the problems with the rows that are known without reading them, one sentence each."""
        data = self.run.data
        if not data.validates:
            return [f"{_ROWS}: the run has no validation data (neither data.val nor data.val_size)"]
        gone = [] if data.prepare is not None else missing_sources(data.sources())
        return [f"{_ROWS}: {sentence}" for sentence in gone]

    def held_out(self) -> EncodedSet:
        """Return the run's validation rows, tokenised as in training.

        Raises:
            ValueError: there are none, or they can't be read.
        """
        data = self.run.data
        data.make_files()
        sets = data.load(self.tokenizer)
        if sets.val is None or len(sets.val) == 0:
            raise ValueError("no validation row is left")
        return with_tasks(sets.val, sets.val_rows, self.run.models.routes)

    def identity(self, held_out: EncodedSet | None) -> dict[str, Any]:
        """Return the inputs of the results; None for an absent one (a hub model before its first download)."""
        return {
            "version": VERSION,
            STUDENT: model_fingerprint(self.run.directory.student),
            **{role: _version(self.run.models, role) for role in routed_roles(WANTED, self.pairs)},
            "rows": None if held_out is None else _rows_identity(held_out),
            "limit": "all" if self.limit is None else self.limit,
            "views": self.views,
        }


def _rows_identity(held_out: EncodedSet) -> str:
    """Return what identifies the rows, and their tasks and judges if they have some."""
    tasks = held_out.tasks
    if tasks is None:
        return held_out.fingerprint
    return fingerprint(held_out.fingerprint, tasks.numbers.tolist(), list(tasks.names), list(tasks.routes))


def _version(models: ModelSettings, role: str) -> dict[str, Any] | None:
    """Return what identifies a model, wherever it is stored; None if it is absent."""
    spec = spec_of(models, role)
    if spec is None or spec.path is None:
        return None
    identity = model_identity(spec)
    known = {key: identity[key] for key in ("sha256", "commit", "dtype", "quantization")}
    return known if known["sha256"] else None


def _measure(subject: _Subject, held_out: EncodedSet) -> Preservation:
    """Measure, or return which models can't be used.

    Raises:
        ValueError: the exported student can't be opened, or has too few positions for the rows.
    """
    run, rows = subject.run, first_rows(held_out, subject.limit)
    model = open_exported(run.directory.student, run.models, subject.vocabulary, run.device)
    longest, positions = int(held_out.lengths[rows].max()), position_limit(model)
    if positions is not None and longest > positions:
        raise ValueError(f"it has positions for {positions} tokens, but a row has {longest}")
    try:
        return _figures(subject, held_out, _judged_batches(subject, model, held_out, rows), len(rows))
    except _LackingError as error:
        return Preservation(missing=error.missing)


class _LackingError(Exception):
    """Some models can't be used; says which, and why, one sentence each."""

    def __init__(self, missing: list[str]) -> None:
        super().__init__()
        self.missing = missing


def _judged_batches(
    subject: _Subject, model: torch.nn.Module, held_out: EncodedSet, rows: NDArray[np.int64]
) -> Iterator[MeasuredBatch]:
    """Yield the rows in batches, each measured against the pair of teachers that judges it.

    Raises:
        _LackingError: models can't be used.
    """
    tasks, earlier = held_out.tasks, None
    routed = tasks is not None and tasks.routed
    for pair in subject.pairs:
        own = rows[tasks.pairs[rows] == pair] if tasks is not None and routed else rows
        if not len(own):
            continue
        references = subject.references(pair, earlier)
        source = references.source(f"shift preservation of {subject.run.name}", held_out, own)
        names = names_of_pair(WANTED, pair)
        lacking = [role for role in WANTED if role not in source.roles]
        if lacking:
            raise _LackingError([f"{names[role]}: {references.reasons[role]}" for role in lacking])
        size = subject.run.data.full_rows
        yield from measured_batches(model, source, subject.tokenizer, held_out, own, batch_size=size, with_shifts=True)
        earlier = references


def _figures(
    subject: _Subject, held_out: EncodedSet, batches: Iterator[MeasuredBatch], total_rows: int
) -> Preservation:
    pieces = Pieces(subject.tokenizer)
    values: defaultdict[str, list[NDArray[np.float64]]] = defaultdict(list)
    row_numbers: list[int] = []
    answers: list[AnswerToken] = []
    viewed: dict[int, ViewedRow] = {}
    done = 0
    with progress_bar(f"shift preservation of {subject.run.name}", total_rows, True) as advance:
        for batch in batches:
            for name in MEASURES:
                values[name].append(getattr(batch.measures, name).cpu().numpy())
            first = 0
            for row in batch.rows:
                tokens = list(pieces.answer(held_out[row]))
                part = slice(first, first + len(tokens))
                if row < subject.views:
                    viewed[row] = _view(held_out[row], tokens, batch, part, pieces, subject.tokenizer)
                answers += tokens
                row_numbers += [row] * len(tokens)
                first = part.stop
            done += len(batch.rows)
            advance(done)
    arrays, row_of_N = {name: np.concatenate(parts) for name, parts in values.items()}, np.array(row_numbers)
    bins = [position_bin(token.position) for token in answers]
    return Preservation(
        measured_on=subject.identity(held_out),
        overall=summarise(arrays, row_of_N),
        by_position=summarise_tokens(arrays, row_of_N, bins, POSITIONS),
        by_class=summarise_tokens(arrays, row_of_N, [token.kind for token in answers], CLASSES),
        by_task=_by_task(held_out, arrays, row_of_N),
        token_view=[viewed[row] for row in sorted(viewed)],
    )


def _by_task(
    held_out: EncodedSet, arrays: Mapping[str, NDArray[np.float64]], row_of_N: NDArray[np.int64]
) -> dict[str, Group]:
    """Return the tokens of each task as a group; none if there is one task."""
    tasks = held_out.tasks
    if tasks is None or len(tasks.names) < 2:
        return {}
    names = [tasks.names[number] or "" for number in tasks.numbers[row_of_N]]
    return summarise_tokens(arrays, row_of_N, names, [name for name in tasks.names if name])


def _view(
    row: Encoded,
    tokens: list[AnswerToken],
    batch: MeasuredBatch,
    part: slice,
    pieces: Pieces,
    tokenizer: PreTrainedTokenizerBase,
) -> ViewedRow:
    """Return one row token by token; ``part`` selects its tokens among those of the batch."""
    candidates = {role: _candidates(head, part, pieces) for role, head in batch.heads.items()}
    names = ("teacher_shift", "student_shift", "correlation")
    teacher, student, correlation = (getattr(batch.measures, name)[part].tolist() for name in names)
    shown = [
        ViewedToken(
            text=token.text,
            teacher_shift=_finite(teacher[i]),
            student_shift=_finite(student[i]),
            correlation=_finite(correlation[i]),
            candidates={role: candidates[role][i] for role in ROLES},
        )
        for i, token in enumerate(tokens)
    ]
    prompt = tokenizer.decode(row.input_ids[: tokens[0].index] if tokens else row.input_ids)
    return ViewedRow(row_id=row.row_id, prompt=str(prompt), tokens=shown)


def _candidates(head: Head, part: slice, pieces: Pieces) -> list[list[tuple[str, float]]]:
    """Return for each token the model's most probable tokens as (text, probability)."""
    ids_NK, probabilities_NK = top_candidates(head.rows(part.start, part.stop), CANDIDATES)
    pairs = zip(ids_NK.tolist(), probabilities_NK.tolist(), strict=True)
    return [[(pieces[i], p) for i, p in zip(*pair, strict=True)] for pair in pairs]


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
