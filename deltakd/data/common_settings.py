"""Settings shared by both kinds of data in the config group ``data``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from annotated_types import Ge
from transformers import PreTrainedTokenizerBase

from deltakd.data.batches.budget import check_budget
from deltakd.data.encoding.preview import Preview
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.template_problems import template_problems
from deltakd.data.encoding.templates import make_template
from deltakd.data.encoding.two_tokenizers import Coding
from deltakd.data.load import LoadedSets
from deltakd.data.sources.parsing import COLUMNS
from deltakd.data.sources.records import missing_sources
from deltakd.io.keys import Cache, Method, Resume, keys_with
from deltakd.io.patterns import pattern_problems

Sources = str | Sequence[str]
Positive = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class DataConfig(ABC):
    """Settings shared by both kinds of data.

    Args:
        train: files or hub data sets.
        val: the same for validation, or None.
        sets: instruction sets for evaluation: name -> source, or a mapping with ``source``. Pre-training runs
            (``TextData``) may have them, too.
        template: ``alpaca``, ``chat``, or a mapping with_input / without_input / tail.
        max_length: maximum tokens of a row (prompt and response); for text, tokens per block.
        max_prompt_length: maximum tokens of a prompt.
        limit: keep only the first ``limit`` rows or documents of ``train`` and of ``val``.
        streaming: read ``train`` while training instead of indexing it first, for data of any size; see ``Passes``.
        shuffle_buffer: for a stream, rows (or documents) shuffled in memory; every process keeps a buffer.
        batch_size: rows per process and micro-batch; None: as many as ``max_tokens_per_batch`` allows.
        max_tokens_per_batch: positions per process and micro-batch (rows times longest row); None: use ``batch_size``.
        packing: lay the rows of a micro-batch end to end, so that models compute no padding; attention stays within
            each row.
        cache_dir: folder that keeps rows, tokens and overlaps for later runs, keyed by the content of the sources.
            It may be deleted at any time. None: keep nothing.
        prepare: called first, to create the files if they are missing.
        strip_answers: a regular expression; matches are removed from all answers, including those of evaluation sets.
        columns: our name of a column -> its name in ``train`` and ``val``. Evaluation sets and ``exclude`` may use
            other names: there, it applies only to records without our name.
        preview: how the log shows the first training row: ``text``, ``ids`` (each token with its id), or ``none``.
    """

    train: Sources | None
    val: Sources | None = None
    sets: Annotated[Mapping[str, Any], Resume.UNFINISHED, Cache.FREE, Method.FREE] = field(default_factory=dict)
    template: str | Mapping[str, str] = "alpaca"
    max_length: Positive = 512
    max_prompt_length: Positive = 256
    limit: Annotated[Positive | None, Cache.FREE] = None
    streaming: Annotated[bool, Cache.FREE] = False
    shuffle_buffer: Annotated[Positive, Cache.FREE] = 10_000
    batch_size: Annotated[Positive | None, Resume.UNFINISHED, Cache.FREE] = 8
    max_tokens_per_batch: Annotated[Positive | None, Resume.UNFINISHED, Cache.FREE] = None
    packing: Annotated[bool, Cache.FREE] = False
    cache_dir: Annotated[str | None, Cache.FREE, Method.FREE] = None
    prepare: Annotated[Callable[[], Any] | None, Cache.FREE] = None
    strip_answers: str | None = None
    columns: Mapping[str, str] | None = None
    preview: Annotated[Preview, Resume.FREE, Cache.FREE] = "text"

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that determine the rows and their tokens; a cache of references stores them."""
        free = set(keys_with(type(self), Cache.FREE))
        return {"kind": type(self).__name__} | {
            one.name: getattr(self, one.name) for one in fields(self) if one.name not in free
        }

    @property
    def full_rows(self) -> int:
        """Number of rows of ``max_length`` tokens that fit in a micro-batch; at least 1."""
        if self.batch_size is not None:
            return self.batch_size
        assert self.max_tokens_per_batch is not None, "neither batch_size nor max_tokens_per_batch"
        return max(1, self.max_tokens_per_batch // self.max_length)

    @property
    def positions(self) -> int:
        """Maximum positions in a micro-batch, padding included."""
        if self.batch_size is not None:
            return self.batch_size * self.max_length
        assert self.max_tokens_per_batch is not None, "neither batch_size nor max_tokens_per_batch"
        return self.max_tokens_per_batch

    @property
    def validates(self) -> bool:
        """True if there will be validation data."""
        return bool(self.val)

    def make_files(self) -> None:
        """Create the data's files if they are missing and the config says how."""
        if self.prepare is not None:
            self.prepare()

    @abstractmethod
    def load(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts_only: bool = False,
        teachers: PreTrainedTokenizerBase | None = None,
    ) -> LoadedSets:
        """Read and tokenise the data.

        Args:
            tokenizer: the student's.
            prompts_only: encode only the prompts of training rows: the student answers them.
            teachers: the teachers' tokenizer, if they have one of their own: rows are then encoded in both and aligned.
        """

    def check_lengths(self, sets: LoadedSets) -> None:
        """Raise a ValueError if a row does not fit the budget of a micro-batch; see ``check_budget``."""
        if self.max_tokens_per_batch is not None:
            check_budget(sets.train.lengths, self.max_tokens_per_batch)
            if sets.val is not None:
                check_budget(sets.val.lengths, self.max_tokens_per_batch, "validation")

    def make_template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """Return the template for training and evaluation."""
        return make_template(self.template, tokenizer)

    @property
    def teachers_length(self) -> int:
        """Maximum tokens of a row for teachers with a tokenizer of their own."""
        return self.max_length

    @abstractmethod
    def teachers_coding(self, tokenizer: PreTrainedTokenizerBase) -> Coding:
        """Return how rows become tokens for teachers with a tokenizer of their own.

        Args:
            tokenizer: the teachers'.

        Raises:
            ValueError: this kind of data can't be aligned between two tokenizers.
        """

    def one_tokenizer_problems(self) -> list[str]:
        """Return a sentence for each setting for teachers with a tokenizer of their own, when there are none."""
        return []

    def two_tokenizers_problems(self) -> list[str]:
        """Return a sentence if this kind of data can't be aligned between two tokenizers."""
        return []

    def problems(self) -> list[str]:
        """Return the problems with ``data``, one sentence each."""
        found = self.own_problems()
        found += self._batch_problems()
        found += template_problems("data.template", self.template)
        if not self.train:
            found.append("data.train is missing; give a file, a list of files or a hub data set: data.train=...")
        found += pattern_problems("data.strip_answers", self.strip_answers)
        if self.streaming:
            found += self._stream_problems()
        found += [
            f"data.columns has {name!r}, which is not a key of ours; allowed: {', '.join(COLUMNS)}"
            for name in self.columns or ()
            if name not in COLUMNS
        ]
        if self.prepare is None:
            found += missing_sources(self.sources())
        return found

    def _stream_problems(self) -> list[str]:
        """Return the problems with settings that a stream does not support."""
        found = []
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < self.max_length:
            found.append(
                f"data.max_tokens_per_batch is {self.max_tokens_per_batch}, but a row may have data.max_length="
                f"{self.max_length} tokens, and data.streaming=true can't look at all rows first; give "
                f"{self.max_length} or more"
            )
        return found

    def _batch_problems(self) -> list[str]:
        sizes = {"batch_size": self.batch_size, "max_tokens_per_batch": self.max_tokens_per_batch}
        given = {name: value for name, value in sizes.items() if value is not None}
        if len(given) != 1:
            how = "are both given" if given else "are both null"
            return [
                f"data.batch_size and data.max_tokens_per_batch {how}; give one of them: data.batch_size=8, or "
                "data.batch_size=null data.max_tokens_per_batch=4096"
            ]
        return []

    @abstractmethod
    def own_problems(self) -> list[str]:
        """Return the problems specific to this kind of data."""

    def sources(self) -> dict[str, Sources | None]:
        """Return config key -> sources that must exist before anything is loaded."""
        return {"data.train": self.train, "data.val": self.val}
