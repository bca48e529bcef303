"""Batched generation with a key-value cache, whose samples depend on neither batching nor order.

Each row has its own noise (see ``noise``), so batch size, order and number of processes change a sample only where
rounding of the logits flips a near-tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deltakd.evaluation.decoding import Decoding
from deltakd.evaluation.decoding_state import DecodingState, Row
from deltakd.evaluation.model_step import Step, evaluating, position_limit
from deltakd.evaluation.noise import GumbelNoise, row_stream


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    row_ids: Sequence[int],
    *,
    decoding: Decoding,
    seed: int,
    batch_size: int,
    eos_ids: frozenset[int],
    vocab_size: int,
    pad_id: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue every prompt; the answers come back in the order of the prompts.

    Sampling is Gumbel-max: the argmax of the warped logits plus noise drawn per (seed, row id, position).

    Args:
        model: a decoder of transformers, or one wrapped by PEFT; its training mode is restored afterwards.
        prompts: token ids without padding, at least one each.
        row_ids: one number ≥ 0 for each prompt: its row in the data set, which fixes its noise.
        decoding: how tokens are chosen.
        seed: ≥ 0; ignored by greedy decoding.
        batch_size: rows decoded together; the longest prompts come first, so that a lack of memory shows at once.
        eos_ids: tokens that end an answer; none may be given.
        vocab_size: V of the tokenizer; logits beyond it are padding and are cut off.
        pad_id: any id that the model can embed; padding is masked.
        progress: called after each batch with the number of prompts finished so far.

    Returns:
        New tokens of each prompt: without EOS, at most ``max_new_tokens``. An answer that reaches the model's last
        position (``max_position_embeddings``) stops there.

    Raises:
        ValueError: on decoding options, prompts or row ids that cannot be used, or logits that are NaN.
    """
    _check(decoding, batch_size, seed)
    rows = _rows(prompts, row_ids, decoding, seed, position_limit(model))
    step = Step(model, decoding.processors(), vocab_size)
    noise = GumbelNoise(min(batch_size, len(rows)), vocab_size) if decoding.do_sample else None
    queue = sorted(rows, key=lambda row: len(row.prompt), reverse=True)
    with evaluating(model):
        for start in range(0, len(queue), batch_size):
            batch = queue[start : start + batch_size]
            _decode(step, DecodingState.of(batch, pad_id, step.device), noise, eos_ids, pad_id)
            if progress is not None:
                progress(start + len(batch))
    return [row.tokens for row in rows]


def _decode(step: Step, state: DecodingState, noise: GumbelNoise | None, eos_ids: frozenset[int], pad_id: int) -> None:
    while True:
        # The noise is drawn on the CPU after the forward pass was launched: on a GPU the two overlap.
        tokens = _choose(step(state), state.rows, noise)
        for row, token in zip(state.rows, tokens, strict=True):
            if not row.finished:
                row.take(token, eos_ids)
        if all(row.finished for row in state.rows):
            return
        state.append([pad_id if r.finished else t for r, t in zip(state.rows, tokens, strict=True)])
        state.compact()


def _choose(logits_BV: Tensor, rows: list[Row], noise: GumbelNoise | None) -> list[int]:
    # NaN is carried as the token −1, so that finding it needs no second wait for the device.
    bad_B = logits_BV.isnan().any(dim=1)
    if noise is not None:
        streams = [None if row.finished else row.stream for row in rows]
        logits_BV = logits_BV + noise.draw(streams, logits_BV.device)
    tokens: list[int] = logits_BV.argmax(dim=1).masked_fill(bad_B, -1).tolist()
    for row, token in zip(rows, tokens, strict=True):
        if token < 0 and not row.finished:
            raise ValueError(
                f"The model's logits are NaN for row {row.row_id} after {len(row.tokens)} new tokens. The model has "
                "diverged or its dtype overflows: evaluate an earlier checkpoint, or use bfloat16 or float32."
            )
    return tokens


def _check(decoding: Decoding, batch_size: int, seed: int) -> None:
    problems = decoding.problems()
    if batch_size < 1:
        problems.append(f"batch_size is {batch_size}: it must be at least 1.")
    if seed < 0:
        problems.append(f"The sampling seed is {seed}: it must be at least 0.")
    if problems:
        raise ValueError("\n".join(problems))


def _rows(
    prompts: Sequence[Sequence[int]], row_ids: Sequence[int], decoding: Decoding, seed: int, limit: int | None
) -> list[Row]:
    if len(prompts) != len(row_ids):
        raise ValueError(f"{len(prompts)} prompts came with {len(row_ids)} row ids: give one id for each prompt.")
    if min(row_ids, default=0) < 0:
        raise ValueError(f"Row id {min(row_ids)} was given: ids number the rows of a data set, from 0.")
    return [
        Row(
            row_id,
            prompt,
            answer_budget(prompt, row_id, decoding.max_new_tokens, limit),
            row_stream(seed, row_id) if decoding.do_sample else None,
        )
        for prompt, row_id in zip(prompts, row_ids, strict=True)
    ]


def answer_budget(prompt: Sequence[int], row_id: int, max_new_tokens: int, limit: int | None) -> int:
    """How many tokens an answer to ``prompt`` may have; one that has so many did not end by itself.

    Args:
        prompt: its token ids.
        row_id: for the message.
        max_new_tokens: of the decoding options.
        limit: the positions of the model, None where it has no limit.

    Raises:
        ValueError: the prompt is empty, or leaves no position to generate at.
    """
    if not len(prompt):
        raise ValueError(f"The prompt of row {row_id} is empty: it needs at least one token, such as BOS.")
    if limit is None:
        return max_new_tokens
    if len(prompt) >= limit:
        raise ValueError(
            f"The prompt of row {row_id} has {len(prompt)} tokens, and the model has {limit} positions: nothing can "
            "be generated. Lower the prompt length of the data, or use a model with more positions."
        )
    return min(max_new_tokens, limit - len(prompt))
