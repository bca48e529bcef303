"""A whole run as typed settings: what ``conf/train.yaml`` and its groups say, checked.

``deltakd.config.build.make_settings`` makes them; below ``config`` nothing else of the config is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from pydantic import StringConstraints

from deltakd.data import InstructionData, TextData
from deltakd.distributed.settings import StrategySettings
from deltakd.evaluation import SCORERS
from deltakd.evaluation.settings import SCORES, EvaluationSettings
from deltakd.io.keys import Resume, keys_with
from deltakd.io.run_directory import ResumePolicy
from deltakd.kernels import MEMORY_BUDGET
from deltakd.models.settings import ModelSettings, ModelSpec
from deltakd.references import CacheSettings, LiveSettings, ReferenceSettings
from deltakd.tracking.loggers import MakeLogger
from deltakd.training.optim import AdamW
from deltakd.types import Loss

#: What ``trainer.precision`` may be: Lightning's names.
Precision = Literal["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "32", "64", "16", "bf16"]

Positive = Annotated[int, Ge(1)]
#: Indices of devices as text.
Indices = Annotated[str, StringConstraints(pattern=r"^\d+(,\d+)*$"), "indices such as '0,1'"]


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The group ``trainer``.

    Args:
        accelerator: auto, cpu, gpu, cuda, mps or xpu.
        devices: a number of processes on this machine, the indices of its devices, or ``auto``.
        num_nodes: machines.
        precision: Lightning's name.
        max_epochs: passes over the training rows; may be a fraction.
        max_steps: optimiser steps; the run ends with whichever of the two comes first.
        accumulate_grad_batches: micro-batches of an optimiser step.
        gradient_clip_val: the largest norm of the gradient; None or 0: no clipping.
        log_every_n_steps: optimiser steps between two entries of the log.
        val_every_n_steps: optimiser steps between two validations; None: once a pass, and always at the end.
        checkpoint_every_n_steps: beside the checkpoint after each validation.
        checkpoint_every_n_minutes: the same by the clock.
        compile: ``torch.compile`` the student.
        dry_run: print how much memory the run needs, and do nothing else.
        profiler: one of Lightning's.
        enable_progress_bar: show a progress bar.
        detect_anomaly: PyTorch's search for the operation that made a NaN.
    """

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "xpu"] = "auto"
    devices: Annotated[Positive | Literal["auto"] | list[Annotated[int, Ge(0)]] | Indices, Resume.UNFINISHED] = 1
    num_nodes: Annotated[int, Ge(1), Resume.UNFINISHED] = 1
    precision: Precision | Literal[16, 32, 64] = "32-true"
    max_epochs: Annotated[float, Gt(0)] | None = 1
    max_steps: Positive | None = None
    accumulate_grad_batches: Positive = 1
    gradient_clip_val: Annotated[float, Ge(0)] | None = 1.0
    log_every_n_steps: Annotated[int, Ge(1), Resume.FREE] = 10
    val_every_n_steps: Positive | None = None
    checkpoint_every_n_steps: Annotated[Positive | None, Resume.FREE] = None
    checkpoint_every_n_minutes: Annotated[float, Gt(0), Resume.FREE] = 10
    compile: bool = False
    dry_run: Annotated[bool, Resume.FREE] = False
    profiler: Annotated[Literal["simple", "advanced", "pytorch"] | None, Resume.FREE] = None
    enable_progress_bar: Annotated[bool, Resume.FREE] = True
    detect_anomaly: bool = False

    def problems(self) -> list[str]:
        """Return what is wrong with ``trainer``, one sentence each."""
        if self.max_epochs is None and self.max_steps is None:
            return ["trainer.max_epochs and trainer.max_steps are both null; give at least one"]
        return []


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """The group ``kernels``.

    Args:
        memory_budget: MiB that the logits of a chunk of tokens, and all that is made of them, may take.
    """

    memory_budget: Annotated[float, Gt(0)] = MEMORY_BUDGET


@dataclass(frozen=True)
class StepSettings:
    """The groups of the config on which the cost of a step depends."""

    loss: Loss
    data: InstructionData | TextData
    model: ModelSettings
    trainer: TrainerSettings
    kernels: KernelSettings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A checked run.

    Args:
        name: of the run, such as ``study/stage``.
        seed: of everything random in training.
        delta_weight: a number, or the config of a schedule; the loss holds it already.
        objective: the metric asked for; None: see ``metric``.
        run_dir: where everything goes; None: a directory of its own under ``outputs/``.
        resume: go on where the run in ``run_dir`` stopped.
        model: the models that the config names.
        specs: role -> model, of those to load: the student and the references that the loss reads.
        data: where the rows come from, and how they are tokenised.
        trainer: how long, how often, on what.
        strategy: how the run is spread over processes.
        kernels: memory of the chunked loss.
        reference: where the references' hidden states come from.
        evaluation: what the trained student is asked.
        deviations: in what the evaluation differs from the protocol that it claims to follow.
        optim: optimiser and schedule.
        loss: the loss.
        loss_name: the name of its YAML.
        logger: name -> what makes the logger.
        callbacks: name -> a Lightning callback of the user's.
        record: the resolved config as plain dicts and lists: written to ``config.yaml``, logs and the model card, and
            read by nobody below ``config``.
    """

    name: Annotated[str, Resume.FREE]
    seed: Annotated[int, Ge(0)]
    delta_weight: Any
    objective: str | None
    run_dir: Annotated[str | None, Resume.FREE]
    resume: Annotated[bool, Resume.FREE]
    model: ModelSettings
    specs: Mapping[str, ModelSpec]
    data: InstructionData | TextData
    trainer: TrainerSettings
    strategy: StrategySettings
    kernels: KernelSettings
    reference: LiveSettings | CacheSettings | ReferenceSettings
    evaluation: EvaluationSettings
    deviations: tuple[str, ...]
    optim: AdamW
    loss: Loss
    loss_name: str
    logger: Annotated[Mapping[str, MakeLogger], Resume.FREE]
    callbacks: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def cache(self) -> CacheSettings | None:
        """The cache that the references are read from, or stored in; None: they are live, or not read."""
        return self.reference if isinstance(self.reference, CacheSettings) and self.loss.requires else None

    @property
    def generates_on_validation(self) -> bool:
        """True if answers are generated during training: text data has no prompts to answer."""
        return self.evaluation.generate and isinstance(self.data, InstructionData)

    @property
    def metric(self) -> str:
        """The metric that chooses the best checkpoint: the objective asked for, else the best there is.

        That is the main score of the answers to the validation rows; a loss where nothing is generated; and
        ``train/loss`` without validation data, whatever was asked for.
        """
        if not self.data.validates:
            return "train/loss"
        if self.objective is not None:
            return self.objective
        if self.generates_on_validation:
            return f"val/{SCORERS[self.evaluation.val_scorer].main}"
        # The values of a loss that changes with training can't be compared between steps.
        return "val/ce" if self.loss.schedules else "val/loss"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What a reader of the model card looks for, as it stands in the config."""
        groups = {
            key: value for key, value in self.record.items() if key in ("delta_weight", "loss", "optim", "trainer")
        }
        lora = {} if self.model.lora is None else {"lora": asdict(self.model.lora)}
        limits = ("max_length", "max_prompt_length", "overlong", "batch_size")
        return groups | lora | {"data": {key: getattr(self.data, key) for key in limits if hasattr(self.data, key)}}

    @property
    def metric_mode(self) -> Literal["min", "max"]:
        """``max`` for scores of answers, ``min`` for losses."""
        return "max" if self.metric in SCORES else "min"


#: Which keys of a run's config may differ when it is resumed.
RESUME_POLICY = ResumePolicy(
    always=tuple(keys_with(RunSettings, Resume.FREE)),
    until_finished=tuple(keys_with(RunSettings, Resume.UNFINISHED)),
)
