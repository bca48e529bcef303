"""Turns the pieces of a row into token ids: special tokens, the closing EOS, and the cutting of long prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deltakd.data.encoding.templates import Segment, Template
from deltakd.data.sources.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the EOS token. Raise a ValueError if the tokenizer has none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("the tokenizer has no EOS token, so a model could not learn to stop; set tokenizer.eos_token")
    return tokenizer.eos_token_id


def prompt_tokens(
    segments: Sequence[Segment],
    row: Row,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
) -> tuple[list[int], int]:
    """Return a prompt's tokens, cut if there are too many, and their number before the cut.

    The template's tail stays whole. Before it, an instruction keeps its beginning; a conversation, and every prompt of
    a chat template, keeps its end, where the last question is. BOS stays.

    Args:
        segments: the prompt, as ``template`` rendered it.
        row: what was rendered.
        template: gives the tail.
        tokenizer: the model's.
        max_prompt_length: most tokens to keep.

    Raises:
        ValueError: the tail alone fills the limit.
    """
    ids = [token for segment in segments for token in segment_tokens(segment, tokenizer)]
    if len(ids) <= max_prompt_length:
        return ids, len(ids)
    last, tail = segments[-1], template.tail(row)
    if not tail or last.text == tail or not last.text.endswith(tail):
        # A prompt without the template's tail: keep its end, from which the answer continues.
        return _keep_end(ids, tokenizer, max_prompt_length), len(ids)
    kept = _tail_length(last, tail, tokenizer)
    begun = int(template.keeps_end(row) and ids[0] == tokenizer.bos_token_id)
    if kept + begun >= max_prompt_length:
        raise ValueError(
            f"data.max_prompt_length = {max_prompt_length} leaves no room before the end of the template, {tail!r}, of "
            f"{kept} tokens; raise it"
        )
    if template.keeps_end(row):
        return _keep_end(ids, tokenizer, max_prompt_length), len(ids)
    return ids[: max_prompt_length - kept] + ids[len(ids) - kept :], len(ids)


def _keep_end(ids: list[int], tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    bos = ids[:1] if room > 1 and ids[0] == tokenizer.bos_token_id else []
    return bos + ids[len(ids) - room + len(bos) :]


def plain_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text, without special tokens."""
    # verbose=False: no warning about the model's longest input, since rows are cut later.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def segment_tokens(segment: Segment, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of one piece, with BOS before and EOS after it if the piece asks for them."""
    end = eos_id(tokenizer)
    if _wants_special(segment, tokenizer):
        ids = list(tokenizer(segment.text, add_special_tokens=True, verbose=False)["input_ids"])
        # Some tokenizers close every text with EOS, but this one continues.
        if ids and ids[-1] == end and not segment.text.endswith(str(tokenizer.eos_token)):
            ids.pop()
    else:
        ids = plain_tokens(segment.text, tokenizer)
    if segment.closed and ids[-1:] != [end]:
        ids.append(end)
    return ids


def _wants_special(segment: Segment, tokenizer: PreTrainedTokenizerBase) -> bool:
    written = bool(tokenizer.bos_token) and segment.text.startswith(str(tokenizer.bos_token))
    return segment.special_tokens and not written


def _tail_length(segment: Segment, tail: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many of the segment's last tokens hold its tail, including a token that straddles the border."""
    if not tokenizer.is_fast:
        return len(plain_tokens(tail, tokenizer))
    border = len(segment.text) - len(tail)
    spans = tokenizer(segment.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return sum(stop > border for _, stop in spans["offset_mapping"])
