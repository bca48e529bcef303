"""What a student keeps of what it knew before: raw text, and facts, each before and after its training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, EncodedSet, Row, Segment, encode_rows, pack_texts, read_rows, read_texts
from deltakd.evaluation.settings import MeasureSettings
from deltakd.io.errors import ConfigError
from deltakd.types import IGNORE_INDEX

#: Name of the measures in a summary, where other measures have the name of their set.
RETAINED = "retained"
#: The two parts: raw text, and facts; so named in messages and in the counts of a summary.
TEXT, FACTS = f"{RETAINED}/text", f"{RETAINED}/facts"


@final
@dataclass(frozen=True)
class _Verbatim:
    """Prompt and completion as one text."""

    def render(self, row: Row) -> list[Segment]:
        """Return the prompt and its completion."""
        assert row.prompt is not None, "checked when the facts are read"
        return [
            Segment(row.prompt, trained=False, special_tokens=True),
            *(Segment(text, trained=True, closed=True) for text in row.responses[:1]),
        ]

    def tail(self, row: Row) -> str:
        """Return "": a prompt that is too long loses its beginning."""
        return ""

    def keeps_end(self, row: Row) -> bool:
        """True: the question is at the end."""
        return True


def retained_sets(
    measures: MeasureSettings, data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, EncodedSet]]:
    """Yield ``TEXT`` and ``FACTS`` with their tokens, where the settings name them.

    Raw text is cut into blocks of ``data.max_length`` tokens; a fact that is longer is left out.

    Raises:
        ValueError: a source can't be read, or a fact has no prompt and completion.
    """
    kept = measures.retained
    if kept.text:
        yield TEXT, pack_texts(read_texts(kept.text), tokenizer, data.max_length, data.cache_dir)
    if kept.facts:
        rows = read_rows(kept.facts)[: measures.rows]
        bad = next((row for row in rows if row.prompt is None or not row.responses), None)
        if bad is not None:
            raise ValueError(
                f"{bad.label} of the facts has no prompt with a completion; give records such as "
                '{"prompt": "... Ann lives in", "completion": " Rome."}'
            )
        encoded = encode_rows(
            rows,
            _Verbatim(),
            tokenizer,
            max_length=data.max_length,
            max_prompt_length=data.max_length - 1,
            overlong="drop",
            cache_dir=data.cache_dir,
        )
        yield FACTS, _without_end(encoded)


def _without_end(encoded: EncodedSet) -> EncodedSet:
    """Leave out the EOS that closes each row: raw text goes on after a fact."""
    labels = np.array(encoded.labels)
    labels[encoded.offsets[1:] - 1] = IGNORE_INDEX
    return replace(encoded, labels=labels)


def check_retained(measures: MeasureSettings, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read raw text and facts before training, so that a mistake in them does not show only after it.

    Raises:
        ConfigError: they can't be read.
    """
    if measures.rows == 0:
        return
    try:
        list(retained_sets(measures, data, tokenizer))
    except ValueError as error:
        raise ConfigError([f"evaluation.measures.retained: {error}"]) from None


def recalled(correct_N: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the number of completions of which every token is a favourite: greedy decoding would write them.

    Args:
        correct_N: 1 for each token that is a most probable one, else 0; completion after completion.
        tokens: the number of tokens of each completion.
    """
    whole = [part.amin() for part in correct_N.split(list(tokens)) if len(part)]
    return torch.stack(whole).sum() if whole else correct_N.new_zeros(())
