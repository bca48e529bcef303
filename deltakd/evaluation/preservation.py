"""Shift preservation of a finished run: its student, its teacher and both raw models over its own held-out rows."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, Encoded, EncodedSet, collate
from deltakd.data.sources.records import missing_sources
from deltakd.evaluation.answer_tokens import AnswerToken, Pieces
from deltakd.evaluation.shift import TokenPreservation, shift_preservation, top_candidates
from deltakd.generation.model_step import position_limit
from deltakd.io.progress import progress_bar
from deltakd.io.run_directory import RunDirectory, write_text
from deltakd.kernels import MEMORY_BUDGET, chunk_size_for
from deltakd.models import (
    LanguageModel,
    ModelSpec,
    common_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    spec_problems,
)
from deltakd.models.tokenizers import pad_id
from deltakd.references import LiveReferences
from deltakd.references.content import model_identity
from deltakd.results.token_view import (
    CLASSES,
    MEASURES,
    POSITIONS,
    Preservation,
    ViewedRow,
    ViewedToken,
    position_bin,
    summarise,
    summarise_tokens,
)
from deltakd.tracking.environment import model_fingerprint
from deltakd.types import ROLES, STUDENT, STUDENT_RAW, TEACHER, TEACHER_RAW, Head

__all__ = ["FILE", "Preservation", "measure_preservation"]

log = logging.getLogger(__name__)

#: In the run directory.
FILE = "preservation.json"
#: Of the definitions: figures of another version are measured again.
VERSION = 1
#: Most probable tokens shown for each model.
CANDIDATES = 5
#: How a sentence of ``missing`` about data begins.
_ROWS = "held-out rows"


def measure_preservation(run: RunDirectory, limit: int = 64, views: int = 4) -> Preservation:
    """Measure how much of its teacher's shift a run's student has, on the run's own held-out rows.

    The models are the exported student, ``model.teacher`` and ``model.teacher_raw`` of the run's config, whether its
    loss read them or not, and ``model.student``, where the student started. The result is kept in
    ``preservation.json``, and used again while models, rows, ``limit`` and ``views`` are those that it was measured
    on; a model or a file that is gone by now can't have changed.

    Args:
        run: the run directory.
        limit: first so many held-out rows.
        views: the token view shows the first so many of them.

    Returns:
        The figures; or what is missing, where a model, the rows or the student are not there or can't be used.

    Raises:
        ValueError: ``limit`` below 1 or ``views`` below 0.
    """
    if limit < 1 or views < 0:
        raise ValueError(f"limit is {limit} and views {views}; give at least 1 row to measure and 0 or more to view")
    if not run.config.is_file() or not (run.student / "config.json").is_file():
        return Preservation(missing=[f"student: {run.path} has no config.yaml or no student/, it is no finished run"])
    subject = _Subject(run, yaml.safe_load(run.config.read_text(encoding="utf-8")), limit, views)
    missing, missing_data = subject.missing_models(), subject.missing_data()
    stored = _read(run.path / FILE)
    held_out = None
    # Reading the rows takes seconds, so not in vain.
    if not missing_data and (stored is not None or not missing):
        try:
            held_out = subject.held_out()
        except ValueError as error:
            missing_data = [f"{_ROWS}: {error}"]
    if stored is not None and _agrees(stored.measured_on, subject.identity(held_out)):
        return stored
    if held_out is None or missing:
        return Preservation(missing=missing + missing_data)
    try:
        models, vocabulary = subject.load_models(held_out)
    except ValueError as error:
        return Preservation(missing=[str(error)])
    figures = _measure(subject, models, vocabulary, held_out)
    write_text(run.path / FILE, json.dumps(figures.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
    return figures


def _read(path: Path) -> Preservation | None:
    """What was measured before; None where there is nothing, or nothing that can be read."""
    try:
        return Preservation.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s can't be read (%s): it is measured again.", path, error)
        return None


def _agrees(held: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether figures are of what is there now; None: it is not there."""
    return all(value is None or held.get(key) == value for key, value in now.items())


@dataclass(frozen=True)
class _Subject:
    """What is measured: a run, and how much of its held-out rows."""

    run: RunDirectory
    config: dict[str, Any]
    limit: int
    views: int

    @cached_property
    def specs(self) -> dict[str, ModelSpec]:
        """Where the four models come from."""
        given = self.config["model"]
        entries = {role: dict(given.get(role) or {}) for role in (STUDENT, TEACHER, TEACHER_RAW)}
        # An adapter is merged into weights as they were before they were quantised: the raw student is those, too.
        entries[STUDENT_RAW] = entries[STUDENT] | {"quantization": None}
        entries[STUDENT] = {"path": str(self.run.student), "dtype": entries[STUDENT].get("dtype", "float32")}
        known = {field.name for field in fields(ModelSpec)}
        return {role: ModelSpec(**{k: v for k, v in entries[role].items() if k in known}) for role in ROLES}

    @property
    def trust(self) -> bool:
        """Whether models may bring code of their own."""
        return bool(self.config["model"].get("trust_remote_code", False))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The exported one."""
        return load_tokenizer(str(self.run.student), "the student", trust_remote_code=self.trust)

    def missing_models(self) -> list[str]:
        """The models that are not there, one sentence each."""
        found = []
        for role, spec in self.specs.items():
            key = STUDENT if role == STUDENT_RAW else role
            if spec.init == "random":
                found.append(f"{role}: model.{key}.init=random has no trained self; the run began from scratch")
                continue
            problems = spec_problems(key, spec)
            if not problems:
                try:
                    load_config(key, spec, trust_remote_code=self.trust)
                except ValueError as error:
                    problems = [str(error)]
            found += [f"{role}: {problem}" for problem in problems]
        return found

    @cached_property
    def data(self) -> DataConfig | str:
        """The data group of the run's config, or what is wrong with it."""
        try:
            return instantiate(self.config["data"], _convert_="all")
        except InstantiationException as error:
            return " ".join(str(error.__cause__ or error).split())

    def missing_data(self) -> list[str]:
        """What can be told of missing rows without reading any, one sentence each."""
        if isinstance(self.data, str):
            return [f"{_ROWS}: {self.data}"]
        if not self.data.validates:
            return [f"{_ROWS}: the run has no validation data (neither data.val nor data.val_size)"]
        gone = [] if self.data.prepare is not None else missing_sources(self.data.sources())
        return [f"{_ROWS}: {sentence}" for sentence in gone]

    def held_out(self) -> EncodedSet:
        """The run's validation rows, tokenised as for its training.

        Raises:
            ValueError: there are none, or they can't be read.
        """
        assert not isinstance(self.data, str)
        if self.data.prepare is not None:
            self.data.prepare()
        encoded = self.data.load(self.tokenizer).val
        if encoded is None or len(encoded) == 0:
            raise ValueError("no validation row is left")
        return encoded

    def identity(self, held_out: EncodedSet | None) -> dict[str, Any]:
        """What the figures depend on; None for what is not there (a hub's model before it is first loaded)."""
        models = {role: _version(spec) for role, spec in self.specs.items() if role != STUDENT}
        return {
            "version": VERSION,
            STUDENT: model_fingerprint(self.run.student),
            **models,
            "rows": None if held_out is None else held_out.fingerprint,
            "limit": self.limit,
            "views": self.views,
        }

    def load_models(self, held_out: EncodedSet) -> tuple[LiveReferences, int]:
        """The four models, those of equal origin once, and the size of the vocabulary that they share.

        Raises:
            ValueError: naming the role: one can't be loaded, has another tokenizer, or is too short for the rows.
        """
        vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        for role, spec in self.specs.items():
            other = load_tokenizer(str(spec.tokenizer or spec.path), role, trust_remote_code=self.trust)
            vocabulary = min(vocabulary, common_vocabulary(self.tokenizer, other, role))
        longest = int(held_out.lengths[: self.limit].max())
        loaded: dict[str, LanguageModel] = {}
        models = {}
        for role, spec in self.specs.items():
            origin = repr(spec)
            if origin not in loaded:
                loaded[origin] = self._load(role, spec, vocabulary, longest)
            models[role] = loaded[origin]
        references = LiveReferences(models)
        references.to(_device())
        return references, vocabulary

    def _load(self, role: str, spec: ModelSpec, vocabulary: int, longest: int) -> LanguageModel:
        hf = load_model(
            role,
            spec,
            vocabulary=vocabulary,
            attn_implementation=self.config["model"].get("attn_implementation"),
            trust_remote_code=self.trust,
        )
        positions = position_limit(hf)
        if positions is not None and longest > positions:
            raise ValueError(f"{role}: {spec.path} has positions for {positions} tokens, but a row has {longest}")
        model = LanguageModel(hf, vocabulary)
        model.check_head()
        return model


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _version(spec: ModelSpec) -> dict[str, Any] | None:
    """Which model it is, wherever it lies; None where it is not there."""
    if spec.path is None:
        return None
    identity = model_identity(spec)
    known = {key: identity[key] for key in ("sha256", "commit", "dtype", "quantization")}
    return known if known["sha256"] else None


def _measure(subject: _Subject, models: LiveReferences, vocabulary: int, held_out: EncodedSet) -> Preservation:
    pieces = Pieces(subject.tokenizer)
    chosen = np.arange(min(subject.limit, len(held_out)))
    # Rows of similar length together: less padding.
    ordered = chosen[np.argsort(held_out.lengths[chosen], kind="stable")]
    batch_size = int(subject.config["data"].get("batch_size") or 8)
    chunk_size = chunk_size_for(MEMORY_BUDGET, vocabulary, torch.float64.itemsize, "autograd")
    pad = pad_id(subject.tokenizer, vocabulary)
    values: defaultdict[str, list[NDArray[np.float64]]] = defaultdict(list)
    row_numbers: list[int] = []
    answers: list[AnswerToken] = []
    viewed: dict[int, ViewedRow] = {}
    with progress_bar(f"shift preservation of {subject.config['name']}", len(ordered), True) as advance:
        for start in range(0, len(ordered), batch_size):
            rows = ordered[start : start + batch_size].tolist()
            batch = collate([held_out[row] for row in rows], pad, step=0, step_tokens=0).to(_device())
            heads = models(batch)
            measured = shift_preservation(heads, batch.labels_N, chunk_size)
            for name in MEASURES:
                values[name].append(getattr(measured, name).cpu().numpy())
            first = 0
            for row in rows:
                tokens = list(pieces.answer(held_out[row]))
                part = slice(first, first + len(tokens))
                if row < subject.views:
                    viewed[row] = _view(held_out[row], tokens, measured, heads, part, pieces, subject.tokenizer)
                answers += tokens
                row_numbers += [row] * len(tokens)
                first = part.stop
            advance(start + len(rows))
    arrays, row_of_N = {name: np.concatenate(parts) for name, parts in values.items()}, np.array(row_numbers)
    bins = [position_bin(token.position) for token in answers]
    return Preservation(
        measured_on=subject.identity(held_out),
        overall=summarise(arrays, row_of_N),
        by_position=summarise_tokens(arrays, row_of_N, bins, POSITIONS),
        by_class=summarise_tokens(arrays, row_of_N, [token.kind for token in answers], CLASSES),
        token_view=[viewed[row] for row in sorted(viewed)],
    )


def _view(
    row: Encoded,
    tokens: list[AnswerToken],
    measured: TokenPreservation,
    heads: Mapping[str, Head],
    part: slice,
    pieces: Pieces,
    tokenizer: PreTrainedTokenizerBase,
) -> ViewedRow:
    """One row, token by token; ``part`` is where its tokens are among those of the batch."""
    candidates: dict[str, list[list[tuple[str, float]]]] = {}
    for role, head in heads.items():
        ids_NK, probabilities_NK = top_candidates(head.rows(part.start, part.stop), CANDIDATES)
        pairs = zip(ids_NK.tolist(), probabilities_NK.tolist(), strict=True)
        candidates[role] = [[(pieces[i], p) for i, p in zip(*pair, strict=True)] for pair in pairs]
    teacher, student = measured.teacher_shift[part].tolist(), measured.student_shift[part].tolist()
    correlation = measured.correlation[part].tolist()
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


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
