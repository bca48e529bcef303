"""Tables of tokens: a data set's rows, tokenised once, kept on disk, and mapped into memory by every process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltakd.data.encoding.encode import Outcome, check_limits
from deltakd.data.encoding.encoded_set import Encoded, EncodedSet
from deltakd.data.encoding.examples import examples
from deltakd.data.encoding.image_reader import DIGEST_BYTES, processor_digest
from deltakd.data.encoding.images import SetImages, digest_rows, image_stamp, row_images
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.token_cache import fingerprint, tokenizer_fingerprint
from deltakd.data.encoding.two_tokenizers import Coding, TwoTokenizers
from deltakd.data.encoding.workers import in_order, usable_processes
from deltakd.data.sources.records import Problems
from deltakd.data.sources.rows import Row, RowError
from deltakd.data.sources.stored_rows import holds_images, rows_digest
from deltakd.io.arrays import Arrays, ArrayWriter, kept_arrays
from deltakd.io.progress import progress_bar
from deltakd.types import IGNORE_INDEX, UNALIGNED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Fewer rows than this take seconds to tokenise and need no progress bar.
LONG_TABLE = 20_000
#: Rows tokenised at once.
BATCH = 1_000
_DTYPES = {"input_ids": "<i4", "labels": "<i4", "lengths": "<i8", "row_ids": "<i8"}
#: Where rows hold images: ``SetImages.digest`` of each example, one after the other.
_IMAGE_DTYPES = {"image_digests": "u1"}
#: With two tokenizers.
_OTHER_DTYPES = {
    "spans": "<i4",
    "other_input_ids": "<i4",
    "other_labels": "<i4",
    "other_lengths": "<i8",
    "other_spans": "<i4",
}


def encode_rows(
    rows: Sequence[Row],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "cut",
    split_turns: bool = False,
    cache_dir: str | Path | None = None,
    teachers: Coding | None = None,
) -> EncodedSet:
    """Tokenise rows once per tokenizer; each response becomes a separate example with the row's id.

    Args:
        rows: the rows.
        template, tokenizer, max_length, max_prompt_length, overlong: as for ``encode_row``.
        split_turns: make an example of each answer of a conversation (``examples``).
        cache_dir: folder that keeps the tokens for later runs; None: they are only in a temporary place.
        teachers: how rows become tokens for teachers with a tokenizer of their own; None: they share the student's.

    Raises:
        ValueError: as ``encode_row`` (all rows that the template can't render are named together), or no row is left.
    """
    check_limits(tokenizer, max_length, max_prompt_length, overlong)
    if not len(rows):
        raise ValueError("there are no rows to tokenise")
    student = Coding(template, tokenizer, max_length, max_prompt_length, overlong)
    key = fingerprint("rows", rows_digest(rows), *student.identity, split_turns)
    encode, dtypes = student.encode, _DTYPES
    if teachers is not None:
        check_limits(teachers.tokenizer, teachers.max_length, teachers.max_prompt_length, overlong)
        key = fingerprint("two", key, teachers.identity)
        encode, dtypes = TwoTokenizers(student, teachers).encode, _DTYPES | _OTHER_DTYPES

    with_images = holds_images(rows)

    def tokenise(number: int) -> _Piece:
        some = rows[number * BATCH : (number + 1) * BATCH]
        return _piece(encode([example for row in some for example in examples(row, split_turns)]), with_images)

    def build(writer: ArrayWriter) -> None:
        _write(writer, tokenise, len(rows))

    if with_images and (split_turns or teachers is not None):
        raise ValueError(
            _text_alone("data.split_turns=true" if split_turns else "a teacher with a tokenizer of its own")
        )
    limits = (max_length, max_prompt_length)
    return _kept_set(rows, tokenizer, key, build, dtypes, limits, cache_dir, with_images)


def encode_prompt_rows(
    rows: Sequence[Row],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    cache_dir: str | Path | None = None,
    teachers: Coding | None = None,
) -> EncodedSet:
    """Tokenise prompts alone, for a student that answers them: no label is trained, and rows need no response.

    Args:
        rows: the rows; a conversation's prompt is everything before its last answer.
        template, tokenizer, max_prompt_length: as for ``encode_prompt``.
        cache_dir, teachers: as for ``encode_rows``.

    Raises:
        ValueError: as ``encode_prompts``.
    """
    if not len(rows):
        raise ValueError("there are no rows to tokenise")
    with_images = holds_images(rows)
    key = fingerprint("prompts", rows_digest(rows), tokenizer_fingerprint(tokenizer), repr(template), max_prompt_length)
    dtypes = _DTYPES
    if teachers is not None:
        key, dtypes = fingerprint("two", key, teachers.identity), _DTYPES | _OTHER_DTYPES
    student = Coding(template, tokenizer, max_prompt_length, max_prompt_length)

    def tokenise(number: int) -> _Piece:
        some = rows[number * BATCH : (number + 1) * BATCH]
        return _prompt_piece(some, student, teachers, with_images)

    def build(writer: ArrayWriter) -> None:
        _write(writer, tokenise, len(rows))

    if with_images and teachers is not None:
        raise ValueError(_text_alone("a teacher with a tokenizer of its own"))
    limits = (max_prompt_length, max_prompt_length)
    return _kept_set(rows, tokenizer, key, build, dtypes, limits, cache_dir, with_images)


def _text_alone(what: str) -> str:
    return f"rows hold images, and {what} works with text alone; give another, or take them out"


def _kept_set(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    build: Callable[[ArrayWriter], None],
    dtypes: Mapping[str, str],
    limits: tuple[int, int],
    cache_dir: str | Path | None,
    with_images: bool,
) -> EncodedSet:
    """Return the table with a key, made now or before; a table of rows with images depends on their files, too."""
    if not with_images:
        return _as_set(kept_arrays(f"tokens-{key}", cache_dir, dtypes, build, "tokens"), key, *limits)
    name = fingerprint("images", key, processor_digest(tokenizer), image_stamp(rows))
    table = kept_arrays(f"tokens-{name}", cache_dir, dict(dtypes) | _IMAGE_DTYPES, build, "tokens")
    encoded = _as_set(table, key, *limits)
    if not encoded.counts.get("images"):
        return encoded
    digests = table.arrays["image_digests"].reshape(-1, DIGEST_BYTES)
    images = SetImages(rows, encoded.row_ids, digests, tokenizer)
    # The same files elsewhere, or written anew, are the same rows.
    return replace(encoded, images=images, fingerprint=fingerprint("images", key, images.fingerprint))


def _prompt_piece(rows: Sequence[Row], student: Coding, teachers: Coding | None, with_images: bool) -> _Piece:
    try:
        prompts, cut = student.prompts(rows)
        kept = [_prompt(row.id, ids) for row, ids in zip(rows, prompts, strict=True)]
        counts = {"cut_prompts": cut}
        if teachers is not None:
            theirs, counts["cut_others"] = _teachers_prompts(rows, teachers)
            kept = [_with_other(one, _prompt(one.row_id, ids)) for one, ids in zip(kept, theirs, strict=True)]
    except ValueError as error:
        return _piece([Outcome(None, problem=RowError(str(error)))], with_images)
    kept = [replace(one, images=row_images(row, student.tokenizer)) for one, row in zip(kept, rows, strict=True)]
    piece = _piece([Outcome(one, len(one.input_ids), len(one.input_ids)) for one in kept], with_images)
    return piece._replace(counts=piece.counts | counts)


def _prompt(row_id: int, ids: list[int]) -> Encoded:
    return Encoded(ids, [IGNORE_INDEX] * len(ids), row_id)


def _with_other(own: Encoded, other: Encoded) -> Encoded:
    """Return a prompt with its tokens in the teachers' tokenizer; none lies in a span."""
    own_spans, other_spans = ([UNALIGNED] * len(row.input_ids) for row in (own, other))
    return replace(own, spans=own_spans, other=replace(other, spans=other_spans))


def _teachers_prompts(rows: Sequence[Row], teachers: Coding) -> tuple[list[list[int]], int]:
    try:
        return teachers.prompts(rows)
    except ValueError as error:
        raise ValueError(f"{error} (in the teachers' tokenizer and template, data.teacher_template)") from error


class _Piece(NamedTuple):
    """Part of the table, with counts of the rows left out.

    Args:
        arrays: as in the table.
        counts: as of an ``EncodedSet``.
        spans: the least and the most tokens of ``prompts``, and of whole rows (``totals``), before anything is cut.
        problems: errors in rows.
    """

    arrays: dict[str, NDArray[Any]]
    counts: dict[str, int]
    spans: dict[str, list[int]]
    problems: list[str]


def _piece(outcomes: Sequence[Outcome], with_images: bool) -> _Piece:
    kept = [outcome.encoded for outcome in outcomes if outcome.encoded is not None]
    arrays = _arrays(kept) | {"row_ids": np.array([one.row_id for one in kept], np.int64)}
    others = [one.other for one in kept if one.other is not None]
    arrays |= {f"other_{name}": values for name, values in _arrays(others).items()} if others else {}
    counts = {
        "rows": len(outcomes),
        "cut_prompts": sum(outcome.cut_prompt for outcome in outcomes),
        "cut_responses": sum(outcome.cut_response for outcome in outcomes),
        "dropped": len(outcomes) - len(kept),
        "kept_borders": sum(outcome.kept_border for outcome in outcomes),
        "control_tokens": sum(outcome.control_tokens for outcome in outcomes),
    } | ({"cut_others": sum(outcome.cut_other for outcome in outcomes)} if others else {})
    images = sum(one.images is not None for one in kept)
    if images:
        counts["images"] = images
    if with_images:
        arrays["image_digests"] = digest_rows([one.images for one in kept]).reshape(-1)
    lengths = {"prompts": [o.prompt_length for o in outcomes], "totals": [o.total_length for o in outcomes]}
    spans = {name: [min(these), max(these)] for name, these in lengths.items()}
    return _Piece(arrays, counts, spans, [str(o.problem) for o in outcomes if o.problem is not None])


def _arrays(rows: Sequence[Encoded]) -> dict[str, NDArray[Any]]:
    """Return the tokens of rows as in the table."""

    def flat(parts: Iterable[Sequence[int]]) -> NDArray[Any]:
        return np.fromiter(chain.from_iterable(parts), np.int32)

    arrays: dict[str, NDArray[Any]] = {
        "input_ids": flat(one.input_ids for one in rows),
        "labels": flat(one.labels for one in rows),
        "lengths": np.array([len(one.input_ids) for one in rows], np.int64),
    }
    aligned = [one.spans for one in rows if one.spans is not None]
    return arrays | ({"spans": flat(aligned)} if aligned else {})


def _write(writer: ArrayWriter, tokenise: Callable[[int], _Piece], rows: int) -> None:
    """Tokenise the batches, one per call, and write the table. Raise a ValueError if rows have errors."""
    counts: Counter[str] = Counter()
    spans: dict[str, list[int]] = {}
    problems = Problems("data")
    pieces = in_order(tokenise, -(-rows // BATCH), usable_processes() if rows >= LONG_TABLE else 1)
    with progress_bar("tokenising", rows, rows >= LONG_TABLE) as advance:
        for number, piece in enumerate(pieces):
            for name, values in piece.arrays.items():
                writer.append(name, values)
            counts.update(piece.counts)
            for name, span in piece.spans.items():
                both = [*span, *spans.get(name, ())]
                spans[name] = [min(both), max(both)]
            problems.messages += piece.problems
            advance(min((number + 1) * BATCH, rows))
    problems.raise_any()
    writer.meta |= {"counts": dict(counts), "spans": spans}


def _as_set(table: Arrays, key: str, max_length: int, max_prompt_length: int) -> EncodedSet:
    arrays, counts = table.arrays, table.meta["counts"]
    if not len(arrays["row_ids"]):
        raise ValueError(_nothing_left(table.meta, max_length, max_prompt_length))

    def made(prefix: str, counts: dict[str, int], key: str, other: EncodedSet | None) -> EncodedSet:
        return EncodedSet(
            arrays[f"{prefix}input_ids"],
            arrays[f"{prefix}labels"],
            np.concatenate([[0], np.cumsum(arrays[f"{prefix}lengths"])]),
            arrays["row_ids"],
            counts,
            key,
            arrays.get(f"{prefix}spans"),
            other,
        )

    other = made("other_", {}, fingerprint("other", key), None) if "other_lengths" in arrays else None
    return made("", dict(counts), key, other)


def _nothing_left(meta: dict[str, Any], max_length: int, max_prompt_length: int) -> str:
    prompts, totals = meta["spans"]["prompts"], meta["spans"]["totals"]
    return (
        f"all {meta['counts']['rows']} rows are longer than the limits, so nothing is left to train on: prompts have "
        f"{prompts[0]} to {prompts[1]} tokens (data.max_prompt_length = {max_prompt_length}), with response "
        f"{totals[0]} to {totals[1]} (data.max_length = {max_length}); raise these keys or set data.overlong=cut"
    )
