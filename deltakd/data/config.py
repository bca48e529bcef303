"""The data group of the config as typed objects: what ``conf/data/*.yaml`` makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from deltakd.data.build import LoadedSets, load_instruction_sets, load_text_sets
from deltakd.data.sources import missing_sources
from deltakd.data.templates import Template, make_template

Sources = str | Sequence[str]


@final
@dataclass(frozen=True)
class InstructionData:
    """Instruction rows.

    Args:
        train: files or hub data sets.
        train_subset: ``split.json#key``: the line numbers to keep.
        val: rows for validation; None: ``val_size`` rows are held out of ``train``.
        val_subset: as ``train_subset``.
        val_size: rows to hold out where ``val`` is None; drawn by ``split_seed``, not by the run's seed.
        split_seed: draws the held-out rows.
        exclude: sources whose instructions must not be trained on (test sets).
        sets: evaluation sets, name -> source.
        template: ``alpaca``, ``chat``, or a mapping with_input / without_input / tail.
        max_length: tokens of prompt and response together.
        max_prompt_length: tokens of the prompt.
        overlong: ``cut`` or ``drop`` rows that are too long.
        limit: first so many training rows.
        batch_size: rows per process and micro-batch.
        cache_dir: where tokenised sets are kept; None: nowhere.
        prepare: makes the files first, if they are not there.
    """

    train: Sources
    train_subset: str | None = None
    val: Sources | None = None
    val_subset: str | None = None
    val_size: int = 0
    split_seed: int = 0
    exclude: Sequence[str] = ()
    sets: Mapping[str, str] = field(default_factory=dict)
    template: str | Mapping[str, str] = "alpaca"
    max_length: int = 512
    max_prompt_length: int = 256
    overlong: str = "cut"
    limit: int | None = None
    batch_size: int = 8
    cache_dir: str | None = None
    prepare: Callable[[], Any] | None = None

    def problems(self) -> list[str]:
        """What is wrong with ``data``, one sentence each."""
        found = _shared_problems(self.batch_size, self.train)
        if self.max_prompt_length >= self.max_length:
            found.append(
                f"data.max_prompt_length is {self.max_prompt_length} and data.max_length {self.max_length}; "
                "the prompt must leave room for a response"
            )
        if self.overlong not in ("cut", "drop"):
            found.append(f"data.overlong is {self.overlong!r}; allowed: cut, drop")
        if self.prepare is None:
            found += missing_sources({"data.train": self.train, "data.val": self.val, "data.exclude": self.exclude})
        return found

    def make_template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The template of training and evaluation."""
        return make_template(self.template, tokenizer)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> LoadedSets:
        """Read, render and tokenise."""
        return load_instruction_sets(
            train=self.train,
            val=self.val,
            train_subset=self.train_subset,
            val_subset=self.val_subset,
            val_size=self.val_size,
            exclude=self.exclude,
            template=self.make_template(tokenizer),
            tokenizer=tokenizer,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            overlong=self.overlong,
            limit=self.limit,
            cache_dir=self.cache_dir,
            seed=self.split_seed,
        )


@final
@dataclass(frozen=True)
class TextData:
    """Plain text for pre-training, packed into blocks.

    Args:
        train: text files, or files with a ``text`` field or instruction rows.
        train_subset: source (as written in ``train``) -> ``split.json#key``.
        val: the same for validation, or None.
        max_length: tokens of a block.
        max_tokens: the training budget: tokens taken from ``train``, spread over it; None: all.
        val_max_tokens: the same for validation.
        sets: evaluation sets of instructions, name -> source: a raw model can be asked too.
        template: of those sets.
        max_prompt_length: of those sets.
        limit: first so many documents.
        batch_size: blocks per process and micro-batch.
        cache_dir: where tokenised sets are kept; None: nowhere.
        prepare: makes the files first, if they are not there.
    """

    train: Sources
    train_subset: Mapping[str, str] | None = None
    val: Sources | None = None
    max_length: int = 512
    max_tokens: int | None = None
    val_max_tokens: int | None = None
    sets: Mapping[str, str] = field(default_factory=dict)
    template: str | Mapping[str, str] = "alpaca"
    max_prompt_length: int = 256
    limit: int | None = None
    batch_size: int = 8
    cache_dir: str | None = None
    prepare: Callable[[], Any] | None = None

    def problems(self) -> list[str]:
        """What is wrong with ``data``, one sentence each."""
        found = _shared_problems(self.batch_size, self.train)
        if self.max_length < 2:
            found.append(f"data.max_length is {self.max_length}; a block needs at least 2 tokens")
        if self.prepare is None:
            found += missing_sources({"data.train": self.train, "data.val": self.val})
        return found

    def make_template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """The template of the evaluation sets."""
        return make_template(self.template, tokenizer)

    def load(self, tokenizer: PreTrainedTokenizerBase) -> LoadedSets:
        """Read, tokenise and pack."""
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


def _shared_problems(batch_size: int, train: Sources | None) -> list[str]:
    found = []
    if batch_size < 1:
        found.append(f"data.batch_size is {batch_size}; it must be at least 1")
    if not train:
        found.append("data.train is missing; give a file, a list of files or a hub data set: data.train=...")
    return found
