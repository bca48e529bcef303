"""How the next token is chosen: every option that changes a generated text, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltakd.io.typed import mismatches


@dataclass(frozen=True)
class Decoding:
    """Decoding options; the defaults are MiniLLM's protocol (arXiv 2306.08543), without its hidden 6-gram ban.

    Args:
        do_sample: sample from the distribution; False takes the most probable token.
        temperature: divides the logits; sampling only.
        top_k: sample from the k most probable tokens; 0: off; sampling only.
        top_p: sample from the smallest set of tokens with at least this mass; 1: off; sampling only.
        no_repeat_ngram_size: no n-gram of this size occurs twice in prompt and answer together; 0: off.
        max_new_tokens: maximum tokens of an answer, EOS included.
    """

    do_sample: bool = True
    temperature: Annotated[float, Gt(0)] = 1.0
    top_k: Annotated[int, Ge(0)] = 0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    no_repeat_ngram_size: Annotated[int, Ge(0)] = 0
    max_new_tokens: Annotated[int, Ge(1)] = 256

    @property
    def keeps_distribution(self) -> bool:
        """True if tokens are samples of the model's own distribution."""
        return self.do_sample and not self.processors()

    def problems(self, key: str = "evaluation.decoding") -> list[str]:
        """Return the problems with the options, one sentence each, beginning with the config key.

        Args:
            key: the config key of the options.
        """
        greedy = "; for the most probable token give do_sample: false"
        found = [p + (greedy if ".temperature is" in p else "") for p in mismatches(self, key)]
        if self.no_repeat_ngram_size != 1:
            return found
        return [
            *found,
            f"{key}.no_repeat_ngram_size is 1; it must be 0 (off) or from 2: 1 would ban every token of the prompt",
        ]

    def processors(self) -> LogitsProcessorList:
        """Return the transformers processors for these options, in the order in which ``generate`` applies them.

        They take ``(history_BT int64, logits_BV float32)``. Padding in the history must be ids that no token has and
        that differ from column to column; otherwise the n-gram ban counts padding as text.
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
