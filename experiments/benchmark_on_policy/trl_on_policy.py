"""TRL's on-policy trainers on the same checkpoints and prompts, timed.

``trl_on_policy.py FOLDER STEPS BATCH NEW_TOKENS PRECISION TRAINER`` prints JSON. Needs TRL, and nothing of ours, so
that two environments will do. TRAINER is ``distillation`` (DistillationTrainer) or ``gkd`` (GKDTrainer, ``lmbda=1``),
both with ``beta=1``: reverse KL on the student's own responses. Gradient checkpointing, their default, is off: it costs
time, for memory that these models do not need.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

WARM_UP = 2

#: Renders messages as they are: the prompt already is the text that our runs train on.
VERBATIM = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


class Clock(TrainerCallback):
    """Wall time, CPU time and response tokens of the whole loop after the warm-up."""

    def __init__(self) -> None:
        self.started = self.finished = (0.0, 0.0)
        self.tokens = self.pending = 0
        self.writing = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time; count."""
        now = (time.perf_counter(), time.process_time())
        if state.global_step == WARM_UP:
            self.started, self.writing = now, 0.0
        elif state.global_step > WARM_UP:
            self.tokens += self.pending
            self.finished = now
        self.pending = 0


def timed_generate(model: Any, clock: Clock) -> None:
    """Let the clock see the time that ``model.generate`` takes."""
    plain = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = plain(*args, **kwargs)
        clock.writing += time.perf_counter() - start
        return found

    model.generate = generate


def distillation(models: dict[str, Any], tokenizer: Any, prompts: list[str], new_tokens: int, **shared: Any) -> Any:
    """Return TRL's DistillationTrainer; it counts what it trains on."""
    from trl import DistillationConfig, DistillationTrainer

    class Counting(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.clock.pending += int(inputs["completion_mask"].sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Counting(
        model=models["student"],
        teacher_model=models["teacher"],
        args=DistillationConfig(max_completion_length=new_tokens, **shared),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )


def gkd(models: dict[str, Any], tokenizer: Any, prompts: list[str], new_tokens: int, **shared: Any) -> Any:
    """Return TRL's GKDTrainer with ``lmbda=1``; it counts what it trains on."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Counting(GKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.clock.pending += int((inputs["labels"][:, 1:] != -100).sum())
            return super().compute_loss(model, inputs, *args, **kwargs)

    tokenizer.chat_template = VERBATIM
    # Its collator wants an answer; none of it is trained on.
    turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": "."}] for p in prompts]
    return Counting(
        model=models["student"],
        teacher_model=models["teacher"],
        args=GKDConfig(max_new_tokens=new_tokens, max_length=512 + new_tokens, lmbda=1.0, **shared),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in turns]),
        processing_class=tokenizer,
    )


def main(folder: Path, steps: int, batch: int, new_tokens: int, precision: str, name: str) -> None:
    """Train and print."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text("utf-8").splitlines()]
    dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16}[precision]
    models = {role: AutoModelForCausalLM.from_pretrained(folder / role, dtype=dtype) for role in ("student", "teacher")}
    trainer = {"distillation": distillation, "gkd": gkd}[name](
        models,
        tokenizer,
        prompts,
        new_tokens,
        output_dir=str(folder / "runs" / f"trl_{name}"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=5e-4,
        beta=1.0,
        temperature=1.0,
        gradient_checkpointing=False,
        disable_dropout=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    clock = trainer.clock = Clock()
    timed_generate(models["student"], clock)
    trainer.add_callback(clock)
    trainer.train()
    wall, cpu = (end - start for end, start in zip(clock.finished, clock.started, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    measured = {"tokens": clock.tokens, "wall_s": wall, "cpu_s": cpu, "writing_s": clock.writing}
    print(json.dumps(measured | {"peak_mib": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
