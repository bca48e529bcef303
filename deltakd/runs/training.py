"""One run from plan to summary: train, export, evaluate, record."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from deltakd.callbacks import AtomicCheckpointIO, Checkpoints, ProgressBar, StopOnSignal, Throughput, Validation
from deltakd.callbacks.checkpoints import read_checkpoint
from deltakd.data import LoadedSets
from deltakd.data.datamodule import DistillationData
from deltakd.evaluation import summarise
from deltakd.models import save_student
from deltakd.module import DistillationModule
from deltakd.runs.assembly import Models, make_models, make_tokenizer, shared_vocabulary
from deltakd.runs.directory import RunDirectory
from deltakd.runs.evaluation import answer, evaluate_sets, make_set, pad_id, read_sets, shown
from deltakd.runs.plan import Plan, make_plan
from deltakd.runs.record import count_parameters, environment, model_card, peak_memory_mib

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Parts:
    """What a run is made of once everything is loaded."""

    plan: Plan
    directory: RunDirectory
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    sets: LoadedSets
    models: Models

    @property
    def show_progress(self) -> bool:
        return bool(self.plan.config["trainer"]["enable_progress_bar"])


def run_training(cfg: DictConfig, run_dir: Path) -> float:
    """Train, export, evaluate and record; a finished run is only read.

    Args:
        cfg: composed config (``conf/train.yaml``).
        run_dir: the run directory.

    Returns:
        The value of the objective at the best checkpoint.

    Raises:
        ConfigError: everything that is wrong with the config, before any weight is loaded.
        ValueError: data or models that can't be used.
        NonFiniteLossError: the loss diverged.
        Stopped: SIGTERM or Ctrl-C came; the state is saved.
    """
    plan = make_plan(cfg)
    directory = RunDirectory(run_dir)
    directory.claim(plan.config, resume=bool(plan.config["resume"]))
    if directory.finished:
        summary = directory.read_summary()
        log.info("%s is finished already; nothing to do.", run_dir)
        return _objective_value(plan, summary)
    started = time.perf_counter()
    parts = _load(plan, directory)
    trainer, module, checkpoints, throughput = _fit(parts)
    metrics = _objective_metrics(module, checkpoints)
    save_student(
        parts.models.student,
        parts.tokenizer,
        directory.student,
        model_card(plan.config, metrics, environment()["git_commit"]),
    )
    if plan.evaluation.generate:
        metrics |= _evaluate_student(parts)
    meta = environment() | {
        "seed": plan.config["seed"],
        "objective": plan.objective,
        "best_step": checkpoints.best_step,
        "steps": module.total_steps,
        "parameters": count_parameters(parts.models.loaded),
        "data": parts.sets.counts,
        "valid_tokens": throughput.valid_tokens,
        "training_seconds": round(throughput.seconds, 3),
        "seconds": round(time.perf_counter() - started, 3),
        "tokens_per_second": round(throughput.tokens_per_second, 1),
        "peak_memory_mib": round(peak_memory_mib(), 1),
    }
    summary = {**metrics, "meta": meta}
    for logger in trainer.loggers:
        logger.log_metrics({k: v for k, v in metrics.items() if not k.startswith("val/")}, step=module.total_steps)
        logger.finalize("success")
    directory.write_summary(summary)
    return _objective_value(plan, summary)


def _objective_value(plan: Plan, summary: dict[str, Any]) -> float:
    """The objective; the last training loss where there is no validation data."""
    value = summary.get(plan.objective, summary.get("train/loss"))
    assert value is not None
    return float(value)


def _load(plan: Plan, directory: RunDirectory) -> _Parts:
    # Everything random is drawn from seeds given where it is drawn; this one is for libraries we do not know of.
    L.seed_everything(plan.config["seed"], verbose=False)
    if plan.data.prepare is not None:
        plan.data.prepare()
    tokenizer = make_tokenizer(plan, directory.path / "tokenizer")
    vocabulary = shared_vocabulary(plan, tokenizer)
    sets = plan.data.load(tokenizer)
    models = make_models(plan, tokenizer, vocabulary)
    return _Parts(plan, directory, tokenizer, vocabulary, sets, models)


def _fit(parts: _Parts) -> tuple[L.Trainer, DistillationModule, Checkpoints, Throughput]:
    """Train from the start or from ``last.ckpt``; the student is left with its best weights."""
    plan, settings = parts.plan, parts.plan.config["trainer"]
    last = parts.directory.checkpoints / "last.ckpt"
    state = read_checkpoint(last) if last.is_file() else None
    resume_step = state["global_step"] if state else 0
    if state:
        log.info("Going on from optimiser step %d.", resume_step)
    data = DistillationData(
        parts.sets.train,
        parts.sets.val,
        pad_id=pad_id(parts.tokenizer),
        batch_size=plan.data.batch_size,
        accumulate=settings["accumulate_grad_batches"],
        seed=plan.config["seed"],
        max_epochs=settings["max_epochs"],
        max_steps=settings["max_steps"],
    )
    validation = _make_validation(parts, data)
    checkpoints = Checkpoints(
        parts.directory.checkpoints,
        validation,
        plan.objective,
        plan.objective_mode,
        settings["checkpoint_every_n_steps"],
        settings["checkpoint_every_n_minutes"],
    )
    throughput = Throughput()
    callbacks = [throughput, *([validation] if validation else []), checkpoints, StopOnSignal(checkpoints)]
    trainer = _make_trainer(parts, callbacks, resume_step)
    data.trainer = trainer
    module = DistillationModule(
        parts.models.student,
        parts.models.references,
        plan.loss,
        plan.optim,
        data.total_steps,
        seed=plan.config["seed"],
        chunk_size=plan.config["kernels"]["chunk_size"],
    )
    if validation is not None:
        validation.steps = _validation_steps(data, settings["val_every_n_steps"])
    log.info(
        "%s: %d optimiser steps, %d training rows, %d valid tokens a pass.",
        plan.config["name"],
        data.total_steps,
        len(parts.sets.train),
        int(parts.sets.train.valid_tokens.sum()),
    )
    if state and resume_step >= data.total_steps:
        _restore(module, checkpoints, throughput, state)
    else:
        with warnings.catch_warnings():
            # Lightning warns of what is on purpose here: few loader workers, no validation loop of its own.
            warnings.filterwarnings("ignore", module="lightning")
            trainer.fit(module, datamodule=data, ckpt_path=last if state else None, weights_only=True)
    if checkpoints.best_path.is_file() and checkpoints.best_step is not None:
        _load_weights(module, read_checkpoint(checkpoints.best_path))
    return trainer, module, checkpoints, throughput


def _restore(
    module: DistillationModule, checkpoints: Checkpoints, throughput: Throughput, state: dict[str, Any]
) -> None:
    """Take over the state of a run whose training is done, without a trainer that has nothing left to do."""
    _load_weights(module, state)
    for callback in (checkpoints, throughput):
        callback.load_state_dict(state["callbacks"][callback.state_key])
    module.on_load_checkpoint(state)


def _load_weights(module: DistillationModule, state: dict[str, Any]) -> None:
    try:
        module.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the checkpoint is of another architecture than model.student ({first}); give the same model, or "
            "another run_dir"
        ) from None


def _make_validation(parts: _Parts, data: DistillationData) -> Validation | None:
    batches = data.val_loader()
    if batches is None:
        log.info("No validation data: the last student is exported, not the best.")
        return None
    plan = parts.plan
    generate = None
    if plan.generates_on_validation:
        rows = parts.sets.val_rows[: plan.evaluation.val_limit]
        val_set = make_set("val", rows, plan.data, parts.tokenizer)

        def generate(module: DistillationModule) -> dict[str, float]:
            records = answer(
                module.student.hf,
                parts.tokenizer,
                val_set,
                plan.evaluation,
                plan.evaluation.seeds[0],
                parts.vocabulary,
                show_progress=False,
            )
            return summarise({plan.evaluation.seeds[0]: records})

    return Validation(batches, frozenset(), generate)


def _validation_steps(data: DistillationData, every: int | None) -> frozenset[int]:
    """Every so many steps, or at the end of each pass; and after the last step."""
    interval = float(every) if every else data.sampler().steps_per_epoch
    count = int(data.total_steps / interval)
    return frozenset({round(interval * (k + 1)) for k in range(count)} | {data.total_steps}) - {0}


def _make_trainer(parts: _Parts, callbacks: list[L.Callback], resume_step: int) -> L.Trainer:
    config = parts.plan.config
    settings = config["trainer"]
    path = parts.directory.path
    if settings["enable_progress_bar"]:
        callbacks = [*callbacks, ProgressBar(config["name"])]
    extra = [instantiate(node) for node in (config["callbacks"] or {}).values()]
    loggers = [
        instantiate(node)(directory=path, name=config["name"], config=config, resume_step=resume_step)
        for node in (config["logger"] or {}).values()
    ]
    return L.Trainer(
        accelerator=settings["accelerator"],
        devices=settings["devices"],
        num_nodes=settings["num_nodes"],
        precision=settings["precision"],
        strategy=config["strategy"]["name"],
        # Training is one stream of micro-batches whose length is known (data/sampler.py): one epoch to Lightning.
        max_epochs=1,
        accumulate_grad_batches=settings["accumulate_grad_batches"],
        gradient_clip_val=settings["gradient_clip_val"],
        log_every_n_steps=settings["log_every_n_steps"],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=loggers or False,
        callbacks=[*extra, *callbacks],
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=settings["enable_progress_bar"],
        profiler=settings["profiler"],
        detect_anomaly=settings["detect_anomaly"],
        default_root_dir=path,
    )


def _objective_metrics(module: DistillationModule, checkpoints: Checkpoints) -> dict[str, float]:
    """Validation metrics at the best step, and the last training loss."""
    return dict(checkpoints.best_metrics) or {"train/loss": module.last_loss}


def _evaluate_student(parts: _Parts) -> dict[str, float]:
    """Evaluate what was exported, opened as its users will open it."""
    plan = parts.plan
    sets = read_sets(plan.evaluation, plan.data, parts.tokenizer)
    if not sets:
        return {}
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(parts.directory.student)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    metrics = evaluate_sets(
        model,
        parts.tokenizer,
        sets,
        plan.evaluation,
        parts.vocabulary,
        parts.directory.generations,
        parts.show_progress,
    )
    log.info("%s: %s", plan.config["name"], shown(metrics))
    return metrics
