"""A teacher in files: its top-k log-probs, which somebody else made, matched with a run's rows by their tokens."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, EncodedSet, InstructionData, LoadedSets
from deltakd.data.sources.records import Problems, Record, iter_records, parse_source, source_files
from deltakd.io.arrays import ArrayWriter, kept_arrays
from deltakd.kernels import Buckets
from deltakd.references.content import named_sets
from deltakd.references.distillkit import Compression
from deltakd.references.index import row_key
from deltakd.references.log_prob_formats import Positions, needs_compression, positions_of, tokens_of
from deltakd.references.outside import (
    LEAST_REST,
    SLACK,
    NoLogProbsError,
    kept_log_probs,
    rows_of,
    stacked,
    with_rest,
)
from deltakd.types import IGNORE_INDEX, TEACHER, Batch

log = logging.getLogger(__name__)

_DTYPES = {"ids": "<i4", "values": "<f4", "counts": "<i4"}
#: Labels whose places are checked against the tokens of their positions.
_CHECKED_LABELS = 100_000
#: Standard deviations by which labels must fit a neighbouring position better to say that positions are shifted.
_SIGNIFICANT = 3.0


@final
class LogProbFiles:
    """The teacher's log-probs of rows' tokens, read from files.

    Args:
        sources: as of ``data.train``.
        data: the group ``data``; rows without token ids are read and tokenised as it says.
        tokenizer: the student's.
        vocabulary: V.
        sets: the rows that need log-probs.
        k: tokens to keep at each position; None: all that the files have.

    Raises:
        ValueError: names the records that can't be used, or the rows without log-probs.
    """

    def __init__(
        self,
        sources: str | Sequence[str],
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        sets: LoadedSets,
        k: int | None,
    ) -> None:
        self._sources = [sources] if isinstance(sources, str) else list(sources)
        self._data, self._tokenizer, self._vocabulary = data, tokenizer, vocabulary
        self._rows: dict[bytes, int] = {}
        #: Of each row in the files: its first position among all, and the place of the token that this one predicts.
        self._starts: list[int] = [0]
        self._firsts: list[int] = []
        self._encoded: EncodedSet | None = None
        self._next = 0
        arrays = kept_arrays("log-probs", None, _DTYPES, self._read, "the log-probs").arrays
        self._ids, self._values, self._counts = (arrays[name] for name in _DTYPES)
        self._bounds = np.concatenate([[0], np.cumsum(self._counts, dtype=np.int64)])
        self._k = self._check(sets, k)

    @property
    def k(self) -> int:
        """Tokens kept at each position."""
        return self._k

    @property
    def identities(self) -> dict[str, dict[str, Any]]:
        """Return role -> what the cache's manifest says about its model."""
        digest = hashlib.sha256()
        for array in (self._ids, self._values, self._counts):
            digest.update(array.tobytes())
        unknown = dict.fromkeys(("dtype", "quantization", "sha256", "commit"))
        return {TEACHER: {"path": ", ".join(self._sources), "elsewhere": digest.hexdigest(), **unknown}}

    def buckets(self, batch: Batch) -> Buckets:
        """Return the log-probs of each label, of the k − 1 most probable other tokens, and of the rest."""
        found = []
        for number, row, places in zip(batch.row_ids.tolist(), *rows_of(batch), strict=True):
            slot = self._rows[row_key(np.array(row))] if places else -1
            for place in places:
                try:
                    given = self._with_label(self._at(slot, place), row[place])
                    found.append(kept_log_probs(given, row[place], self._k, self._vocabulary))
                except NoLogProbsError as error:
                    raise ValueError(f"reference.log_probs, row {number}, token {place}: {error}") from None
        support_NK, log_probs_NK = stacked(found, self._k)
        return Buckets(support_NK, {TEACHER: with_rest(log_probs_NK, self._vocabulary)}, 1.0)

    def _at(self, slot: int, place: int) -> dict[int, float]:
        """Return token id -> log-prob of the position that predicts a row's token."""
        position = self._starts[slot] + place - self._firsts[slot]
        part = slice(*self._bounds[position : position + 2])
        found = dict(zip(self._ids[part].tolist(), self._values[part].tolist(), strict=True))
        if len(found) < self._counts[position]:
            raise NoLogProbsError("a token occurs twice")
        return found

    def _with_label(self, found: dict[int, float], label: int) -> dict[int, float]:
        """Give a label that is not among the tokens its share of the rest, as if all others were equally probable."""
        others = self._vocabulary - len(found)
        if label in found or others < 1:
            return found
        rest = max(1.0 - sum(map(math.exp, found.values())), LEAST_REST)
        return found | {label: math.log(rest / others)}

    def _read(self, writer: ArrayWriter) -> None:
        """Write all positions to disk, and note where each row's are."""
        for entry in self._sources:
            problems = Problems(f"reference.log_probs: {entry}")
            for number, record, compression in self._records(entry, problems):
                with problems.noting(ValueError):
                    self._add(writer, number, record, compression)
            problems.raise_any()

    def _records(self, entry: str, problems: Problems) -> Iterator[tuple[int, Record, Compression | None]]:
        """Yield each record with its number over all sources; DistillKit's compression is read once."""
        source = parse_source(entry, self._data.columns, need_columns=False)
        first = self._next
        compression = None
        for record in iter_records(source, problems):
            self._next = first + record.number + 1
            if source.filter is not None and source.value_of(record, source.filter[0]) != source.filter[1]:
                continue
            if compression is None and needs_compression(record.value):
                compression = Compression.read(source_files(source.location)[0].parent)
            yield first + record.number, record, compression

    def _add(self, writer: ArrayWriter, number: int, record: Record, compression: Compression | None) -> None:
        """Check a record, and write its positions.

        Raises:
            ValueError: begins with its place.
        """
        try:
            positions = positions_of(record.value, compression)
            tokens = tokens_of(record.value)
            if tokens is None:
                tokens = self._tokenised(number)
            if tokens is None:
                return
            first = 1 if positions.predicts_next else len(tokens) - len(positions.counts)
            if first < 0 or first + len(positions.counts) > len(tokens) + positions.predicts_next:
                raise ValueError(
                    f"{len(positions.counts)} positions have log-probs, and the row has {len(tokens)} tokens; the "
                    "template (data.template), the tokenizer or data.max_length differ from those that they were made "
                    "with"
                )
            check_positions(positions, self._vocabulary)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from None
        self._rows.setdefault(row_key(np.array(tokens)), len(self._firsts))
        self._firsts.append(first)
        self._starts.append(self._starts[-1] + len(positions.counts))
        writer.append("ids", positions.ids)
        writer.append("values", np.minimum(positions.values, 0))
        writer.append("counts", positions.counts)

    def _tokenised(self, number: int) -> list[int] | None:
        """Return the tokens of a record as the run sees it; None if the run drops it.

        Raises:
            ValueError: it is not one row.
        """
        if not isinstance(self._data, InstructionData):
            raise ValueError("the record has no input_ids, by which it is matched with blocks of text")
        if self._encoded is None:
            self._encoded = self._data.encode(self._sources, self._tokenizer)
        # Rows come in the order of their records.
        first, stop = np.searchsorted(self._encoded.row_ids, [number, number + 1]).tolist()
        if stop - first > 1:
            raise ValueError(
                f"the record becomes {stop - first} rows of its own (several answers, or data.split_turns), and has "
                "one list of log-probs"
            )
        return self._encoded[first].input_ids if stop > first else None

    def _check(self, sets: LoadedSets, k: int | None) -> int:
        """Compare with the rows that are trained on; return K.

        Raises:
            ValueError: rows have no log-probs, or too few positions or tokens; or positions are shifted.
        """
        problems: list[str] = []
        sizes: list[NDArray[np.int32]] = []
        hits = _Hits()
        for name, encoded in named_sets(sets).items():
            missing, short = [], []
            for row in np.flatnonzero(encoded.valid_tokens > 0).tolist():
                one = encoded[row]
                slot = self._rows.get(row_key(np.array(one.input_ids)))
                if slot is None:
                    missing.append(one.row_id)
                    continue
                places = np.flatnonzero(np.array(one.labels[1:]) != IGNORE_INDEX) + 1
                counts, inside = self._counts_at(slot, places)
                if not inside.all() or not counts.all():
                    short.append(one.row_id)
                    continue
                sizes.append(counts)
                self._count_hits(hits, slot, places, one.input_ids)
            problems += _rows_problems(name, len(encoded), missing, short)
        problems += hits.problems()
        if problems:
            raise ValueError("; ".join(f"reference.log_probs: {problem}" for problem in problems))
        least, most = (int(of([counts.min() if of is min else counts.max() for counts in sizes])) for of in (min, max))
        chosen = _chosen_k(k, least, most, self._vocabulary)
        log.info(
            "reference.log_probs: %d rows; %d tokens a position are kept; %.2f %% of the labels are not among them and "
            "get an equal share of the rest.",
            len(self._firsts),
            chosen,
            100 * (1 - hits.here / max(1, hits.labels)),
        )
        self._warn_of_no_rest()
        return chosen

    def _counts_at(self, slot: int, places: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return how many tokens the positions of a row's tokens have, and which of them exist."""
        offsets = places - self._firsts[slot]
        start, stop = self._starts[slot], self._starts[slot + 1]
        inside = (offsets >= 0) & (offsets < stop - start)
        return self._counts[start + offsets[inside]], inside

    def _count_hits(self, hits: _Hits, slot: int, places: NDArray[np.int64], tokens: Sequence[int]) -> None:
        """Count the labels that are among the tokens of their position, of the one before, and of the one after."""
        if hits.labels >= _CHECKED_LABELS:
            return
        start, stop = self._starts[slot], self._starts[slot + 1]
        for place in places.tolist():
            position = start + place - self._firsts[slot]
            there = [
                start <= one < stop and tokens[place] in self._ids[self._bounds[one] : self._bounds[one + 1]]
                for one in (position - 1, position, position + 1)
            ]
            hits.add(*there)

    def _warn_of_no_rest(self) -> None:
        """Warn if the tokens of every position have the whole mass: they were normalised, and the rest is lost."""
        filled = np.flatnonzero(self._counts)
        masses = np.add.reduceat(np.exp(self._values[:].astype(np.float64)), self._bounds[filled])
        if len(masses) and self._k_is_part and float(np.median(masses)) > 1 - 1e-5:
            log.warning(
                "reference.log_probs: a position's tokens add up to 1, as if they were normalised; the rest of the "
                "vocabulary then has no mass, and the student learns to give it none."
            )

    @property
    def _k_is_part(self) -> bool:
        return int(self._counts.max(initial=0)) < self._vocabulary


class _Hits:
    """How many labels are among the tokens of their position, and of its neighbours."""

    def __init__(self) -> None:
        self.labels = self.before = self.here = self.after = 0

    def add(self, before: bool, here: bool, after: bool) -> None:
        """Count a label."""
        self.labels += 1
        self.before += before
        self.here += here
        self.after += after

    def problems(self) -> list[str]:
        """Return a sentence if a neighbouring position fits the labels better."""
        count, where = max((self.before, "the position before"), (self.after, "the position after"))
        if count - self.here <= _SIGNIFICANT * math.sqrt(count + self.here):
            return []
        return [
            f"the positions are shifted: of {self.labels} labels {self.here} are among the tokens of their own "
            f"position, and {count} among those of {where}"
        ]


def check_positions(positions: Positions, vocabulary: int) -> None:
    """Raise a ValueError, with the position, if numbers can't be log-probs of token ids below ``vocabulary``."""
    place = np.repeat(np.arange(len(positions.counts)), positions.counts)
    beyond = np.flatnonzero((positions.ids < 0) | (positions.ids >= vocabulary))
    if len(beyond):
        at = beyond[0]
        raise ValueError(
            f"position {place[at]}: token {positions.ids[at]} is beyond the tokenizer's {vocabulary} tokens"
        )
    wrong = np.flatnonzero(~(positions.values <= SLACK))
    if len(wrong):
        at = wrong[0]
        raise ValueError(f"position {place[at]}: a log-prob is above 0 or not a number: {positions.values[at]:g}")
    masses = np.bincount(place, np.exp(positions.values.astype(np.float64)), minlength=len(positions.counts))
    heavy = np.flatnonzero(masses > 1 + SLACK)
    if len(heavy):
        raise ValueError(f"position {heavy[0]}: the probabilities add up to {masses[heavy[0]]:.4f}")


def _rows_problems(name: str, rows: int, missing: Sequence[int], short: Sequence[int]) -> list[str]:
    found = []
    if missing:
        found.append(
            f"{len(missing)} of {rows} rows of data.{name} (rows {_listed(missing)}) have no log-probs: no record has "
            "their tokens; the tokenizer, data.template and data.max_length must be those that they were made with"
        )
    if short:
        found.append(
            f"{len(short)} of {rows} rows of data.{name} (rows {_listed(short)}) have fewer positions with log-probs "
            "than tokens to train on"
        )
    return found


def _listed(rows: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, rows[:most])) + (", ..." if len(rows) > most else "")


def _chosen_k(k: int | None, least: int, most: int, vocabulary: int) -> int:
    """Return K, if all positions have as many tokens."""
    if k is not None and min(k, vocabulary) > least:
        raise ValueError(
            f"reference.k is {k}, and positions of reference.log_probs have {least} to {most} tokens; give "
            f"reference.k={least}, or fewer"
        )
    if k is None and least != most:
        raise ValueError(
            f"k varies: positions of reference.log_probs have {least} to {most} tokens; give reference.k={least}, or "
            "fewer"
        )
    if least < 2:
        raise ValueError("positions of reference.log_probs have one token, and at least 2 are needed")
    return least if k is None else min(k, vocabulary)
