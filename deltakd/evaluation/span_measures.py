"""Distance of a student to a teacher with another tokenizer, over the spans of text that both share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, EncodedSet, collate
from deltakd.data.encoding.two_tokenizers import Coding, TwoTokenizers
from deltakd.generation.model_step import evaluating
from deltakd.models import LanguageModel, ModelSettings, load_config, load_tokenizer, spec_problems
from deltakd.models.roles import open_model
from deltakd.models.tokenizers import OtherTokenizerError, common_vocabulary
from deltakd.models.vocabulary import vocabulary_of
from deltakd.references import LiveReferences, References
from deltakd.types import TEACHER, Alignment, Head, TokenMap, device_of, in_float64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpanTeacher:
    """A teacher with a tokenizer of its own, to measure a student against.

    Args:
        references: give the teacher's head over the batch's rows in its tokenizer.
        coding: how rows become its tokens.
        token_map: between the student's vocabulary and the teacher's.
    """

    references: References
    coding: Coding
    token_map: TokenMap


def open_span_teacher(
    models: ModelSettings, data: DataConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int, device: torch.device
) -> SpanTeacher | None:
    """Open the teacher of a finished student if it has another tokenizer than the student; else return None.

    Args:
        models: name the teacher.
        data: renders rows for both.
        tokenizer: the student's.
        vocabulary: V of the student.
        device: of the student.

    Raises:
        ValueError: the teacher is not available, or can't be aligned.
    """
    spec = models.specs.get(TEACHER)
    if spec is None or not spec.path or spec_problems(TEACHER, spec):
        return None
    trust = models.trust_remote_code
    theirs = load_tokenizer(str(spec.tokenizer or spec.path), f"model.{TEACHER}.tokenizer", trust_remote_code=trust)
    try:
        common_vocabulary(tokenizer, theirs, TEACHER)
    except OtherTokenizerError:
        coding = data.teachers_coding(theirs)
    else:
        return None
    size = vocabulary_of(theirs, load_config(TEACHER, spec, trust_remote_code=trust), TEACHER)
    student = Coding(data.make_template(tokenizer), tokenizer, 0, 0)
    token_map = TwoTokenizers(student, coding).token_map(vocabulary, size)
    model = open_model(TEACHER, spec, models, vocabulary=size, max_length=coding.max_length)
    references = LiveReferences({TEACHER: model.eval()})
    references.to(device)
    return SpanTeacher(references, coding, token_map)


@torch.no_grad()
def span_kl(student: Head, teacher: Head, alignment: Alignment, token_map: TokenMap, chunk_size: int = 256) -> Tensor:
    """Return [K] KL(p_t ‖ π_θ) in nats, float64, over the next token where a span begins.

    There both models have read the same text. The distributions are over the tokens that both vocabularies have, and
    one bucket for all others, summed over its own tokens. With equal tokenizers every token is a span and is shared:
    this is then ``kl_teacher``. Buckets can only lower a KL, so it is a lower bound.

    Args:
        student: over the N valid tokens of the student.
        teacher: over the M valid tokens of the teacher.
        alignment: of the two.
        token_map: between the vocabularies.
        chunk_size: spans in a chunk.
    """
    device = student.hidden.device
    begins = alignment.borders.to(device)
    sides = (
        (student, begins[:, 0], token_map.student_shared.to(device)),
        (teacher, begins[:, 2], token_map.other_shared.to(device)),
    )
    found = []
    for start in range(0, max(1, alignment.count), chunk_size):
        log_q, log_p = (
            _shared_and_rest(Head(head.hidden[places[start : start + chunk_size]], *_rest_of(head)), ids)
            for head, places, ids in sides
        )
        p = log_p.exp()
        found.append(torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1))
    return torch.cat(found)


def _rest_of(head: Head) -> tuple[Tensor, Tensor | None, float | None, float]:
    return head.weight, head.bias, head.softcap, head.scale


def _shared_and_rest(head: Head, shared: Tensor) -> Tensor:
    """Return [K, P + 1] log-probs of the shared tokens, and of all others together (−inf: there are none)."""
    log_probs_KV = in_float64(head.logits()).log_softmax(-1)
    shared = shared.to(log_probs_KV.device)
    others = torch.ones(log_probs_KV.shape[1], dtype=torch.bool, device=log_probs_KV.device)
    others[shared] = False
    rest_K1 = log_probs_KV[:, others].logsumexp(-1, keepdim=True)
    return torch.cat([log_probs_KV[:, shared], rest_K1], dim=1)


@torch.no_grad()
def span_sums(
    model: nn.Module,
    teacher: SpanTeacher,
    encoded: EncodedSet,
    rows: NDArray[np.int64],
    *,
    vocabulary: int,
    batch_size: int,
    share: tuple[int, int] = (0, 1),
) -> Mapping[str, Tensor]:
    """Return ``spans``, their number, and ``span_kl_teacher``, the sum of ``span_kl``, over this rank's share of rows.

    Args:
        model: the student, on its device; put in eval mode meanwhile.
        teacher: to measure against.
        encoded: the set, in both tokenizers.
        rows: positions in it.
        vocabulary: V of the student.
        batch_size: rows of a batch.
        share: (rank, world size): this rank takes every ``world size``-th row in the order of length.
    """
    rank, world_size = share
    mine = rows[np.argsort(encoded.lengths[rows], kind="stable")][rank::world_size]
    student = LanguageModel(model, vocabulary)
    device = device_of(model)
    sums = {"spans": torch.zeros((), dtype=torch.float64), "span_kl_teacher": torch.zeros((), dtype=torch.float64)}
    with evaluating(model):
        for start in range(0, len(mine), batch_size):
            batch = collate([encoded[row] for row in mine[start : start + batch_size].tolist()], 0, 0, 0).to(device)
            assert batch.other is not None
            heads = teacher.references(batch)
            assert isinstance(heads, dict), "a store of log-probs of some tokens serves one vocabulary"
            kl_K = span_kl(student(batch), heads[TEACHER], batch.other.alignment, teacher.token_map)
            sums["spans"] += len(kl_K)
            sums["span_kl_teacher"] += kl_K.sum().cpu()
    return sums
