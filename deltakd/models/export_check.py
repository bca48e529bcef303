"""Verifies that an exported directory holds the trained student."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deltakd.data import EncodedSet
from deltakd.models.roles import open_exported
from deltakd.models.settings import ModelSettings
from deltakd.models.tokenizers import PROBE, load_tokenizer
from deltakd.types import device_of, dtype_of

log = logging.getLogger(__name__)

#: Few and short: wrong logits differ in every row, and a large student runs on the CPU here.
_ROWS, _TOKENS = 4, 64
#: Largest allowed difference of logits, as a share of the largest logit: (plain, merged with an adapter). Equal weights
#: give equal logits up to the order of sums; a merged adapter is rounded to the weights' dtype.
_TOLERANCE = {
    torch.float64: (1e-5, 1e-4),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (3e-2, 6e-2),
    torch.float16: (1e-2, 2e-2),
}


@dataclass(frozen=True)
class ExportCheck:
    """Compares an exported directory with the student in memory.

    Args:
        rows: token ids, a list for each row.
        models: how the models of the run are opened.
        vocabulary: V, tokens of the student.
    """

    rows: Sequence[Sequence[int]]
    models: ModelSettings
    vocabulary: int

    @classmethod
    def on(cls, encoded: EncodedSet, models: ModelSettings, vocabulary: int) -> Self:
        """Compare on the first rows of a set, cut to a few tokens."""
        rows = [encoded[i].input_ids[:_TOKENS] for i in range(min(_ROWS, len(encoded)))]
        return cls(rows, models, vocabulary)

    def check(self, trained: Any, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        """Open the directory as its users will, and compare logits and token ids.

        Args:
            trained: the student as a transformers model, or a PEFT model around it; unchanged.
            tokenizer: the student's.
            directory: the exported directory.

        Raises:
            ValueError: it can't be opened, or its student or tokenizer differs.
        """
        self._check_tokenizer(tokenizer, directory)
        device = device_of(trained)
        exported: Any = open_exported(directory, self.models, self.vocabulary, device)
        dtype = dtype_of(exported)
        tolerance = _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])[hasattr(trained, "peft_config")]
        if dtype_of(trained) != dtype:
            trained = copy.deepcopy(trained).to(dtype)
        largest = 0.0
        for row in self.rows:
            ids_BT = torch.tensor([list(row)], device=device)
            ours, theirs = _logits(trained, ids_BT), _logits(exported, ids_BT)
            if ours.shape != theirs.shape:
                raise _differs(f"it has {theirs.shape[-1]} tokens, not {ours.shape[-1]}")
            # Equal infinities count as no difference.
            difference = (ours - theirs).abs().masked_fill(ours == theirs, 0).max().item()
            allowed = tolerance * max(1.0, ours.masked_fill(~ours.isfinite(), 0).abs().max().item())
            if not difference <= allowed:
                raise _differs(f"its logits differ by up to {difference:.3g}, where {allowed:.1g} is rounding")
            largest = max(largest, difference)
        log.debug("%s: logits of %d rows differ by at most %.3g.", directory, len(self.rows), largest)

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        exported = load_tokenizer(str(directory), "student", trust_remote_code=self.models.trust_remote_code)
        for text in (PROBE, *(str(tokenizer.decode(list(row))) for row in self.rows)):
            ours, theirs = (list(each(text)["input_ids"]) for each in (tokenizer, exported))
            if ours != theirs:
                at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
                raise _differs(
                    f"its tokenizer makes {theirs[at : at + 4]} of a text of which the run's makes {ours[at : at + 4]} "
                    f"(from token {at})"
                )


@torch.no_grad()
def _logits(model: Any, ids_BT: Tensor) -> Tensor:
    """[B, T, V] in float64, in eval mode and without ``torch.compile``."""
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            return model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits.double()
    finally:
        model.train(was_training)


def _differs(how: str) -> ValueError:
    return ValueError(
        f"what was exported is not the student that was trained: {how}; it was taken away again, and the checkpoints "
        "are kept. The run is not finished: the same command with resume=true exports once more"
    )
