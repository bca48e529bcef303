"""Settings of the config group ``data`` (``conf/data/*.yaml``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, final

import numpy as np
from annotated_types import Ge
from transformers import PreTrainedTokenizerBase

from deltakd.data.common_settings import DataConfig, Positive, Sources
from deltakd.data.encoding.encoded_set import EncodedSet
from deltakd.data.encoding.packing import pack_texts
from deltakd.data.encoding.segments import Template
from deltakd.data.encoding.template_problems import template_problems
from deltakd.data.encoding.token_table import encode_rows
from deltakd.data.encoding.two_tokenizers import Coding
from deltakd.data.load import LoadedSets, SplitRows, load_instruction_sets, load_text_sets, split_rows
from deltakd.data.load_stream import open_instruction_stream, open_text_stream, streamed_sets
from deltakd.data.sources.readers import read_rows, read_texts
from deltakd.io.keys import Seed


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
        teacher_template: template for teachers with a tokenizer of their own; None: as ``template`` (``chat``: each
            tokenizer's own chat template).
        teacher_max_length: maximum tokens of a row for teachers with a tokenizer of their own; None: ``max_length``.
            Their prompts may have the same share of it as the student's.
    """

    train_subset: str | None = None
    val_subset: str | None = None
    val_size: Annotated[int, Ge(0)] = 0
    split_seed: Seed = 0
    exclude: Sequence[str] = ()
    overlong: Literal["cut", "drop"] = "cut"
    split_turns: bool = False
    teacher_template: str | Mapping[str, str] | None = None
    teacher_max_length: Positive | None = None

    @property
    def teachers_length(self) -> int:
        """Maximum tokens of a row for teachers with a tokenizer of their own."""
        return self.teacher_max_length or self.max_length

    def teachers_coding(self, tokenizer: PreTrainedTokenizerBase) -> Coding:
        """Return how rows become tokens for teachers with a tokenizer of their own."""
        theirs = self.for_teachers()
        template = theirs.make_template(tokenizer)
        return Coding(template, tokenizer, theirs.max_length, theirs.max_prompt_length, self.overlong)

    def for_teachers(self) -> InstructionData:
        """Return the settings with the template and the limits of teachers with a tokenizer of their own."""
        return replace(
            self,
            template=self.template if self.teacher_template is None else self.teacher_template,
            max_length=self.teachers_length,
            max_prompt_length=max(1, self.max_prompt_length * self.teachers_length // self.max_length),
        )

    def one_tokenizer_problems(self) -> list[str]:
        """Return a sentence for each setting for teachers with a tokenizer of their own, when there are none."""
        given = {"teacher_template": self.teacher_template, "teacher_max_length": self.teacher_max_length}
        return [
            f"data.{name} is {value!r}, but all models of this run share one tokenizer; leave it at null"
            for name, value in given.items()
            if value is not None
        ]

    @property
    def validates(self) -> bool:
        """True if validation data is given, or held out of ``train``."""
        return bool(self.val) or self.val_size > 0

    def own_problems(self) -> list[str]:
        """Return a problem if prompts leave no room for a response, or the teachers' template is none."""
        found = template_problems("data.teacher_template", self.teacher_template) if self.teacher_template else []
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

    def encode(self, source: Sources, tokenizer: PreTrainedTokenizerBase) -> EncodedSet:
        """Return the rows of other sources as ``load`` would tokenise them; their ids are line numbers.

        Raises:
            ValueError: as ``read_rows`` and ``encode_rows``.
        """
        rows = read_rows(source, columns=self.columns, strip_answers=self.strip_answers)
        return encode_rows(rows, self.make_template(tokenizer), tokenizer, **self._limits())

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

    def teachers_coding(self, tokenizer: PreTrainedTokenizerBase) -> Coding:
        """Raise a ValueError: the blocks of two tokenizers begin and end elsewhere in the text."""
        raise ValueError(*self.two_tokenizers_problems())

    def two_tokenizers_problems(self) -> list[str]:
        """Return that blocks can't be aligned."""
        return [
            "the teachers have another tokenizer than the student, and data is plain text, whose blocks of "
            "data.max_length tokens would begin and end elsewhere in it; give data=instruction, or models that share "
            "one tokenizer"
        ]

    def own_problems(self) -> list[str]:
        """Return the problems: blocks too short, lines chosen of what is not indexed, or packing."""
        found = [_no_subset()] if self.streaming and self.train_subset else []
        if self.max_length < 2:
            found.append(f"data.max_length is {self.max_length}; a block needs 2 tokens or more")
        if self.packing:
            found.append("data.packing=true, but plain text is cut into full blocks anyway; give data.packing=false")
        return found

    def load(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts_only: bool = False,
        teachers: PreTrainedTokenizerBase | None = None,
    ) -> LoadedSets:
        """Read, tokenise and pack the documents."""
        assert not prompts_only, "text has no prompts; checked with the config"
        assert teachers is None, "text is not aligned; checked with the tokenizers"
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
