"""A loss of deltakd in a training loop of one's own, with any transformers models.

The loss never sees all logits at once: it takes hidden states and the matrices that turn them into logits, and
multiplies them chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from deltakd.kernels import Head, chunked_loss
from deltakd.losses import Distillation, ForwardKL, delta_target


def head(model: PreTrainedModel, input_ids: Tensor, positions: Tensor) -> Head:
    """Return hidden states [N, D] at some positions, with the output embedding [V, D]."""
    hidden = model.base_model(input_ids=input_ids).last_hidden_state.flatten(0, 1)[positions]
    output = model.get_output_embeddings()
    return Head(hidden, output.weight, output.bias)


def main(student: str, teacher: str, teacher_raw: str, texts: list[str], steps: int = 20) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = {
        "student": AutoModelForCausalLM.from_pretrained(student),
        "teacher": AutoModelForCausalLM.from_pretrained(teacher),
        "teacher_raw": AutoModelForCausalLM.from_pretrained(teacher_raw),
        "student_raw": AutoModelForCausalLM.from_pretrained(student),
    }
    # The target is the teacher's shift, added to the raw student: z_t + (z_s0 - z_t0).
    loss = Distillation(delta_target(delta_weight=1.0), ForwardKL(), ce_weight=0.5)
    optimiser = torch.optim.AdamW(models["student"].parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        ids = tokenizer(texts[step % len(texts)], return_tensors="pt")["input_ids"]
        positions, labels = torch.arange(ids.shape[1] - 1), ids[0, 1:]
        with torch.no_grad():
            heads = {role: head(models[role], ids, positions) for role in loss.requires}
        heads["student"] = head(models["student"], ids, positions)
        total, _ = chunked_loss(loss, heads, labels)
        (total / len(labels)).backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total.item() / len(labels))
    return losses


if __name__ == "__main__":
    print(
        main(
            student="openai-community/gpt2",
            teacher="MiniLLM/teacher-gpt2-1.5B",
            teacher_raw="openai-community/gpt2-xl",
            texts=["Name three colours. Red, green and blue.", "Name a planet. Venus."],
        )
    )
