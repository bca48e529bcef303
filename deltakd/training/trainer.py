"""Lightning's Trainer, configured by a run's settings."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from deltakd.distributed.strategies import make_plugins, make_strategy
from deltakd.training.assembly import Parts
from deltakd.training.callbacks import TrainingLog, TrainingProgress


def make_trainer(
    parts: Parts, callbacks: list[L.Callback], training_log: TrainingLog, loggers: list[Logger]
) -> L.Trainer:
    """Make the trainer of a run.

    Args:
        parts: of the run.
        callbacks: callbacks of every run; the config's own are called before them.
        training_log: the one among them that knows the speed.
        loggers: of the main process.
    """
    run, settings = parts.settings, parts.settings.trainer
    name = run.name.rsplit("/", 1)[-1]
    callbacks = [*callbacks, TrainingProgress(name, training_log, settings.enable_progress_bar)]
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        precision=settings.precision,
        strategy=make_strategy(run.strategy),
        plugins=make_plugins(run.strategy),
        # Training is one stream of micro-batches of known length (data/batches/sampler.py), one epoch to Lightning.
        max_epochs=1,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=loggers or False,
        callbacks=[*run.callbacks.values(), *callbacks],
        use_distributed_sampler=False,
        enable_model_summary=False,
        # Ours is among the callbacks.
        enable_progress_bar=False,
        profiler=_make_profiler(settings.profiler, parts.directory.path),
        detect_anomaly=settings.detect_anomaly,
        default_root_dir=parts.directory.path,
    )


def _make_profiler(name: str | None, directory: Path) -> Profiler | None:
    """Make one of Lightning's profilers, which writes ``fit-profile.txt`` into the run directory."""
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return None if name is None else kinds[name](dirpath=directory, filename="profile")
