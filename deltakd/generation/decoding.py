"""How the next token is chosen: every option that changes a generated text, in one frozen object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

KEY = "evaluation.decoding"


@dataclass(frozen=True)
class Decoding:
    """Decoding options; the defaults are MiniLLM's protocol (arXiv 2306.08543), without its hidden 6-gram ban.

    Args:
        do_sample: sample from the distribution; False takes the most probable token.
        temperature: divides the logits; sampling only.
        top_k: sample among the k most probable tokens; 0 turns it off; sampling only.
        top_p: sample among the smallest set of tokens with at least this mass; 1 turns it off; sampling only.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and answer together; 0 turns it off.
        max_new_tokens: the longest answer, in tokens, EOS included.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0
    max_new_tokens: int = 256

    def problems(self) -> list[str]:
        """Everything that is wrong with the options, each message opening with its config key."""
        checks = (
            ("do_sample", isinstance(self.do_sample, bool), "true or false"),
            ("temperature", _is_number(self.temperature) and self.temperature > 0,
             "a finite number above 0; for the most probable token set do_sample: false"),
            ("top_k", _is_count(self.top_k), "an integer of at least 0, where 0 keeps every token"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1,
             "a number above 0 and at most 1, where 1 keeps every token"),
            ("no_repeat_ngram_size", _is_count(self.no_repeat_ngram_size) and self.no_repeat_ngram_size != 1,
             "0 (off) or an integer of at least 2; 1 would ban every token of the prompt"),
            ("max_new_tokens", _is_count(self.max_new_tokens) and self.max_new_tokens > 0,
             "an integer of at least 1"),
        )  # fmt: skip
        return [
            f"{KEY}.{name} is {getattr(self, name)!r}: it must be {allowed}."
            for name, good, allowed in checks
            if not good
        ]

    def processors(self) -> LogitsProcessorList:
        """The transformers processors of these options, in the order in which ``generate`` applies them.

        They take ``(history_BT int64, logits_BV float32)``. Padding in the history must be ids that no token has and
        that differ from column to column, or else the n-gram ban counts padding as text.
        """
        processors = LogitsProcessorList()
        if self.no_repeat_ngram_size:
            processors.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if not self.do_sample:
            return processors
        if self.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            processors.append(TopPLogitsWarper(float(self.top_p)))
        return processors


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
