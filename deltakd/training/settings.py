"""A whole run as typed, checked settings: ``conf/train.yaml`` and its groups.

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
from deltakd.io.keys import Method, Resume, Seed, keys_with
from deltakd.io.run_directory import ResumePolicy
from deltakd.kernels import KernelOptions
from deltakd.models.settings import ModelSettings, ModelSpec
from deltakd.references import CacheSettings, LiveSettings, ReferenceSettings, ServedSettings
from deltakd.references.routed import routed_roles
from deltakd.rollouts.settings import RolloutSettings
from deltakd.tracking.loggers import MakeLogger
from deltakd.training.optim import AdamW
from deltakd.types import Loss, Products

#: Values of ``trainer.precision``: Lightning's names.
Precision = Literal["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "32", "64", "16", "bf16"]

Positive = Annotated[int, Ge(1)]
#: Indices of devices as text.
Indices = Annotated[str, StringConstraints(pattern=r"^\d+(,\d+)*$"), "indices such as '0,1'"]


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """The group ``trainer``.

    Args:
        accelerator: auto, cpu, gpu, cuda, mps or xpu.
        devices: number of processes on this machine, indices of its devices, or ``auto``.
        num_nodes: number of machines.
        precision: Lightning's name.
        max_epochs: passes over the training rows; may be a fraction.
        max_steps: optimiser steps; the run ends with whichever limit comes first.
        accumulate_grad_batches: micro-batches per optimiser step.
        gradient_clip_val: maximum gradient norm; None or 0: no clipping.
        log_every_n_steps: optimiser steps between log entries.
        val_every_n_steps: optimiser steps between validations; None: once per pass. The last step is always validated.
        checkpoint_every_n_steps: in addition to the checkpoint after each validation.
        checkpoint_every_n_minutes: the same by the clock.
        threads: CPU threads of each process; None: one for tiny models on the CPU, else PyTorch's choice.
        compile: ``torch.compile`` the student.
        dry_run: only print how much memory the run needs.
        profiler: one of Lightning's.
        enable_progress_bar: show a progress bar.
        detect_anomaly: let PyTorch find the operation that made a NaN.
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
    val_every_n_steps: Annotated[Positive | None, Method.FREE] = None
    checkpoint_every_n_steps: Annotated[Positive | None, Resume.FREE] = None
    checkpoint_every_n_minutes: Annotated[float, Gt(0), Resume.FREE] = 10
    threads: Annotated[Positive | None, Resume.UNFINISHED] = None
    compile: bool = False
    dry_run: Annotated[bool, Resume.FREE] = False
    profiler: Annotated[Literal["simple", "advanced", "pytorch"] | None, Resume.FREE] = None
    enable_progress_bar: Annotated[bool, Resume.FREE] = True
    detect_anomaly: bool = False

    def problems(self) -> list[str]:
        """Return the problems with ``trainer``, one sentence each."""
        if self.max_epochs is None and self.max_steps is None:
            return ["trainer.max_epochs and trainer.max_steps are both null; give at least one"]
        return []


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """The group ``kernels``.

    Args:
        memory_budget: MiB for the logits of a chunk of tokens and everything computed from them; None: 256 on a CPU,
            a share of a GPU's memory.
        products: how a GPU multiplies heads: ``auto``, ``exact``, ``split``, ``tf32`` or ``float32``.
        triton: use Triton kernels on NVIDIA GPUs.
    """

    memory_budget: Annotated[float, Gt(0)] | None = None
    products: Literal["auto", "exact", "split", "tf32", "float32"] = "auto"
    triton: bool = True

    def options(self, precision: Precision | int) -> KernelOptions:
        """Return how to compute the loss in a run with a ``trainer.precision``."""
        if self.products != "auto":
            products = Products(self.products)
        else:
            products = Products.SPLIT if str(precision).endswith("-mixed") else Products.EXACT
        return KernelOptions(self.memory_budget, products, self.triton)


@dataclass(frozen=True)
class StepSettings:
    """The config groups that the cost of a step depends on."""

    loss: Loss
    data: InstructionData | TextData
    model: ModelSettings
    trainer: TrainerSettings
    kernels: KernelSettings
    rollout: RolloutSettings


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A checked run.

    Args:
        name: of the run, such as ``study/stage``.
        seed: of everything random in training.
        delta_weight: a number, or the config of a schedule; the loss holds it already.
        objective: the metric asked for; None: see ``metric``.
        run_dir: where everything goes; None: a directory of its own under ``outputs/``.
        resume: continue where the run in ``run_dir`` stopped; ``force``: even if its inputs have changed since.
        model: the models that the config names.
        specs: role -> model, of those to load: the student and the references that the loss reads.
        data: where the rows come from, and how they are tokenised.
        trainer: how long, how often, on what.
        strategy: how the run is spread over processes.
        kernels: memory and precision of the chunked loss.
        reference: where the references' hidden states come from.
        rollout: how many responses the student writes itself, and how.
        evaluation: how the trained student is evaluated.
        deviations: how the evaluation deviates from the protocol that it names.
        optim: optimiser and schedule.
        loss: the loss.
        loss_name: the name of its YAML.
        logger: name -> factory of a logger.
        callbacks: name -> one of the user's Lightning callbacks.
        record: the resolved config as plain dicts and lists, for ``config.yaml``, logs and the model card; no code
            below ``config`` depends on it.
    """

    name: Annotated[str, Resume.FREE]
    seed: Annotated[Seed, Method.FREE]
    # Losses that use it have it as a setting of their own.
    delta_weight: Annotated[Any, Method.FREE]
    objective: Annotated[str | None, Method.FREE]
    run_dir: Annotated[str | None, Resume.FREE]
    resume: Annotated[bool | Literal["force"], Resume.FREE]
    model: ModelSettings
    specs: Mapping[str, ModelSpec]
    data: InstructionData | TextData
    trainer: TrainerSettings
    strategy: StrategySettings
    kernels: Annotated[KernelSettings, Method.FREE]
    reference: Annotated[LiveSettings | CacheSettings | ServedSettings | ReferenceSettings, Method.FREE]
    rollout: RolloutSettings
    evaluation: Annotated[EvaluationSettings, Method.FREE]
    deviations: tuple[str, ...]
    optim: AdamW
    loss: Loss
    loss_name: str
    logger: Annotated[Mapping[str, MakeLogger], Resume.FREE]
    callbacks: Annotated[Mapping[str, Any], Method.FREE]
    record: Mapping[str, Any]

    @property
    def cache(self) -> CacheSettings | None:
        """The cache to read the references from or store them in; None: they are live, or the loss reads none."""
        return self.reference if isinstance(self.reference, CacheSettings) and self.loss.requires else None

    @property
    def read_roles(self) -> list[str]:
        """The references that the student learns from, sorted: the loss's, or with routes those of all pairs."""
        routes = self.model.routes
        return sorted(routed_roles(self.loss.requires, routes.values()) if routes else self.loss.requires)

    @property
    def served(self) -> ServedSettings | None:
        """The server of references to ask; None: they are elsewhere, or the loss reads none."""
        return self.reference if isinstance(self.reference, ServedSettings) and self.loss.requires else None

    @property
    def generates_on_validation(self) -> bool:
        """True if answers are generated during training; text data has no prompts to answer."""
        return self.evaluation.generate and isinstance(self.data, InstructionData)

    @property
    def metric(self) -> str:
        """The metric that chooses the best checkpoint: the user's objective, else the best one available.

        That is the main score of answers to the validation rows, or a validation loss if nothing is generated. Without
        validation data it is ``train/loss``, whatever the objective.
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
        """The settings that the model card lists."""
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


#: Which keys of a run's config may change on resume.
RESUME_POLICY = ResumePolicy(
    always=tuple(keys_with(RunSettings, Resume.FREE)),
    until_finished=tuple(keys_with(RunSettings, Resume.UNFINISHED)),
)

#: Keys that do not tell methods apart in a report.
NOT_THE_METHOD = (*keys_with(RunSettings, Resume.FREE), *keys_with(RunSettings, Method.FREE))
