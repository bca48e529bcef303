"""Distillation from Python: ``distill(student=..., data=...)``, and the parts of a run for your own trainer.

Configs are composed and checked as for ``deltakd.train``, just without the command line.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deltakd.cli import quiet_libraries
from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config, set_values
from deltakd.config.folders import CONFIG_DIR_VARIABLE, is_group, use_config_dir
from deltakd.config.given_objects import Given, as_source, saved_model
from deltakd.config.short_names import SHORT_NAMES
from deltakd.data.batches.data_module import DistillationData
from deltakd.distributed.ranks import agreed, is_main_process, launch_id
from deltakd.distributed.strategies import count_ranks
from deltakd.io.errors import ConfigError, Stopped
from deltakd.io.files import make_folder
from deltakd.io.garbage import nothing_left
from deltakd.io.run_directory import RUN_DIR_VARIABLE, RunDirectory
from deltakd.training.assembly import load_parts
from deltakd.training.fit import make_data, make_module
from deltakd.training.module import DistillationModule
from deltakd.training.run import run_training
from deltakd.training.settings import RunSettings

log = logging.getLogger(__name__)

_ROLES = ("student", "teacher", "teacher_raw", "student_raw")
_SOURCES = ("data", "val")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        directory: ``student/``, ``config.yaml``, ``summary.json``, ``metrics.csv``, ``generations/``.
        summary: ``summary.json``: scores, and ``meta``: parameters, tokens, seconds, ...
    """

    directory: Path
    summary: Mapping[str, Any]

    @property
    def scores(self) -> dict[str, float]:
        """All scores of the student by name (``val/loss``, ``test/rougeL``, ...), with their standard errors."""
        return {name: value for name, value in self.summary.items() if name != "meta"}

    @property
    def objective(self) -> str:
        """The score that chose the best checkpoint."""
        return str(self.summary["meta"]["objective"])

    @cached_property
    def student(self) -> PreTrainedModel:
        """The best student, loaded from ``directory/student`` on the CPU, in eval mode."""
        return AutoModelForCausalLM.from_pretrained(self.directory / "student")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer."""
        return AutoTokenizer.from_pretrained(self.directory / "student")

    def __repr__(self) -> str:
        value = self.summary.get(self.objective)
        shown = f"{value:.4g}" if isinstance(value, float) else value
        return f"<deltakd run {self.directory}: {self.objective} = {shown}>"


@dataclass(frozen=True)
class Prepared:
    """The parts of a run, for your own ``lightning.Trainer``.

    Args:
        module: the LightningModule; ``module.student.hf`` is the transformers model (with LoRA: PEFT's).
        data: the data module.
        tokenizer: the student's.
        settings: the run's checked settings.
    """

    module: DistillationModule
    data: DistillationData
    tokenizer: PreTrainedTokenizerBase
    settings: RunSettings

    @property
    def trainer_options(self) -> dict[str, Any]:
        """The arguments that a ``lightning.Trainer`` for these parts needs; the others are up to you.

        The data module hands out the whole run as one epoch, in an order that depends only on steps.
        """
        trainer = self.settings.trainer
        return {
            "max_epochs": 1,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "precision": trainer.precision,
            "use_distributed_sampler": False,
            "limit_val_batches": 0,
        }


def distill(
    student: Any = None,
    *,
    teacher: Any = None,
    teacher_raw: Any = None,
    student_raw: Any = None,
    data: Any = None,
    val: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    experiment: str | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    config_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **values: Any,
) -> Run:
    """Distil a student, export and evaluate it; the same run as ``deltakd train``, from Python.

    Defaults come from the experiment, then from ``conf/``. Called again with ``resume=True`` and the same ``run_dir``,
    it continues where it stopped; a finished run is only read.

    Args:
        student: the model to train: a hub id, a directory, or a loaded ``transformers`` model. A loaded model is not
            changed; the run, and any resumed run, reads a copy of it in ``data.cache_dir``.
        teacher: the fine-tuned model, likewise.
        teacher_raw: the teacher before its fine-tuning, likewise; delta losses read it.
        student_raw: the student before training, likewise; default: the model that the student starts from.
        data: training rows: a file, a hub data set, or a list of these; or the rows themselves, as a list of dicts, a
            ``datasets.Dataset`` or a ``pandas.DataFrame``.
        val: validation rows, likewise.
        tokenizer: for loaded models that do not know their tokenizer's name.
        experiment: a file of ``conf/experiment``, of deltakd or of ``config_dir``.
        overrides: every other key of the config: ``["optim.weight_decay=0", "evaluation=none"]`` as on the command
            line, or ``{"optim.weight_decay": 0, "evaluation": "none"}``.
        config_dir: a folder of configs of your own; ``./conf`` is found without it.
        resume: continue the run in ``run_dir``.
        progress: show a progress bar.
        **values: by short name: loss, delta_weight, template, max_length, max_prompt_length, batch_size, lr, max_steps
            (passes then count only if max_epochs is given, too), max_epochs, val_size, sets, seed, name, run_dir.

    Returns:
        The finished run: student, tokenizer, scores, directory.

    Raises:
        ConfigError: all problems with the settings at once, before any weights are loaded.
        ValueError: data or models that can't be used.
        NonFiniteLossError: the loss diverged.
        KeyboardInterrupt: Ctrl-C, or a notebook's stop button; the state is saved at the end of the current step.
    """
    roles = {"student": student, "teacher": teacher, "teacher_raw": teacher_raw, "student_raw": student_raw}
    given = roles | {"data": data, "val": val} | values
    extra: dict[str, Any] = {"resume": resume or None} | ({} if progress else {"trainer.enable_progress_bar": False})
    with _library(config_dir):
        cfg = _configure(given, extra, tokenizer, experiment, overrides)
        directory = _directory(cfg)
        os.environ[RUN_DIR_VARIABLE] = str(directory)
        how_to_resume = f"the same call with resume=True, run_dir={str(directory)!r}"
        try:
            with nothing_left():
                run_training(make_settings(cfg), directory, how_to_resume)
        except Stopped as stop:
            if stop.signum != signal.SIGINT:
                raise
            raise KeyboardInterrupt(f"{stop}. To continue: {how_to_resume}") from None
        except SystemExit as error:
            # Lightning exits like this at a second Ctrl-C; a notebook would take it for the end of its kernel.
            raise KeyboardInterrupt(f"interrupted. To continue from the last checkpoint: {how_to_resume}") from error
        return Run(directory, RunDirectory(directory).read_summary())


def prepare(
    student: Any = None,
    *,
    teacher: Any = None,
    teacher_raw: Any = None,
    student_raw: Any = None,
    data: Any = None,
    val: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    experiment: str | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    config_dir: str | Path | None = None,
    **values: Any,
) -> Prepared:
    """Load models and data of a run as a LightningModule and a data module, for your own ``lightning.Trainer``.

    Arguments and errors are the same as for ``distill``. Nothing is trained; you supply the trainer with its callbacks
    and loggers: ``lightning.Trainer(**run.trainer_options, ...).fit(run.module, datamodule=run.data)``. Validation
    rows are in ``run.data.val_loader()``; ``deltakd.training.callbacks.Validation`` measures the student on them.
    """
    roles = {"student": student, "teacher": teacher, "teacher_raw": teacher_raw, "student_raw": student_raw}
    given = roles | {"data": data, "val": val} | values
    with _library(config_dir):
        cfg = _configure(given, {}, tokenizer, experiment, overrides)
        settings = make_settings(cfg)
        directory = RunDirectory(_directory(cfg))
        make_folder(directory.path, "the run directory")
        parts = load_parts(settings, directory)
        trainer = settings.trainer
        loaded = make_data(parts, count_ranks(trainer.accelerator, trainer.devices, trainer.num_nodes))
        return Prepared(make_module(parts, loaded.total_steps), loaded, parts.tokenizer, settings)


def _configure(
    given: Mapping[str, Any],
    extra: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    experiment: str | None,
    overrides: Sequence[str] | Mapping[str, Any],
) -> DictConfig:
    """Compose a config: groups and text overrides first, then values, which need no quoting.

    Raises:
        ConfigError: unknown names, keys or choices, or rows or models of an unsupported kind.
    """
    unknown = sorted(set(given) - set(SHORT_NAMES))
    if unknown:
        known = ", ".join(SHORT_NAMES)
        raise ConfigError(
            [f"there is no argument {name!r}; give it by overrides, or one of {known}" for name in unknown]
        )
    if isinstance(overrides, str):
        raise ConfigError([f"overrides is {overrides!r}; give a list of strings, or a mapping of keys"])
    values = {SHORT_NAMES[name]: value for name, value in given.items() if value is not None}
    values |= {key: value for key, value in extra.items() if value is not None}
    texts = [] if isinstance(overrides, Mapping) else list(overrides)
    if "trainer.max_steps" in values:
        # Given max_steps, train that long, however many passes it takes; the config alone stops at the first limit.
        values = {SHORT_NAMES["max_epochs"]: None} | values
    values |= dict(overrides) if isinstance(overrides, Mapping) else {}
    groups = {key: values.pop(key) for key in list(values) if is_group(key) and not isinstance(values[key], Mapping)}
    chosen = [f"{key}={_choice(value)}" for key, value in groups.items()]
    cfg = compose_config("train", [*([f"experiment={experiment}"] if experiment else []), *chosen, *texts])
    objects = Given(Path(cfg.data.cache_dir or "outputs/cache"), tokenizer)
    problems: list[str] = []
    for name in (*_ROLES, *_SOURCES):
        key = SHORT_NAMES[name]
        if key in values:
            make = saved_model if name in _ROLES else as_source
            values[key] = make(name, values[key], objects, problems)
    if isinstance(values.get("data.sets"), Mapping):
        values["data.sets"] = {n: as_source(n, v, objects, problems) for n, v in values["data.sets"].items()}
    set_values(cfg, values, problems)
    if problems:
        raise ConfigError(problems)
    return cfg


def _choice(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def _directory(cfg: DictConfig) -> Path:
    """Return the run directory; all ranks' processes return the same."""
    if cfg.run_dir:
        return Path(cfg.run_dir)
    if not is_main_process() and launch_id() is None and RUN_DIR_VARIABLE in os.environ:
        # Lightning started this process for a further rank; it runs the same script.
        return Path(os.environ[RUN_DIR_VARIABLE])
    root = Path(f"outputs/{cfg.name}")
    job = launch_id()
    if job is not None:
        return root / job
    path = root / agreed("directory", f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    # Two short runs in a notebook may start in the same second.
    further = (path.with_name(f"{path.name}_{number}") for number in range(2, 1000))
    return path if not path.exists() else next(one for one in further if not one.exists())


@contextmanager
def _library(config_dir: str | Path | None) -> Iterator[None]:
    """Restore the process state that a run changes: signal handlers, log levels, the config folder."""
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    before = {name: os.environ.get(name) for name in (CONFIG_DIR_VARIABLE, RUN_DIR_VARIABLE)}
    use_config_dir(config_dir)
    show_log()
    try:
        with warnings.catch_warnings():
            quiet_libraries()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def show_log() -> None:
    """Print the log of deltakd, unless the program has set up logging itself."""
    own = logging.getLogger("deltakd")
    if own.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    own.addHandler(handler)
    own.setLevel(logging.INFO)
