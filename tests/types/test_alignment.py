"""Spans of a micro-batch: cut into chunks, and put together again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltakd.types import UNALIGNED, AlignedStream, Alignment, Batch, TokenMap, TokenStream


def random_alignment(generator: np.random.Generator) -> Alignment:
    """Return spans of 1 to 4 tokens a side, with tokens in no span before, between and after them."""
    sides: tuple[list[int], list[int]] = ([], [])
    for span in range(generator.integers(0, 30)):
        for side in sides:
            side += [UNALIGNED] * int(generator.integers(0, 12) * (generator.random() < 0.2))
            side += [span] * int(generator.integers(1, 5))
    for side in sides:
        side += [UNALIGNED] * int(generator.integers(0, 9))
    return Alignment.of(*(torch.tensor(side, dtype=torch.int64) for side in sides))


@pytest.mark.parametrize("seed", range(40))
def test_chunks_cover_all_tokens_of_both_sides_once_and_cut_no_span(seed: int) -> None:
    alignment = random_alignment(np.random.default_rng(seed))
    for size in (1, 3, 7, 1000):
        at, seen = (0, 0), 0
        for student, other in alignment.chunks(size):
            assert (student.start, other.start) == at
            at = (student.stop, other.stop)
            part = alignment.part(student, other)
            sides = ((part.student_spans, student), (part.other_spans, other))
            for (spans, tokens), whole in zip(sides, (alignment.student_spans, alignment.other_spans), strict=True):
                expected = whole[tokens]
                assert torch.equal(torch.where(spans >= 0, spans + seen, spans), expected)
                # All tokens of the part's spans are in it.
                held = spans[spans >= 0]
                assert sorted(set(held.tolist())) == list(range(part.count))
                assert len(held) == int(torch.isin(whole, held + seen).sum())
            starts = [int((part.student_spans == span).nonzero()[0]) for span in range(part.count)]
            assert part.borders[:, 0].tolist() == starts
            seen += part.count
            assert part.count <= 1 or max(student.stop - student.start, other.stop - other.start) <= size
        assert at == (len(alignment.student_spans), len(alignment.other_spans))
        assert seen == alignment.count


def test_a_chunk_is_as_full_as_spans_allow() -> None:
    alignment = Alignment.of(torch.arange(100), torch.arange(100).repeat_interleave(2))
    assert [other.stop - other.start for _, other in alignment.chunks(20)] == [20] * 10


def test_a_batch_has_a_stream_for_each_role_and_moves_both_with_their_alignment() -> None:
    def stream(length: int) -> TokenStream:
        ids = torch.arange(2 * length).reshape(2, length)
        return TokenStream(ids, torch.ones_like(ids), ids.clone())

    own, other = stream(3), stream(5)
    alignment = Alignment.of(torch.arange(4), torch.arange(4).repeat_interleave(2))
    rows = torch.tensor([4, 5])
    alone = Batch(own.input_ids, own.attention_mask, own.labels, rows, 0, 4)
    batch = Batch(own.input_ids, own.attention_mask, own.labels, rows, 0, 4, other=AlignedStream(other, alignment))
    assert alone.stream_of("teacher") is alone
    moved = batch.to("cpu")
    assert moved.stream_of("student_raw") is moved
    for role in ("teacher", "teacher_raw", "teacher_2"):
        assert torch.equal(moved.stream_of(role).labels_N, other.labels_N)
    assert moved.stream_of("teacher").rows_N.tolist() == [0] * 4 + [1] * 4
    assert moved.other is not None
    assert moved.other.alignment.aligned_tokens == 4


def test_a_token_map_moves_whole() -> None:
    ids = torch.arange(3)
    moved = TokenMap(ids, ids, ids, ids).to("meta")
    assert all(tensor.device.type == "meta" for tensor in vars(moved).values())
