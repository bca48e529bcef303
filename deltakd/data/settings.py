"""Settings of the config group ``data`` (``conf/data/*.yaml``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, final

import numpy as np
from annotated_types import Ge
from transformers import PreTrainedTokenizerBase

from deltakd.data.batches.budget import check_budget
from deltakd.data.encoding.packing import pack_texts
from deltakd.data.encoding.preview import Preview
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.template_problems import template_problems
from deltakd.data.encoding.templates import make_template
from deltakd.data.encoding.token_table import encode_rows
from deltakd.data.encoding.two_tokenizers import Coding
from deltakd.data.load import LoadedSets, SplitRows, load_instruction_sets, load_text_sets, split_rows
from deltakd.data.load_stream import open_instruction_stream, open_text_stream, streamed_sets
from deltakd.data.sources.parsing import COLUMNS
from deltakd.data.sources.readers import read_rows, read_texts
from deltakd.data.sources.records import missing_sources
from deltakd.io.keys import Cache, Method, Resume, Seed, keys_with
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
        teacher_template: the same for teachers with a tokenizer of their own; None: as ``template`` (``chat``: each
            tokenizer's own chat template).
        max_length: maximum tokens of a row (prompt and response); for text, tokens per block.
        max_prompt_length: maximum tokens of a prompt.
        teacher_max_length: maximum tokens of a row for teachers with a tokenizer of their own; None: ``max_length``.
            Their prompts may have the same share of it as the student's.
        limit: keep only the first ``limit`` rows or documents of ``train`` and of ``val``.
        streaming: read ``train`` while training instead of indexing it first, for data of any size; see ``Passes``.
        shuffle_buffer: for a stream, rows (or documents) shuffled in memory; every process keeps a buffer.
        batch_size: rows per process and micro-batch; None: as many as ``max_tokens_per_batch`` allows.
        max_tokens_per_batch: positions per process and micro-batch (rows times longest row); None: use ``batch_size``.
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
    teacher_template: str | Mapping[str, str] | None = None
    max_length: Positive = 512
    max_prompt_length: Positive = 256
    teacher_max_length: Positive | None = None
    limit: Annotated[Positive | None, Cache.FREE] = None
    streaming: Annotated[bool, Cache.FREE] = False
    shuffle_buffer: Annotated[Positive, Cache.FREE] = 10_000
    batch_size: Annotated[Positive | None, Resume.UNFINISHED, Cache.FREE] = 8
    max_tokens_per_batch: Annotated[Positive | None, Resume.UNFINISHED, Cache.FREE] = None
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

    def teachers_coding(self, tokenizer: PreTrainedTokenizerBase) -> Coding:
        """Return how rows become tokens for teachers with a tokenizer of their own.

        Args:
            tokenizer: the teachers'.
        """
        longest = self.teacher_max_length or self.max_length
        return Coding(
            make_template(self.template if self.teacher_template is None else self.teacher_template, tokenizer),
            tokenizer,
            longest,
            max(1, self.max_prompt_length * longest // self.max_length),
            getattr(self, "overlong", "cut"),
        )

    def one_tokenizer_problems(self) -> list[str]:
        """Return a sentence for each setting for teachers with a tokenizer of their own, when there are none."""
        given = {"teacher_template": self.teacher_template, "teacher_max_length": self.teacher_max_length}
        return [
            f"data.{name} is {value!r}, but all models of this run share one tokenizer; leave it at null"
            for name, value in given.items()
            if value is not None
        ]

    def problems(self) -> list[str]:
        """Return the problems with ``data``, one sentence each."""
        found = self.own_problems()
        found += self._batch_problems()
        found += template_problems("data.template", self.template)
        if self.teacher_template is not None:
            found += template_problems("data.teacher_template", self.teacher_template)
        if not self.train:
            found.append("data.train is missing; give a file, a list of files or a hub data set: data.train=...")
        found += pattern_problems("data.strip_answers", self.strip_answers)
        if self.streaming:
            found += self._stream_problems()
        found += [
            f"data.columns has {name!r}, which is no name of ours; allowed: {', '.join(COLUMNS)}"
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


@final
@dataclass(frozen=True, kw_only=True)
class InstructionData(DataConfig):
    """Instruction rows.

    Args:
        train_subset: ``split.json#key``, the line numbers to keep.
        val_subset: the same for ``val``.
        val_size: rows to hold out of ``train`` if ``val`` is None.
        split_seed: draws the held-out rows, independently of the run's seed.
        exclude: sources whose tasks must not be trained on, such as test sets.
        overlong: ``cut`` or ``drop`` rows that are too long.
        split_turns: make each answer of a conversation a separate example, for chat templates that render earlier
            turns differently once later ones follow; the model then reads earlier turns as it would in use.
    """

    train_subset: str | None = None
    val_subset: str | None = None
    val_size: Annotated[int, Ge(0)] = 0
    split_seed: Seed = 0
    exclude: Sequence[str] = ()
    overlong: Literal["cut", "drop"] = "cut"
    split_turns: bool = False

    @property
    def validates(self) -> bool:
        """True if validation data is given, or held out of ``train``."""
        return bool(self.val) or self.val_size > 0

    def own_problems(self) -> list[str]:
        """Return a problem if prompts leave no room for a response."""
        found = []
        if self.max_prompt_length >= self.max_length:
            found.append(
                f"data.max_prompt_length is {self.max_prompt_length} and data.max_length {self.max_length}; "
                "the prompt must leave room for a response"
            )
        if self.streaming and self.val_size:
            found.append(
                f"data.val_size is {self.val_size}, but the rows of data.streaming=true are not counted, so none can "
                "be drawn from them; hold rows out in a separate file: data.val=... data.val_size=0"
            )
        if self.streaming and self.train_subset is not None:
            found.append(_no_subset())
        return found

    def sources(self) -> dict[str, Sources | None]:
        """Return the sources, including the excluded sets."""
        return {**super().sources(), "data.exclude": self.exclude}

    def load(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts_only: bool = False,
        teachers: PreTrainedTokenizerBase | None = None,
    ) -> LoadedSets:
        """Read, render and tokenise the rows."""
        template = self.make_template(tokenizer)
        coding = None if teachers is None else self.teachers_coding(teachers)
        if self.streaming:
            return self._open(template, tokenizer, coding)
        return load_instruction_sets(
            template=template,
            tokenizer=tokenizer,
            prompts_only=prompts_only,
            teachers=coding,
            **self._choice(),
            **self._limits(),
        )

    def _open(self, template: Template, tokenizer: PreTrainedTokenizerBase, teachers: Coding | None) -> LoadedSets:
        assert self.train is not None, "checked by problems()"
        options: dict[str, Any] = {"strip_answers": self.strip_answers, "columns": self.columns, "limit": self.limit}
        val_rows = [] if self.val is None else read_rows(self.val, subset=self.val_subset, **options)
        stream, first = open_instruction_stream(
            self.train,
            template=template,
            tokenizer=tokenizer,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            overlong=self.overlong,
            split_turns=self.split_turns,
            shuffle_buffer=self.shuffle_buffer,
            exclude=self.exclude,
            val_rows=val_rows,
            teachers=teachers,
            **options,
        )
        val = encode_rows(val_rows, template, tokenizer, teachers=teachers, **self._limits()) if val_rows else None
        return streamed_sets(stream, first, val, val_rows)

    def split(self) -> SplitRows:
        """Return training and validation rows, before any is cut or dropped for its length.

        Raises:
            ValueError: as ``split_rows``.
        """
        return split_rows(**self._choice(), cache_dir=self.cache_dir)

    def read(self, tokenizer: PreTrainedTokenizerBase) -> SplitRows:
        """Return the validation rows, and exactly those training rows that ``load`` turns into examples.

        Raises:
            ValueError: as ``load``.
        """
        split = self.split()
        encoded = encode_rows(split.train, self.make_template(tokenizer), tokenizer, **self._limits())
        return split._replace(train=split.train.take(np.isin(split.train.ids, encoded.row_ids)))

    def _choice(self) -> dict[str, Any]:
        return {
            "train": self.train,
            "val": self.val,
            "train_subset": self.train_subset,
            "val_subset": self.val_subset,
            "val_size": self.val_size,
            "exclude": self.exclude,
            "strip_answers": self.strip_answers,
            "columns": self.columns,
            "limit": self.limit,
            "seed": self.split_seed,
        }

    def _limits(self) -> dict[str, Any]:
        return {
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "overlong": self.overlong,
            "split_turns": self.split_turns,
            "cache_dir": self.cache_dir,
        }


@final
@dataclass(frozen=True, kw_only=True)
class TextData(DataConfig):
    """Plain text for pre-training, packed into blocks of ``max_length`` tokens.

    Args:
        train_subset: source (as written in ``train``) -> ``split.json#key``.
        max_tokens: training budget: tokens to take, spread over all of ``train``; None: all. Of a stream: tokens to
            train on in the whole run.
        val_max_tokens: the same for validation.
    """

    train_subset: Mapping[str, str] | None = None
    max_tokens: Positive | None = None
    val_max_tokens: Positive | None = None

    def own_problems(self) -> list[str]:
        """Return a problem if blocks are too short, or lines are chosen of what is not indexed."""
        found = [_no_subset()] if self.streaming and self.train_subset else []
        if self.max_length < 2:
            found.append(f"data.max_length is {self.max_length}; a block needs 2 tokens or more")
        return found

    def load(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts_only: bool = False,
        teachers: PreTrainedTokenizerBase | None = None,
    ) -> LoadedSets:
        """Read, tokenise and pack the documents.

        Raises:
            ValueError: teachers have a tokenizer of their own, whose blocks would begin and end elsewhere.
        """
        assert not prompts_only, "text has no prompts; checked with the config"
        if teachers is not None:
            raise ValueError(
                "the teachers have another tokenizer than the student, and data is plain text, whose blocks of "
                "data.max_length tokens would begin and end elsewhere in it; give data=instruction, or models that "
                "share one tokenizer"
            )
        assert self.train is not None, "checked by problems()"
        if self.streaming:
            return self._open(self.train, tokenizer)
        return load_text_sets(
            train=self.train,
            train_subset=self.train_subset,
            columns=self.columns,
            val=self.val,
            tokenizer=tokenizer,
            block_length=self.max_length,
            max_tokens=self.max_tokens,
            val_max_tokens=self.val_max_tokens,
            limit=self.limit,
            cache_dir=self.cache_dir,
        )

    def _open(self, train: Sources, tokenizer: PreTrainedTokenizerBase) -> LoadedSets:
        stream, first = open_text_stream(
            train,
            tokenizer=tokenizer,
            block_length=self.max_length,
            shuffle_buffer=self.shuffle_buffer,
            max_tokens=self.max_tokens,
            columns=self.columns,
            limit=self.limit,
        )
        val = None
        if self.val is not None:
            texts = read_texts(self.val, columns=self.columns, limit=self.limit)
            val = pack_texts(texts, tokenizer, self.max_length, self.cache_dir, self.val_max_tokens)
        return streamed_sets(stream, first, val)


def _no_subset() -> str:
    return (
        "data.train_subset names lines of an indexed file, and data.streaming=true indexes none; choose rows by "
        "data.train=FILE#field=value, or write those lines into a separate file"
    )
