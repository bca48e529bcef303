"""Generation with a key-value cache; samples depend on neither batching nor order.

Each row has its own noise (``sampling.py``), so batch size, order, the other rows and the number of processes change a
sample only if rounding of the logits flips a near-tie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from deltakd.generation.decoding import Decoding
from deltakd.generation.full_batch import DecodingState, Row
from deltakd.generation.key_values import adopt, can_select, is_static, static_like
from deltakd.generation.model_step import Images, MixedStep, Mixture, Step, evaluating, position_limit
from deltakd.generation.noise import NoiseKey
from deltakd.generation.packed_layers import WORTHWHILE, packed_layers
from deltakd.generation.sampling import TokenChoice

#: New prompts are run once this share of the batch is free. A smaller one costs more passes; a larger one idles rows.
REFILL = 1 / 8

#: Finished rows are removed once they make up this share of the batch and no prompt can replace them, because none is
#: left or the answers to the next one need more room.
COMPACT = 1 / 4


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    row_ids: Sequence[int],
    *,
    decoding: Decoding,
    seeds: Sequence[int],
    batch_size: int,
    eos_ids: frozenset[int],
    vocab_size: int,
    pad_id: int,
    images: Images | None = None,
    static_cache: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """Continue every prompt under every seed.

    A prompt is run once, and its cache serves all seeds. Finished answers make room for new prompts. If the cache
    cannot be split by rows (recurrent layers), a batch runs until all its answers have ended.

    Args:
        model: a transformers decoder, possibly wrapped by PEFT; its training mode is restored afterwards.
        prompts: token ids without padding, at least one each.
        row_ids: each prompt's row in the data set, ≥ 0, which determines its noise.
        decoding: how tokens are chosen.
        seeds: S numbers ≥ 0; greedy decoding ignores them and decodes once for all.
        batch_size: maximum answers decoded together; the longest prompts come first, so that a lack of memory shows at
            once.
        eos_ids: tokens that end an answer; may be empty.
        vocab_size: V of the tokenizer; logits beyond it are padding and are cut off.
        pad_id: any id that the model can embed; padding is masked.
        images: returns the tensors of the images of the prompts with the given places, in this order, for models that
            read images; None: no prompt has any.
        static_cache: keep the key-value cache at its largest size from the start, which lets a GPU replay each step as
            one CUDA graph.
        progress: called as answers end, with the number ended so far, out of S per prompt.

    Returns:
        For each seed, in order, the new tokens of each prompt, in order: without EOS, at most ``max_new_tokens``. An
        answer that reaches the model's last position (``max_position_embeddings``) stops there.

    Raises:
        ValueError: decoding options, seeds, prompts or row ids are invalid, logits are NaN, or the model can't decode
            with a static cache.
    """
    problems = ["No sampling seed was given: give at least one."] if not seeds else []
    problems += [f"The sampling seed is {seed}: it must be at least 0." for seed in seeds if seed < 0]
    _check(decoding, batch_size, problems)
    if len(prompts) != len(row_ids):
        raise ValueError(f"{len(prompts)} prompts came with {len(row_ids)} row ids: give one id for each prompt.")
    if min(row_ids, default=0) < 0:
        raise ValueError(f"Row id {min(row_ids)} was given: ids number the rows of a data set, from 0.")
    # Greedy answers are the same under every seed: one serves all.
    noises = seeds if decoding.do_sample else seeds[:1]
    share = len(seeds) // len(noises)
    answers = sample(
        model,
        prompts,
        [[NoiseKey(seed, row_id) for seed in noises] for row_id in row_ids],
        decoding=decoding,
        batch_size=batch_size,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        pad_id=pad_id,
        images=images,
        static_cache=static_cache,
        progress=None if progress is None else lambda ended: progress(ended * share),
    )
    return [[list(same[i % len(noises)].text) for same in answers] for i in range(len(seeds))]


@dataclass(frozen=True)
class Sampled:
    """An answer, token by token.

    Args:
        tokens: the new tokens, with the EOS that ended them.
        finished: True if the last token is an EOS; False if the answer used up its tokens.
    """

    tokens: list[int]
    finished: bool

    @property
    def text(self) -> list[int]:
        """The tokens without EOS."""
        return self.tokens[:-1] if self.finished else self.tokens


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Sequence[NoiseKey]],
    *,
    decoding: Decoding,
    batch_size: int,
    eos_ids: frozenset[int],
    vocab_size: int,
    pad_id: int,
    longest: int | None = None,
    mixture: Mixture | None = None,
    images: Images | None = None,
    static_cache: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[list[Sampled]]:
    """Continue every prompt once for each of its keys, by which its noise is drawn.

    Args:
        model, prompts, decoding, batch_size, eos_ids, vocab_size, pad_id: as for ``generate``.
        keys: for each prompt the keys of its answers; with greedy decoding all its answers are the same.
        longest: maximum tokens of prompt and answer together; None: only the model's limit.
        mixture: a second model, from whose distribution mixed with the model's the tokens are drawn.
        images: as for ``generate``; both models read them.
        static_cache: as for ``generate``.
        progress: called as answers end, with the number ended so far.

    Returns:
        For each prompt its answers, in the order of its keys.

    Raises:
        ValueError: decoding options or prompts are invalid, logits are NaN, or a model can't have a static cache.
    """
    _check(decoding, batch_size, [])
    models = [model] if mixture is None else [model, mixture.other]
    limit = min((n for n in (*map(position_limit, models), longest) if n is not None), default=None)
    rows = [
        _rows(number, prompt, own, decoding, limit)
        for number, (prompt, own) in enumerate(zip(prompts, keys, strict=True))
    ]
    queue = sorted(rows, key=lambda same: len(same[0].prompt), reverse=True)
    steps = [Step(one, decoding.processors(), vocab_size, images) for one in models]
    step = steps[0] if mixture is None else MixedStep(steps[0], steps[1], mixture.weight)
    decoder = _Decoder(
        step, TokenChoice(vocab_size), eos_ids, pad_id, _size_of(rows, batch_size) if static_cache else None
    )
    ended = 0
    with ExitStack() as stack:
        for one in models:
            stack.enter_context(evaluating(one))
            if decoding.max_new_tokens >= WORTHWHILE:
                stack.enter_context(packed_layers(one, min(batch_size, sum(map(len, rows)))))
        for count in decoder.run(_groups(queue, batch_size), batch_size):
            ended += count
            if progress is not None:
                progress(ended)
    return [[_sampled(row) for row in own] for own in rows]


def _rows(
    number: int, prompt: Sequence[int], keys: Sequence[NoiseKey], decoding: Decoding, limit: int | None
) -> list[Row]:
    return [
        Row(
            key.row,
            prompt,
            answer_budget(prompt, key.row, decoding.max_new_tokens, limit),
            key if decoding.do_sample else None,
            number,
        )
        for key in keys
    ]


def _sampled(row: Row) -> Sampled:
    return Sampled(row.tokens, False) if row.end is None else Sampled([*row.tokens, row.end], True)


@final
class _Decoder:
    """Decodes a queue of prompts in a batch that is kept full.

    Args:
        step: runs the model.
        choose: chooses the tokens.
        eos_ids, pad_id: as for ``generate``.
        static: rows and columns of a static cache; None: the cache grows.
    """

    def __init__(
        self,
        step: Step | MixedStep,
        choose: TokenChoice,
        eos_ids: frozenset[int],
        pad_id: int,
        static: tuple[int, int] | None = None,
    ) -> None:
        self._step = step
        self._choose = choose
        self._eos_ids = eos_ids
        self._pad_id = pad_id
        # False if rows of the cache cannot be moved, which is known after the first step.
        self._movable = True
        self._static = static
        self._static_cache: Any = None

    def run(self, queue: deque[list[Row]], batch_size: int) -> Iterator[int]:
        """Decode the whole queue; whenever answers end, yield their number.

        Args:
            queue: groups of rows with the same prompt, none larger than ``batch_size``.
            batch_size: most rows at a time.
        """
        state: DecodingState | None = None
        while queue or state is not None:
            room = batch_size - (state.live if state is not None else 0)
            if state is None or (queue and self._movable and room >= max(len(queue[0]), REFILL * batch_size)):
                started = self._start(_first(queue, room))
                ended = len(started.rows) - started.live
                state = self._joined(state, started)
            else:
                ended = self._advance(state)
            if ended:
                yield ended
            if not state.live:
                state = None

    def _start(self, groups: list[list[Row]]) -> DecodingState:
        """Run new prompts, each once if its cache can be repeated, and choose the first tokens."""
        rows = [row for group in groups for row in group]
        sources = [i for i, group in enumerate(groups) for _ in group]
        state = DecodingState.of([group[0] for group in groups], self._pad_id, self._step.device)
        logits_BV = self._step(state)
        self._movable = can_select(state.cache)
        if self._movable:
            state.repeat(rows, sources)
            logits_BV = logits_BV[sources]
        elif len(rows) > len(groups):
            state = DecodingState.of(rows, self._pad_id, self._step.device)
            logits_BV = self._step(state)
        self._take(state, logits_BV)
        return state

    def _advance(self, state: DecodingState) -> int:
        """Decode one more token for each row; return the number of rows that ended."""
        before = state.live
        state.make_room()
        self._take(state, self._step(state))
        # Rows of a static cache stay where they are, finished or not.
        if self._movable and not is_static(state.cache) and 0 < state.live <= (1 - COMPACT) * len(state.rows):
            state.drop_finished()
        return before - state.live

    def _joined(self, state: DecodingState | None, started: DecodingState) -> DecodingState:
        """Return the state with the new rows that have not ended."""
        if state is None:
            if self._static is not None and started.live:
                self._make_static(started, *self._static)
            return started
        if started.live:
            state.admit(started)
        return state

    def _make_static(self, state: DecodingState, rows: int, columns: int) -> None:
        if not self._movable:
            raise ValueError("The model's cache can't be static, as it keeps more than keys; give static_cache=false")
        if self._static_cache is None:
            try:
                self._static_cache = static_like(state.cache, rows, columns)
            except ValueError as reason:
                raise ValueError(f"The model's cache can't be static: {reason}; give static_cache=false") from None
        adopt(self._static_cache, state.cache)
        state.cache = self._static_cache

    def _take(self, state: DecodingState, logits_BV: Tensor) -> None:
        if state.rows[0].noise is None:
            tokens_B = self._choose(logits_BV, None)
        else:
            keys = [None if row.finished else row.noise for row in state.rows]
            tokens_B = self._choose(logits_BV, keys, [len(row.tokens) for row in state.rows])
        state.take(tokens_B, self._eos_ids)


def _size_of(rows: Sequence[Sequence[Row]], batch_size: int) -> tuple[int, int]:
    """Return the most rows decoded together, and the most columns that one of them needs."""
    return (
        min(batch_size, sum(len(same) for same in rows)),
        max((len(row.prompt) + row.budget for same in rows for row in same), default=1),
    )


def _groups(prompts: Sequence[list[Row]], batch_size: int) -> deque[list[Row]]:
    """Return the rows of each prompt, in parts that fit in a batch."""
    return deque(rows[i : i + batch_size] for rows in prompts for i in range(0, len(rows), batch_size))


def _first(queue: deque[list[Row]], room: int) -> list[list[Row]]:
    """Take as many groups off the queue as there is room for."""
    groups: list[list[Row]] = []
    while queue and len(queue[0]) <= room:
        groups.append(queue.popleft())
        room -= len(groups[-1])
    return groups


def _check(decoding: Decoding, batch_size: int, problems: list[str]) -> None:
    too_small = [f"batch_size is {batch_size}: it must be at least 1."] if batch_size < 1 else []
    problems = decoding.problems() + too_small + problems
    if problems:
        raise ValueError("\n".join(problems))


def answer_budget(prompt: Sequence[int], row_id: int, max_new_tokens: int, limit: int | None) -> int:
    """Return the most tokens that an answer to ``prompt`` may have; an answer of that length was cut off.

    Args:
        prompt: its token ids.
        row_id: for the error message.
        max_new_tokens: of the decoding options.
        limit: the model's number of positions; None: no limit.

    Raises:
        ValueError: the prompt is empty, or leaves no position to generate.
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
