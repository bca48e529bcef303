"""TRL's GKD trainer off-policy (lmbda = 0, beta = 0: forward KL) on the same checkpoints and rows, timed.

``trl_gkd.py FOLDER STEPS PRECISION`` prints what it measured as JSON. Needs ``pip install trl``. Gradient
checkpointing, TRL's default, is off: it trades time for memory that these models do not need; dropout is on, as in our
runs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from deltakd.data import AlpacaTemplate, read_rows
from deltakd.tracking.environment import peak_memory_mib

WARM_UP = 3

#: Renders the messages as they are: the prompt already is the Alpaca text that our runs train on.
VERBATIM = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


class Clock(TrainerCallback):
    """Wall time and valid tokens of the training loop after the warm-up."""

    def __init__(self) -> None:
        self.started = self.finished = 0.0
        self.tokens = 0
        self.pending = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time; count."""
        if state.global_step == WARM_UP:
            self.started = time.perf_counter()
        elif state.global_step > WARM_UP:
            self.tokens += self.pending
            self.finished = time.perf_counter()


class Counting(GKDTrainer):
    """Tells the clock how many tokens each batch trains on."""

    clock: Clock

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As inherited."""
        self.clock.pending = int((inputs["labels"][:, 1:] != -100).sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


def main(folder: Path, steps: int, precision: str) -> None:
    """Train and print."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    tokenizer.chat_template = VERBATIM
    tokenizer.pad_token = tokenizer.eos_token
    template = AlpacaTemplate()
    rows = []
    for row in read_rows(str(folder / "train.jsonl")):
        prompt, answer = template.render(row)[:2]
        rows.append(
            {"messages": [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": answer.text}]}
        )
    dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16}[precision]
    config = GKDConfig(
        output_dir=str(folder / "runs" / "trl_gkd"),
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=1e-3,
        max_length=256,
        lmbda=0.0,
        beta=0.0,
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
    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(folder / "student", dtype=dtype),
        teacher_model=AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=dtype),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.clock = Clock()
    trainer.add_callback(trainer.clock)
    trainer.train()
    clock = trainer.clock
    rate = clock.tokens / (clock.finished - clock.started)
    peak = peak_memory_mib()
    print(json.dumps({"tokens_per_second": rate, "peak_mib": peak, "tokens": clock.tokens}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
