"""From a data config to tokenised sets: read, hold out, exclude, tokenise, and log the outcome."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltakd.data.encoding.encode import check_limits
from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.data.encoding.example_stream import Stream
from deltakd.data.encoding.image_reader import ImageReader
from deltakd.data.encoding.packing import pack_texts
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.templates import make_template
from deltakd.data.encoding.token_cache import fingerprint
from deltakd.data.encoding.token_table import encode_prompt_rows, encode_rows
from deltakd.data.encoding.two_tokenizers import Coding
from deltakd.data.sources.overlap import overlapping
from deltakd.data.sources.prepared import prepared_rows, reading_key
from deltakd.data.sources.readers import read_rows, read_texts
from deltakd.data.sources.rows import Row
from deltakd.data.sources.stored_rows import StoredRows
from deltakd.data.sources.tasks import task_digests, unlike
from deltakd.io.arrays import ArrayWriter, kept_arrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class SplitRows(NamedTuple):
    """A run's rows before tokenising, on disk.

    Args:
        train: training rows.
        val: validation rows; may be empty.
        excluded: number of training rows left out because their task is excluded from training.
    """

    train: StoredRows
    val: StoredRows
    excluded: int


class LoadedSets(NamedTuple):
    """A run's tokenised data.

    Args:
        train: the training set.
        val: the validation set, or None.
        val_rows: validation rows before tokenising, for generation, read on demand; empty for plain text.
        train_rows: training rows before tokenising, likewise.
        counts: ``train_rows``, ``val_rows``, ``excluded``, and each set's own counts as ``train/...``, ``val/...``.
        stream: streamed training data instead of ``train`` and ``train_rows``, which then hold its first rows or none.
    """

    train: EncodedSet
    val: EncodedSet | None
    val_rows: Sequence[Row]
    train_rows: Sequence[Row]
    counts: dict[str, int]
    stream: Stream | None = None

    @property
    def image_reader(self) -> ImageReader | None:
        """Reads the images of the rows; None: no row has any."""
        held = [one.images for one in (self.train, self.val) if one is not None and one.images is not None]
        return held[0].reader if held else None


def split_rows(
    train: str | Sequence[str],
    val: str | Sequence[str] | None = None,
    *,
    train_subset: str | Mapping[str, str] | None = None,
    val_subset: str | Mapping[str, str] | None = None,
    val_size: int = 0,
    exclude: Sequence[str] = (),
    strip_answers: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    need_response: bool = True,
    cache_dir: str | Path | None = None,
) -> SplitRows:
    """Read instruction rows and split them into training and validation rows.

    Args:
        train, train_subset: sources and subsets as for ``read_rows``.
        val, val_subset: likewise. If ``val`` is None, ``val_size`` training rows drawn with ``seed`` are held out.
        exclude: sources whose tasks must not be trained on, such as test sets; near duplicates are dropped, too
            (``overlapping``). So are tasks of validation rows, by the rule of ``unlike``.
        strip_answers, columns: as for ``iter_rows``; of ``columns``, excluded sources need have none.
        limit: keep only the first ``limit`` rows of train and of val (for debugging).
        need_response: True if a training row without an answer is an error.
        cache_dir: folder that keeps the rows and the choice for later runs; None: they are only in a temporary place.

    Raises:
        ValueError: as ``read_rows``, or nothing is left to train on.
    """
    options: dict[str, Any] = {"strip_answers": strip_answers, "columns": columns, "limit": limit}
    options["cache_dir"] = cache_dir
    rows, key = prepared_rows(train, subset=train_subset, need_response=need_response, **options)
    given, val_key = (None, "") if val is None else prepared_rows(val, subset=val_subset, **options)
    keys = [key, val_key, *(reading_key(source, columns=dict(columns or {})) for source in exclude)]

    def build(writer: ArrayWriter) -> None:
        kept, held = _chosen(rows, given, banned_rows(exclude, columns), val_size, seed)
        writer.append("train", kept)
        writer.append("held", held)
        writer.meta["digest"] = rows.take(kept).digest()

    name = f"split-{fingerprint('split', keys, val_size, seed)}"
    split = kept_arrays(name, None if None in keys else cache_dir, {"train": "<i8", "held": "<i8"}, build, "the split")
    kept = rows.take(split.arrays["train"], split.meta["digest"])
    val_rows = rows.take(split.arrays["held"]) if given is None else given
    return SplitRows(kept, val_rows, len(rows) - len(kept) - len(split.arrays["held"]))


def banned_rows(exclude: Sequence[str], columns: Mapping[str, str] | None) -> list[Row]:
    """Return the rows whose tasks must not be trained on."""
    lenient: dict[str, Any] = {"need_response": False, "columns": columns, "need_columns": False}
    return [row for source in exclude for row in read_rows(source, **lenient)]


def _chosen(
    rows: StoredRows, given: StoredRows | None, banned: Sequence[Row], val_size: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the training rows, and of the held-out rows."""
    allowed = np.arange(len(rows))
    if banned:
        allowed = allowed[unlike(rows.tasks, task_digests(banned))]
        repeated = overlapping(rows.take(allowed), banned)
        allowed = np.delete(allowed, sorted(repeated))
    held = _hold_out(allowed, val_size, seed) if given is None else np.empty(0, np.int64)
    tasks = rows.take(held).tasks if given is None else given.tasks
    kept = allowed[unlike(rows.take(allowed).tasks, tasks)]
    if not len(kept):
        raise ValueError(
            f"all {len(rows)} training rows are also in data.exclude or in the validation rows; exclude less or train "
            f"on something else"
        )
    return kept, held


def load_instruction_sets(
    train: str | Sequence[str],
    val: str | Sequence[str] | None = None,
    *,
    template: str | Mapping[str, Any] | Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "cut",
    split_turns: bool = False,
    train_subset: str | Mapping[str, str] | None = None,
    val_subset: str | Mapping[str, str] | None = None,
    val_size: int = 0,
    exclude: Sequence[str] = (),
    strip_answers: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    prompts_only: bool = False,
    teachers: Coding | None = None,
) -> LoadedSets:
    """Read and tokenise instruction data.

    Args:
        train, val, train_subset, val_subset, val_size, exclude, strip_answers, columns, limit, seed: as for
            ``split_rows``.
        template: as for ``make_template``.
        tokenizer, max_length, max_prompt_length, overlong, split_turns, cache_dir, teachers: as for ``encode_rows``.
        prompts_only: encode only the prompts of training rows, which then need no response: the student answers.

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
        columns=columns,
        limit=limit,
        seed=seed,
        need_response=not prompts_only,
        cache_dir=cache_dir,
    )
    options: dict[str, Any] = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    options |= {"overlong": overlong, "split_turns": split_turns, "cache_dir": cache_dir, "teachers": teachers}
    if prompts_only:
        check_limits(tokenizer, max_length, max_prompt_length, overlong)
        if teachers is not None:
            check_limits(teachers.tokenizer, teachers.max_length, teachers.max_prompt_length, overlong)
        train_set = encode_prompt_rows(
            kept, written, tokenizer, max_prompt_length=max_prompt_length, cache_dir=cache_dir, teachers=teachers
        )
    else:
        train_set = encode_rows(kept, written, tokenizer, **options)
    val_set = encode_rows(val_rows, written, tokenizer, **options) if val_rows else None
    counts = {"train_rows": len(kept), "val_rows": len(val_rows), "excluded": excluded}
    counts |= _prefixed("train", train_set) | _prefixed("val", val_set)
    if prompts_only:
        _report_prompts(train_set, val_set, counts)
    else:
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
    columns: Mapping[str, str] | None = None,
    val_max_tokens: int | None = None,
    limit: int | None = None,
) -> LoadedSets:
    """Read and pack plain text.

    Args:
        train, train_subset, columns: sources, subsets and columns as for ``read_texts``.
        val: validation sources, or None.
        max_tokens, val_max_tokens: tokens to take from each, as for ``pack_texts``.
        limit: keep only the first ``limit`` documents of each (for debugging).
        tokenizer, block_length, cache_dir: as for ``pack_texts``.

    Raises:
        ValueError: as ``read_texts`` and ``pack_texts``.
    """
    texts = read_texts(train, subset=train_subset, columns=columns, limit=limit)
    train_set = pack_texts(texts, tokenizer, block_length, cache_dir, max_tokens)
    val_set = None
    if val is not None:
        val_texts = read_texts(val, columns=columns, limit=limit)
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


def _hold_out(places: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    if size and not 0 < size < len(places):
        raise ValueError(f"data.val_size = {size}; it must be from 0 to less than the {len(places)} training rows")
    chosen = np.random.Generator(np.random.PCG64([seed, 2])).permutation(len(places))[:size]
    return places[np.sort(chosen)]


def _report(train: EncodedSet, val: EncodedSet | None, counts: Mapping[str, int]) -> None:
    log.info(
        "instructions: %d examples with %d valid tokens to train on and %d to validate on; %d training rows were "
        "left out as tasks of validation rows or of data.exclude, %d were dropped as too long or without an answer; "
        "%d prompts and %d responses were cut",
        len(train),
        int(train.valid_tokens.sum()),
        0 if val is None else len(val),
        counts["excluded"],
        counts["train/dropped"],
        counts["train/cut_prompts"],
        counts["train/cut_responses"],
    )
    if counts["train/kept_borders"]:
        log.info(
            "in %d training examples the tokenizer merges the end of a prompt with the beginning of its answer; the "
            "merge is undone, so that the answer follows the prompt that generation sees; prompts that end with a line "
            "break, not with a space, merge less",
            counts["train/kept_borders"],
        )
    if counts["train/control_tokens"]:
        log.info(
            "%d training examples hold control tokens of the tokenizer in their data, such as EOS; they are read as "
            "text",
            counts["train/control_tokens"],
        )

    if train.other is not None:
        _report_alignment(train, counts["train/cut_others"])


def _report_alignment(train: EncodedSet, cut: int) -> None:
    assert train.other is not None
    assert train.aligned_fraction is not None
    log.info(
        "two tokenizers: %.2f %% of the student's %d valid tokens are aligned with the teachers' %d; %d rows were cut "
        "in the teachers' tokens (data.teacher_max_length)",
        100 * train.aligned_fraction,
        int(train.valid_tokens.sum()),
        int(train.other.valid_tokens.sum()),
        cut,
    )


def _report_prompts(train: EncodedSet, val: EncodedSet | None, counts: Mapping[str, int]) -> None:
    log.info(
        "instructions: %d prompts of %d to %d tokens for the student to answer, and %d examples to validate on; %d "
        "training rows were left out as tasks of validation rows or of data.exclude, %d prompts were cut",
        len(train),
        int(train.lengths.min()),
        int(train.lengths.max()),
        0 if val is None else len(val),
        counts["excluded"],
        counts["train/cut_prompts"],
    )
