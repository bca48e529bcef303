"""From a data config to tokenised sets: read, hold out, exclude, tokenise, and log what happened."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.data.encoding.packing import pack_texts
from deltakd.data.encoding.templates import Template, make_template
from deltakd.data.encoding.token_table import encode_rows
from deltakd.data.sources.overlap import generic_instructions, normal_form, overlapping, task_texts
from deltakd.data.sources.readers import read_rows, read_texts
from deltakd.data.sources.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class SplitRows(NamedTuple):
    """A run's rows before tokenising.

    Args:
        train: training rows.
        val: validation rows; may be empty.
        excluded: number of training rows left out because their task must not be trained on.
    """

    train: list[Row]
    val: list[Row]
    excluded: int


class LoadedSets(NamedTuple):
    """A run's tokenised data.

    Args:
        train: the training set.
        val: the validation set, or None.
        val_rows: validation rows before tokenising, for generation; empty for plain text.
        train_rows: training rows before tokenising; empty for plain text.
        counts: ``train_rows``, ``val_rows``, ``excluded``, and each set's own counts as ``train/...``, ``val/...``.
    """

    train: EncodedSet
    val: EncodedSet | None
    val_rows: list[Row]
    train_rows: list[Row]
    counts: dict[str, int]


def split_rows(
    train: str | Sequence[str],
    val: str | Sequence[str] | None = None,
    *,
    train_subset: str | Mapping[str, str] | None = None,
    val_subset: str | Mapping[str, str] | None = None,
    val_size: int = 0,
    exclude: Sequence[str] = (),
    strip_answers: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> SplitRows:
    """Read instruction rows and split them into training and validation rows.

    Args:
        train, train_subset: sources and subsets as for ``read_rows``.
        val, val_subset: likewise. If ``val`` is None, ``val_size`` training rows drawn with ``seed`` are held out.
        exclude: sources whose tasks must not be trained on, such as test sets; their near duplicates are dropped, too
            (``overlapping``). So are tasks of validation rows, by the rule of ``without_tasks_of``.
        strip_answers: as for ``read_rows``.
        limit: keep only the first ``limit`` rows of train and of val (for debugging).

    Raises:
        ValueError: as ``read_rows``, or nothing is left to train on.
    """
    options: dict[str, Any] = {"strip_answers": strip_answers, "limit": limit}
    rows = read_rows(train, subset=train_subset, **options)
    allowed = _without_sets(rows, [row for source in exclude for row in read_rows(source, need_response=False)])
    val_rows = _hold_out(allowed, val_size, seed) if val is None else read_rows(val, subset=val_subset, **options)
    kept = without_tasks_of(allowed, val_rows)
    if not kept:
        raise ValueError(
            f"all {len(rows)} training rows are also in data.exclude or in the validation rows; exclude less or train "
            f"on something else"
        )
    return SplitRows(kept, val_rows, len(rows) - len(kept) - (len(val_rows) if val is None else 0))


def load_instruction_sets(
    train: str | Sequence[str],
    val: str | Sequence[str] | None = None,
    *,
    template: str | Mapping[str, Any] | Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "cut",
    train_subset: str | Mapping[str, str] | None = None,
    val_subset: str | Mapping[str, str] | None = None,
    val_size: int = 0,
    exclude: Sequence[str] = (),
    strip_answers: str | None = None,
    limit: int | None = None,
    cache_dir: str | Path | None = None,
    seed: int = 0,
) -> LoadedSets:
    """Read and tokenise instruction data.

    Args:
        train, val, train_subset, val_subset, val_size, exclude, strip_answers, limit, seed: as for ``split_rows``.
        template: as for ``make_template``.
        tokenizer, max_length, max_prompt_length, overlong, cache_dir: as for ``encode_rows``.

    Raises:
        ValueError: as ``split_rows`` and ``encode_rows``.
    """
    written = make_template(template, tokenizer)
    kept, val_rows, excluded = split_rows(
        train,
        val,
        train_subset=train_subset,
        val_subset=val_subset,
        val_size=val_size,
        exclude=exclude,
        strip_answers=strip_answers,
        limit=limit,
        seed=seed,
    )
    options: dict[str, Any] = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    options |= {"overlong": overlong, "cache_dir": cache_dir}
    train_set = encode_rows(kept, written, tokenizer, **options)
    val_set = encode_rows(val_rows, written, tokenizer, **options) if val_rows else None
    counts = {"train_rows": len(kept), "val_rows": len(val_rows), "excluded": excluded}
    counts |= _prefixed("train", train_set) | _prefixed("val", val_set)
    _report(train_set, val_set, counts)
    return LoadedSets(train_set, val_set, val_rows, kept, counts)


def load_text_sets(
    train: str | Sequence[str],
    val: str | Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    max_tokens: int | None = None,
    cache_dir: str | Path | None = None,
    *,
    train_subset: Mapping[str, str] | None = None,
    val_max_tokens: int | None = None,
    limit: int | None = None,
) -> LoadedSets:
    """Read and pack plain text.

    Args:
        train, train_subset: sources and subsets as for ``read_texts``.
        val: validation sources, or None.
        max_tokens, val_max_tokens: tokens to take from each, as for ``pack_texts``.
        limit: keep only the first ``limit`` documents of each (for debugging).
        tokenizer, block_length, cache_dir: as for ``pack_texts``.

    Raises:
        ValueError: as ``read_texts`` and ``pack_texts``.
    """
    texts = read_texts(train, subset=train_subset, limit=limit)
    train_set = pack_texts(texts, tokenizer, block_length, cache_dir, max_tokens)
    val_set = None
    if val is not None:
        val_texts = read_texts(val, limit=limit)
        val_set = pack_texts(val_texts, tokenizer, block_length, cache_dir, val_max_tokens)
    log.info(
        "text: %d blocks of %d tokens out of %d documents to train on, %d blocks to validate on",
        len(train_set),
        block_length,
        len(texts),
        0 if val_set is None else len(val_set),
    )
    counts = {"train_rows": len(texts), "val_rows": 0 if val_set is None else val_set.counts["rows"], "excluded": 0}
    return LoadedSets(train_set, val_set, [], [], counts | _prefixed("train", train_set) | _prefixed("val", val_set))


def _prefixed(part: str, encoded: EncodedSet | None) -> dict[str, int]:
    return {} if encoded is None else {f"{part}/{name}": count for name, count in encoded.counts.items()}


def _without_sets(rows: Sequence[Row], banned: Sequence[Row]) -> list[Row]:
    kept = without_tasks_of(rows, banned)
    repeated = overlapping(kept, banned) if banned else set()
    return [row for at, row in enumerate(kept) if at not in repeated]


def without_tasks_of(rows: Sequence[Row], banned: Sequence[Row]) -> list[Row]:
    """Return the rows whose task is not among ``banned``.

    Tasks are compared by instruction alone, in normal form (case folded, white space collapsed), because copies of a
    data set differ in the small print of the inputs. An instruction that occurs with more than
    ``overlap.GENERIC_INPUTS`` different inputs among all these rows is compared together with its input. In a
    conversation, all turns before the last answer are compared.
    """
    generic = generic_instructions([*rows, *banned])
    tasks = {_task(row, generic) for row in banned}
    return [row for row in rows if _task(row, generic) not in tasks]


def _task(row: Row, generic: Collection[str]) -> tuple[str, str]:
    instruction, given = map(normal_form, task_texts(row))
    return instruction, given if row.messages is not None or instruction in generic else ""


def _hold_out(rows: Sequence[Row], size: int, seed: int) -> list[Row]:
    if size and not 0 < size < len(rows):
        raise ValueError(f"data.val_size = {size}; it must be from 0 to less than the {len(rows)} training rows")
    chosen = np.random.Generator(np.random.PCG64([seed, 2])).permutation(len(rows))[:size]
    return [rows[index] for index in sorted(chosen)]


def _report(train: EncodedSet, val: EncodedSet | None, counts: Mapping[str, int]) -> None:
    log.info(
        "instructions: %d examples with %d valid tokens to train on and %d to validate on; of the training rows "
        "%d were excluded, %d dropped, %d prompts and %d responses cut",
        len(train),
        int(train.valid_tokens.sum()),
        0 if val is None else len(val),
        counts["excluded"],
        counts["train/dropped"],
        counts["train/cut_prompts"],
        counts["train/cut_responses"],
    )
