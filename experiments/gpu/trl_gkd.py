"""One training step as TRL's GKD takes it, on the models and the batch of ``step.py``, where TRL is installed.

What ``GKDTrainer`` does in a step, without its Trainer: both models in full, the student under autocast with logits in
float32, then its ``generalized_jsd_loss`` (beta 0: forward KL), backward, clipping and AdamW. So whatever its Trainer
adds is left out, in TRL's favour.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from common import peak_gib, seconds_of
from torch import Tensor

from deltakd.models import LanguageModel
from deltakd.types import Batch


def missing() -> str | None:
    """Return why TRL's step can't run, or None."""
    found = [name for name in ("trl", "accelerate", "datasets") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(found)}" if found else None


def measure(student: LanguageModel, teacher: LanguageModel, batch: Batch, precision: str) -> dict[str, Any]:
    """Time steps of TRL's GKD; return milliseconds, tokens per second and the peak beyond the weights."""
    from trl.experimental.gkd import GKDTrainer

    device = batch.input_ids.device.type
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=device == "cuda")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    last = torch.zeros(())

    def logits(model: LanguageModel) -> Tensor:
        found: Tensor = model.causal_lm(**inputs).logits[:, :-1]
        return found

    def step() -> None:
        nonlocal last
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
            student_logits = logits(student).float()
        with torch.no_grad():
            teacher_logits = logits(teacher)
        last = GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, batch.labels[:, 1:], beta=0.0)
        last.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    student.train()
    teacher.eval()
    peak = peak_gib(step)
    seconds = seconds_of(step, least=1.0)
    tokens = int((batch.labels[:, 1:] != -100).sum())
    return {"ms": 1000 * seconds, "tokens_per_second": tokens / seconds, "peak_gib": peak, "loss": last.item()}
