"""Training steps at real shapes: tokens per second, peak memory, waits for the host, and what is not the models' own.

Random weights of GPT-2 124M with XL teachers (``--shape gpt2``), or of Qwen2.5-0.5B with 1.5B teachers, V = 151,936
(``--shape qwen``), through the same module, data module and Trainer as any run. ``waits`` counts what
``torch.cuda.set_sync_debug_mode`` sees in three steps after the clock has stopped; ``peak_gib`` is beyond the weights;
``outside`` is the share of a step that is neither a model's body nor a head's products, each timed by itself.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
import trl_gkd
from common import Results, peak_gib, seconds_of, wait
from loss import loss_named, products
from worlds import SHAPES, make_cache, make_model, make_rows

from deltakd.data.batches.data_module import DistillationData
from deltakd.data.batches.loader import collate
from deltakd.models import LanguageModel
from deltakd.models.lora import add_lora
from deltakd.models.settings import LoraSpec
from deltakd.references import LiveReferences, References
from deltakd.training.callbacks import TrainingLog
from deltakd.training.module import DistillationModule
from deltakd.training.optim import AdamW
from deltakd.types import STUDENT, Batch, Head

#: Name -> loss, references (or TRL's whole step), LoRA.
CONTESTANTS = {
    "sft": ("sft", "live", False),
    "kd": ("kd", "live", False),
    "kd_by_trl": ("kd", "trl", False),
    "delta_kd": ("delta_kd", "live", False),
    "delta_kd_cached": ("delta_kd", "cached", False),
    "sft_lora": ("sft", "live", True),
    "kd_lora": ("kd", "live", True),
    "delta_kd_lora": ("delta_kd", "live", True),
}
#: Steps before the clock starts, and after it in which waits are counted.
WARM_UP, COUNTED = 4, 3


class Watch(L.Callback):
    """Times the steps after the warm-up; then counts waits for the host."""

    def __init__(self, steps: int) -> None:
        self.last = WARM_UP + steps
        self.seconds = 0.0
        self.tokens = 0
        self.waits: Counter[str] = Counter()
        self._began = 0.0
        self._caught: Any = None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Start, stop."""
        step = trainer.global_step
        if WARM_UP < step <= self.last:
            self.tokens += batch.step_tokens
        if step == WARM_UP:
            wait()
            self._began = time.perf_counter()
        elif step == self.last:
            wait()
            self.seconds = time.perf_counter() - self._began
            if module.device.type == "cuda":
                self._caught = warnings.catch_warnings(record=True)
                self._log = self._caught.__enter__()
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
        elif step == self.last + COUNTED and self._caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            found = (f"{Path(w.filename).name}:{w.lineno}" for w in self._log if "synchroniz" in str(w.message))
            self.waits.update(found)


def fit(module: DistillationModule, data: DistillationData, options: argparse.Namespace, watch: Watch) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision=options.precision,
        gradient_clip_val=1.0,
        callbacks=[TrainingLog(10), watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)


def bodies(student: LanguageModel, references: References | None, batch: Batch, precision: str) -> float:
    """Return the seconds of the models' bodies alone: forward of all, backward of the student."""
    device = batch.input_ids.device.type

    def run() -> None:
        if isinstance(references, LiveReferences):
            references(batch)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
            hidden = student.head(batch).hidden
        hidden.backward(torch.ones_like(hidden))

    seconds = seconds_of(run)
    student.zero_grad(set_to_none=True)
    return seconds


def head_products(student: LanguageModel, references: References | None, batch: Batch, loss: Any) -> float:
    """Return the seconds of the heads' products alone, in bfloat16."""
    with torch.no_grad():
        heads = {STUDENT: student.head(batch)}
        if references is not None:
            heads |= references(batch)
    low = {role: Head(head.hidden.detach().bfloat16(), head.weight.detach().bfloat16()) for role, head in heads.items()}
    return seconds_of(lambda: products(loss, low, batch.labels_N))


def measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one contestant and take its step apart."""
    loss_name, source, lora = CONTESTANTS[name]
    if source == "trl" and (reason := trl_gkd.missing()) is not None:
        return {"skipped": reason}
    shape, loss = SHAPES[options.shape], loss_named(loss_name)
    rows = make_rows(2 * options.batch, options.length, shape.vocabulary)
    torch.manual_seed(0)
    student = make_model(shape, STUDENT, options.device, torch.float32, options.length)
    if lora:
        student = LanguageModel(add_lora(student.causal_lm, LoraSpec()).to(options.device), shape.vocabulary)
    references: References | None = None
    if loss.requires:
        teachers = {
            role: make_model(shape, role, options.device, torch.bfloat16, options.length)
            for role in sorted(loss.requires)
            if not (lora and role == "student_raw")
        }
        live = LiveReferences(
            teachers,
            adapted_student=student if lora and "student_raw" in loss.requires else None,
        )
        live.to(torch.device(options.device))
        references = live
        if source == "trl":
            batch = collate([rows[row] for row in range(options.batch)], 0, 0, 1).to(options.device)
            return trl_gkd.measure(student, teachers["teacher"], batch, options.precision)
        if source == "cached":
            references = make_cache(folder / "cache", live, rows, options.batch, options.device)
            references.to(torch.device(options.device))
            del live, teachers
    batch = collate([rows[row] for row in range(options.batch)], 0, 0, 1).to(options.device)
    steps = WARM_UP + options.steps + COUNTED
    data = DistillationData(rows, None, 0, options.batch, 1, seed=0, max_epochs=None, max_steps=steps)
    module = DistillationModule(student, references, loss, AdamW(lr=1e-4), steps, seed=0)
    watch = Watch(options.steps)
    peak = peak_gib(lambda: fit(module, data, options, watch))
    student.to(options.device)
    step = watch.seconds / options.steps
    own = bodies(student, references, batch, options.precision)
    heads = head_products(student, references, batch, loss)
    return {
        "ms": 1000 * step,
        "tokens_per_second": watch.tokens / watch.seconds,
        "peak_gib": peak,
        "bodies_ms": 1000 * own,
        "products_ms": 1000 * heads,
        "outside": 1 - (own + heads) / step,
        "waits": dict(watch.waits),
        "waits_per_step": sum(watch.waits.values()) / COUNTED,
        "loss": module.step_metrics["train/loss"],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="gpt2", choices=list(SHAPES))
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--precision", default="bf16-mixed", choices=["bf16-mixed", "32-true"])
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    setting = {key: value for key, value in vars(options).items() if key != "out"}
    results = Results(options.out, f"step_{options.shape}", setting)
    for name in options.contestants:
        with tempfile.TemporaryDirectory() as folder:
            results.attempt(name, lambda name=name, folder=folder: measure(name, options, Path(folder)))


if __name__ == "__main__":
    main()
