"""The LightningModule and the data module under a lightning.Trainer with callbacks and loggers of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from deltakd import prepare


class Losses(L.Callback):
    """Keeps the loss of every optimiser step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        loss = pl_module.step_metrics["train/loss"]
        self.losses.append(loss)
        pl_module.log("loss", loss)


def main(output: str, **models_and_data: Any) -> list[float]:
    run = prepare(**models_and_data, loss="delta_kd", lr=1e-3, max_steps=20)
    losses = Losses()
    trainer = L.Trainer(
        **run.trainer_options,
        accelerator="auto",
        devices=1,
        callbacks=[losses],
        logger=CSVLogger(output),
        log_every_n_steps=1,
        enable_checkpointing=False,
    )
    trainer.fit(run.module, datamodule=run.data)
    run.module.student.hf.save_pretrained(Path(output) / "student")
    run.tokenizer.save_pretrained(Path(output) / "student")
    return losses.losses


if __name__ == "__main__":
    main(
        "outputs/own_trainer",
        student="openai-community/gpt2",
        teacher="MiniLLM/teacher-gpt2-1.5B",
        teacher_raw="openai-community/gpt2-xl",
        data="my.jsonl",
    )
