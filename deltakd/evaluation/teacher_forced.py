"""A teacher-forced pass of a student over reference answers, shared by summary and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from deltakd.data import EncodedSet, collate
from deltakd.evaluation.measured_references import HeadSource
from deltakd.evaluation.token_measures import TokenMeasures, token_measures
from deltakd.generation.model_step import evaluating
from deltakd.kernels import MEMORY_BUDGET, chunk_size_for
from deltakd.models import LanguageModel
from deltakd.models.tokenizers import pad_id
from deltakd.types import STUDENT, STUDENT_RAW, Head, device_of


@dataclass(frozen=True)
class MeasuredBatch:
    """Some rows of a set, measured.

    Args:
        rows: their positions in the set.
        heads: role -> head of their N valid tokens, row after row.
        measures: the measures of these tokens.
        tokens: the number of tokens of each row.
        before: the measures of the raw student, taken for the student; None without one, or if not asked for.
    """

    rows: list[int]
    heads: Mapping[str, Head]
    measures: TokenMeasures
    tokens: list[int]
    before: TokenMeasures | None = None


def first_rows(encoded: EncodedSet, rows: int | None) -> NDArray[np.int64]:
    """Return the positions of the rows to measure: the first N of the set (``measures.rows``), or all."""
    return np.arange(len(encoded))[:rows]


@torch.no_grad()
def measured_batches(
    model: nn.Module,
    source: HeadSource,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedSet,
    rows: NDArray[np.int64],
    *,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
    with_shifts: bool = False,
    with_before: bool = False,
) -> Iterator[MeasuredBatch]:
    """Measure rows in batches of similar length, which need less padding.

    Args:
        model: the student, on its device; put in eval mode meanwhile.
        source: the heads to measure it against.
        tokenizer: the student's.
        encoded: the set.
        rows: positions in it.
        batch_size: rows of a batch.
        share: (rank, world size): this rank takes every ``world size``-th row in the order of length.
        with_shifts: see ``token_measures``.
        with_before: measure the raw student, too.
    """
    rank, world_size = share
    mine = rows[np.argsort(encoded.lengths[rows], kind="stable")][rank::world_size]
    student = LanguageModel(model, source.vocabulary)
    chunk_size = chunk_size_for(MEMORY_BUDGET, source.vocabulary, torch.float32.itemsize, "autograd")
    pad = pad_id(tokenizer, source.vocabulary)
    with evaluating(model):
        for start in range(0, len(mine), batch_size):
            chosen = mine[start : start + batch_size].tolist()
            batch = collate([encoded[row] for row in chosen], pad, step=0, step_tokens=0).to(device_of(model))
            heads = {STUDENT: student(batch)} | source(batch)
            raw = {STUDENT: heads[STUDENT_RAW]} if with_before and STUDENT_RAW in heads else None
            yield MeasuredBatch(
                chosen,
                heads,
                token_measures(heads, batch.labels_N, chunk_size, with_shifts=with_shifts),
                encoded.valid_tokens[chosen].tolist(),
                None if raw is None else token_measures(raw, batch.labels_N, chunk_size),
            )
