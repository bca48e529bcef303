"""The group ``data`` of the config: what ``conf/data/*.yaml`` makes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, final

from annotated_types import Ge
from transformers import PreTrainedTokenizerBase

from deltakd.data.batches.budget import check_budget
from deltakd.data.encoding.encode import encode_rows
from deltakd.data.encoding.templates import Template, make_template
from deltakd.data.load import LoadedSets, SplitRows, load_instruction_sets, load_text_sets, split_rows
from deltakd.data.sources.records import missing_sources
from deltakd.io.keys import Cache, Resume, keys_with

Sources = str | Sequence[str]
Positive = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class DataConfig(ABC):
    """What both kinds of data have.

    Args:
        train: files or hub data sets.
        val: the same for validation, or None.
        sets: evaluation sets of instructions, name -> source, or a mapping with ``source``; raw models have them, too.
        template: ``alpaca``, ``chat``, or a mapping with_input / without_input / tail.
        max_length: tokens of a row (prompt and response), or of a block of text.
        max_prompt_length: tokens of a prompt.
        limit: first so many training rows or documents.
        batch_size: rows per process and micro-batch; None: as many as ``max_tokens_per_batch`` allows.
        max_tokens_per_batch: positions per process and micro-batch (rows times longest row); None: by rows.
        cache_dir: where tokenised sets are kept; None: nowhere.
        prepare: makes the files first, if they are not there.
        strip_answers: a regular expression; what it matches is taken out of answers, those of evaluation sets too.
    """

    train: Sources | None
    val: Sources | None = None
    sets: Annotated[Mapping[str, Any], Resume.UNFINISHED, Cache.FREE] = field(default_factory=dict)
    template: str | Mapping[str, str] = "alpaca"
    max_length: Positive = 512
    max_prompt_length: Positive = 256
    limit: Annotated[Positive | None, Cache.FREE] = None
    batch_size: Annotated[Positive | None, Resume.UNFINISHED, Cache.FREE] = 8
    max_tokens_per_batch: Annotated[Positive | None, Resume.UNFINISHED, Cache.FREE] = None
    cache_dir: Annotated[str | None, Cache.FREE] = None
    prepare: Annotated[Callable[[], Any] | None, Cache.FREE] = None
    strip_answers: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What of these settings decides which rows there are, and their tokens; a cache of references keeps it."""
        free = set(keys_with(type(self), Cache.FREE))
        return {"kind": type(self).__name__} | {
            one.name: getattr(self, one.name) for one in fields(self) if one.name not in free
        }

    @property
    def full_rows(self) -> int:
        """Rows of ``max_length`` tokens that a micro-batch has room for; at least 1."""
        if self.batch_size is not None:
            return self.batch_size
        assert self.max_tokens_per_batch is not None, "neither batch_size nor max_tokens_per_batch"
        return max(1, self.max_tokens_per_batch // self.max_length)

    @property
    def positions(self) -> int:
        """The most positions of a micro-batch, padding included."""
        if self.batch_size is not None:
            return self.batch_size * self.max_length
        assert self.max_tokens_per_batch is not None, "neither batch_size nor max_tokens_per_batch"
        return self.max_tokens_per_batch

    @property
    def validates(self) -> bool:
        """Whether there will be validation data."""
        return bool(self.val)

    def make_files(self) -> None:
        """Make the files of the data, where the config says how and they are not there."""
        if self.prepare is not None:
            self.prepare()

    @abstractmethod
    def load(self, tokenizer: PreTrainedTokenizerBase) -> LoadedSets:
        """Read and tokenise."""

    def check_lengths(self, sets: LoadedSets) -> None:
        """Refuse rows that do not fit into the budget of a micro-batch.

        Raises:
            ValueError: naming the budget, the longest row and its length.
        """
        if self.max_tokens_per_batch is not None:
            check_budget(sets.train.lengths, self.max_tokens_per_batch)
            if sets.val is not None:
                check_budget(sets.val.lengths, self.max_tokens_per_batch, "validation")

    def make_template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The template of training and evaluation."""
        return make_template(self.template, tokenizer)

    def problems(self) -> list[str]:
        """What is wrong with ``data``, one sentence each."""
        found = self.own_problems()
        found += self._batch_problems()
        if not self.train:
            found.append("data.train is missing; give a file, a list of files or a hub data set: data.train=...")
        if self.strip_answers is not None:
            try:
                re.compile(self.strip_answers)
            except re.error as error:
                found.append(f"data.strip_answers is {self.strip_answers!r}, which is no regular expression: {error}")
        if self.prepare is None:
            found += missing_sources(self.sources())
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
        """The problems of this kind alone."""

    def sources(self) -> dict[str, Sources | None]:
        """Config key -> sources that have to be there before anything is loaded."""
        return {"data.train": self.train, "data.val": self.val}


@final
@dataclass(frozen=True, kw_only=True)
class InstructionData(DataConfig):
    """Instruction rows.

    Args:
        train_subset: ``split.json#key``: the line numbers to keep.
        val_subset: as ``train_subset``.
        val_size: rows to hold out of ``train`` where ``val`` is None; drawn by ``split_seed``, not by the run's seed.
        split_seed: draws the held-out rows.
        exclude: sources whose instructions must not be trained on (test sets).
        overlong: ``cut`` or ``drop`` rows that are too long.
    """

    train_subset: str | None = None
    val_subset: str | None = None
    val_size: Annotated[int, Ge(0)] = 0
    split_seed: Annotated[int, Ge(0)] = 0
    exclude: Sequence[str] = ()
    overlong: Literal["cut", "drop"] = "cut"

    @property
    def validates(self) -> bool:
        """Whether there will be validation data: given, or held out of ``train``."""
        return bool(self.val) or self.val_size > 0

    def own_problems(self) -> list[str]:
        """Lengths and what to do with rows beyond them."""
        found = []
        if self.max_prompt_length >= self.max_length:
            found.append(
                f"data.max_prompt_length is {self.max_prompt_length} and data.max_length {self.max_length}; "
                "the prompt must leave room for a response"
            )
        return found

    def sources(self) -> dict[str, Sources | None]:
        """The excluded sets have to be there, too."""
        return {**super().sources(), "data.exclude": self.exclude}

    def load(self, tokenizer: PreTrainedTokenizerBase) -> LoadedSets:
        """Read, render and tokenise."""
        template = self.make_template(tokenizer)
        return load_instruction_sets(template=template, tokenizer=tokenizer, **self._choice(), **self._limits())

    def split(self) -> SplitRows:
        """The rows to train and to validate on, before any is cut or dropped for its length.

        Raises:
            ValueError: what reading raises.
        """
        return split_rows(**self._choice())

    def read(self, tokenizer: PreTrainedTokenizerBase) -> SplitRows:
        """The rows themselves: exactly those that ``load`` gives an example of to train on, and those to validate on.

        Raises:
            ValueError: as ``load``.
        """
        split = self.split()
        encoded = encode_rows(split.train, self.make_template(tokenizer), tokenizer, **self._limits())
        trained = set(encoded.row_ids.tolist())
        return split._replace(train=[row for row in split.train if row.id in trained])

    def _choice(self) -> dict[str, Any]:
        return {
            "train": self.train,
            "val": self.val,
            "train_subset": self.train_subset,
            "val_subset": self.val_subset,
            "val_size": self.val_size,
            "exclude": self.exclude,
            "strip_answers": self.strip_answers,
            "limit": self.limit,
            "seed": self.split_seed,
        }

    def _limits(self) -> dict[str, Any]:
        return {
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "overlong": self.overlong,
            "cache_dir": self.cache_dir,
        }


@final
@dataclass(frozen=True, kw_only=True)
class TextData(DataConfig):
    """Plain text for pre-training, packed into blocks of ``max_length`` tokens.

    Args:
        train_subset: source (as written in ``train``) -> ``split.json#key``.
        max_tokens: the training budget: tokens taken from ``train``, spread over it; None: all.
        val_max_tokens: the same for validation.
    """

    train_subset: Mapping[str, str] | None = None
    max_tokens: Positive | None = None
    val_max_tokens: Positive | None = None

    def own_problems(self) -> list[str]:
        """The length of a block."""
        return [] if self.max_length >= 2 else [f"data.max_length is {self.max_length}; a block needs 2 tokens or more"]

    def load(self, tokenizer: PreTrainedTokenizerBase) -> LoadedSets:
        """Read, tokenise and pack."""
        assert self.train is not None, "checked by problems()"
        return load_text_sets(
            train=self.train,
            train_subset=self.train_subset,
            val=self.val,
            tokenizer=tokenizer,
            block_length=self.max_length,
            max_tokens=self.max_tokens,
            val_max_tokens=self.val_max_tokens,
            limit=self.limit,
            cache_dir=self.cache_dir,
        )
