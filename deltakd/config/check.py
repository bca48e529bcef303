"""From a composed config to checked, typed parts, before any weight is loaded; all problems are reported at once."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deltakd.data import DataConfig, InstructionData
from deltakd.distributed.launchers import alone_problems, launch_problems, read_launch
from deltakd.distributed.strategies import strategy_problems
from deltakd.evaluation import SCORERS
from deltakd.evaluation.settings import SCORES, Evaluation, make_evaluation, set_problems, typed
from deltakd.io.errors import ConfigError
from deltakd.io.hub import hub_reachable
from deltakd.models import LoraSpec, ModelSpec, load_config
from deltakd.models.quantization import student_problems
from deltakd.references import CacheSettings, CacheStore, References, live_problems
from deltakd.references.content import cache_problems
from deltakd.references.topk import topk_problems
from deltakd.training.optim import AdamW
from deltakd.types import ROLES, STUDENT, STUDENT_RAW, Loss, LossOutput, is_reference_role, require_kind

log = logging.getLogger(__name__)

#: Keys of ``model`` that are no role.
_MODEL_KEYS = ("tokenizer", "lora", "attn_implementation", "gradient_checkpointing", "trust_remote_code")


#: The objective of ``conf/train.yaml``.
DEFAULT_OBJECTIVE = "val/rougeL"

#: Where a study puts the models that its later stages start from.
_STAGE_STUDENT = re.compile(r"outputs/(?P<study>[^/]+)/[^/]+/student")


@dataclass(frozen=True)
class Plan:
    """A checked run.

    Args:
        config: resolved, as plain dicts and lists; this is what ``config.yaml`` holds.
        loss: the loss.
        optim: optimiser and schedule.
        data: the data group.
        evaluation: the evaluation group.
        specs: the student and the references to load.
        lora: the student's adapter, or None.
        make_references: models by role -> source of references.
        cache: where the references are read from, or stored; None: they are live, or not read.
    """

    config: dict[str, Any]
    loss: Loss
    optim: AdamW
    data: DataConfig
    evaluation: Evaluation
    specs: dict[str, ModelSpec]
    lora: LoraSpec | None
    make_references: Callable[..., References]
    cache: CacheSettings | None = None

    @property
    def generates_on_validation(self) -> bool:
        """Whether answers are generated during training: text data has no prompts to answer."""
        return self.evaluation.generate and isinstance(self.data, InstructionData)

    @property
    def objective(self) -> str:
        """The metric that decides; a loss where nothing is generated, ``train/loss`` without validation data.

        The default stands for the main metric of what scores the answers.
        """
        wanted = str(self.config["objective"])
        if not self.data.validates:
            return "train/loss"
        if wanted in SCORES and not self.generates_on_validation:
            # The values of a loss that changes with training can't be compared between steps.
            return "val/ce" if self.loss.schedules else "val/loss"
        return f"val/{SCORERS[self.evaluation.scorer].main}" if wanted == DEFAULT_OBJECTIVE else wanted

    @property
    def objective_mode(self) -> str:
        """``max`` for scores of answers, ``min`` for losses."""
        return "max" if self.objective in SCORES else "min"


def make_plan(
    cfg: DictConfig, roles: Collection[str] | None = None, needs_prompts: bool = False, makes_cache: bool = False
) -> Plan:
    """Check a composed config and build its cheap parts.

    Args:
        cfg: the config.
        roles: the references to load; None: those that the loss reads, and none where a cache has them.
        needs_prompts: whether plain text, which has no prompts to answer, is a problem.
        makes_cache: whether the references are loaded to be stored in the cache that ``reference`` names.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    problems: list[str] = []
    try:
        config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split())]) from None
    config["evaluation"]["sets"] = config["evaluation"]["sets"] or config["data"].get("sets") or {}
    loss = _build_loss(config["loss"], problems)
    optim = _build(config["optim"], "optim", problems)
    data = _build(config["data"], "data", problems)
    references = _build(config["reference"], "reference", problems)
    evaluation = make_evaluation(config["evaluation"], problems)
    lora = typed(LoraSpec, config["model"]["lora"], "model.lora", problems) if config["model"]["lora"] else None
    cache = references if isinstance(references, CacheSettings) and roles is None else None
    if makes_cache:
        problems += _caching_problems(cache, config, loss)
    elif cache is not None and loss is not None and loss.requires:
        problems += cache_problems(config, loss, cache)
        roles = ()
    if roles is None and loss is not None:
        roles = loss.requires
    # The raw student of a cache is a model of its own: there is no adapter to switch off.
    specs = _specs(config["model"], roles, None if makes_cache else lora, problems)
    if needs_prompts and data is not None and not isinstance(data, InstructionData):
        problems.append("data is plain text, which has no prompts to answer; give data=instruction and data.train=...")
    if config["trainer"]["dry_run"] and (needs_prompts or makes_cache):
        problems.append("trainer.dry_run says what a training will need; give it to deltakd.train")
    problems += set_problems(evaluation, data)
    if "sharding" in config["reference"]:
        problems += live_problems(config["reference"], specs)
    for part in (optim, data, lora, cache):
        problems += part.problems() if part is not None else []
    problems += _trainer_problems(config["trainer"]) + strategy_problems(config["strategy"])
    launch = read_launch(os.environ)
    if needs_prompts or makes_cache:
        problems += alone_problems(launch)
    elif not config["trainer"]["dry_run"]:
        problems += launch_problems(launch, config["trainer"]["devices"], config["trainer"]["num_nodes"])
    budget = config["kernels"]["memory_budget"]
    if not isinstance(budget, int | float) or not budget > 0:
        problems.append(f"kernels.memory_budget is {budget!r}; it must be a number of MiB above 0")
    problems += _objective_problems(str(config["objective"]), loss, _try_loss(loss, problems))
    if evaluation.generate and isinstance(data, InstructionData):
        problems += _score_problems(str(config["objective"]), evaluation.scorer)
    if problems:
        raise ConfigError(problems)
    return Plan(config, loss, optim, data, evaluation, specs, lora, references, cache if loss.requires else None)


def _caching_problems(cache: CacheSettings | None, config: dict[str, Any], loss: Loss | None) -> list[str]:
    """Why no cache can be made; what is there already must be of the same content."""
    if cache is None:
        return ["reference is not a cache; add reference=cached reference.path=DIR"]
    if loss is None:
        return []
    if not loss.requires:
        return ["the loss reads no references, so there is nothing to cache; give the loss that will be trained"]
    if cache.path and CacheStore.is_at(Path(cache.path)):
        return cache_problems(config, loss, cache, adding=True)
    return topk_problems(loss) if cache.store == "topk" else []


def _build(node: Any, name: str, problems: list[str]) -> Any:
    """Instantiate one group; what its constructor refuses becomes a problem."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        # Hydra knows which node it was: the constructor's message names its argument alone.
        node_key = re.search(r"full_key: (\S+)", str(error))
        where = f"{name}.{node_key[1]}" if node_key else name
        problems.append(f"{where}: {' '.join(str(cause).split())}")
        return None


def _build_loss(node: Any, problems: list[str]) -> Any:
    """Instantiate the loss; None, and a problem, if it is no ``Loss``."""
    loss = _build(node, "loss", problems)
    if loss is None:
        return None
    try:
        require_kind(loss, Loss, "loss")
    except ValueError as error:
        problems.append(str(error))
        return None
    return loss


def _specs(
    config: dict[str, Any], requires: Collection[str] | None, lora: LoraSpec | None, problems: list[str]
) -> dict[str, ModelSpec]:
    allowed = f"{', '.join(ROLES)}, and further pairs teacher_2, teacher_raw_2, ..."
    unknown = [key for key in config if not (key in (STUDENT, *_MODEL_KEYS) or is_reference_role(key))]
    if unknown:
        problems.append(f"model has {', '.join(unknown)}, which is no role; roles are {allowed}")
    if requires is None:
        return {}
    strange = sorted(role for role in requires if not is_reference_role(role))
    if strange:
        problems.append(f"the loss requires {', '.join(strange)}, which is no role; roles are {allowed}")
    own_adapter = {STUDENT_RAW} if lora is not None else set()
    wanted = {STUDENT, *requires} - own_adapter - set(strange)
    absent = sorted(wanted - set(config))
    problems += [f"the loss reads {role}, which the config lacks; add +model.{role}={{path: ...}}" for role in absent]
    needed = [role for role in (*ROLES, *sorted(wanted - set(ROLES))) if role in wanted - set(absent)]
    specs = {role: typed(ModelSpec, config[role], f"model.{role}", problems) for role in needed}
    for role in ("teacher", "teacher_raw"):
        if role not in needed and config[role]["path"]:
            log.info("model.%s.path is given, but this run does not read it: it is not loaded.", role)
    if STUDENT_RAW in specs and specs[STUDENT].init == "random":
        problems.append("the loss reads student_raw, but a student with init=random has no raw self; give both a path")
    unmade = _unmade_stages(specs)
    found = [p for role, spec in specs.items() if role not in unmade for p in spec.problems(role)]
    found += _say_how_to_make(unmade)
    problems += found
    if not found:
        problems += _unreachable(specs, config["trust_remote_code"])
    if STUDENT in specs:
        problems += student_problems(specs[STUDENT].quantization, config["lora"] is not None)
    problems += [
        f"model.{role}.init=random: a reference has to have learnt something; give model.{role}.path"
        for role, spec in specs.items()
        if role != STUDENT and spec.init == "random"
    ]
    train_on = config["tokenizer"]["train_on"]
    if train_on and specs[STUDENT].init == "pretrained":
        problems.append(
            "model.tokenizer.train_on is given for a pretrained student, but its weights know its own tokens "
            "only; remove it"
        )
    if STUDENT in specs and specs[STUDENT].init == "random" and not (train_on or specs[STUDENT].tokenizer):
        problems.append(
            "a student with init=random needs a tokenizer: model.student.tokenizer=<directory>, or "
            "model.tokenizer.train_on=<text files>"
        )
    return specs


def _unmade_stages(specs: dict[str, ModelSpec]) -> dict[str, str]:
    """Role -> path, where the path is a stage's student of a study that has not been run yet."""
    return {
        role: spec.path
        for role, spec in specs.items()
        if spec.path and _STAGE_STUDENT.fullmatch(spec.path) and not Path(spec.path).is_dir()
    }


def _say_how_to_make(unmade: dict[str, str]) -> list[str]:
    """One sentence a study: which of its models are missing, and the command that makes them."""
    studies: dict[str, list[str]] = {}
    for role, path in unmade.items():
        found = _STAGE_STUDENT.fullmatch(path)
        assert found is not None
        studies.setdefault(found["study"], []).append(f"model.{role}.path={path}")
    return [
        f"the models of the study {study} are not there yet ({', '.join(named)}); one command makes them: "
        f"python -m deltakd.study experiments/{study}"
        for study, named in studies.items()
    ]


def _unreachable(specs: dict[str, ModelSpec], trust_remote_code: bool) -> list[str]:
    """Fetch each configuration; the models that can't be had are named together in one sentence."""
    missing: dict[str, ValueError] = {}
    for role, spec in specs.items():
        if spec.init == "pretrained":
            try:
                load_config(role, spec, trust_remote_code=trust_remote_code)
            except ValueError as error:
                missing[role] = error
    on_hub = [role for role in missing if not Path(str(specs[role].path)).is_dir()]
    if hub_reachable() or len(on_hub) < 2:
        return [str(error) for error in missing.values()]
    named = ", ".join(f"model.{role}.path={specs[role].path}" for role in on_hub)
    return [str(missing[role]) for role in missing if role not in on_hub] + [
        f"these models are not in the local cache, and the Hugging Face hub can't be reached: {named}; "
        "to use local copies give model.<role>.path=/path/to/model_directory"
    ]


def _trainer_problems(trainer: dict[str, Any]) -> list[str]:
    found = []
    if trainer["max_epochs"] is None and trainer["max_steps"] is None:
        found.append("trainer.max_epochs and trainer.max_steps are both null; give at least one")
    for name in ("max_epochs", "max_steps", "accumulate_grad_batches", "val_every_n_steps", "log_every_n_steps"):
        value = trainer[name]
        if value is not None and not isinstance(value, int | float):
            found.append(f"trainer.{name} is {value!r}; it must be a number")
        elif value is not None and value <= 0:
            found.append(f"trainer.{name} is {value}; it must be above 0")
    if trainer["profiler"] not in (None, "simple", "advanced", "pytorch"):
        found.append(f"trainer.profiler is {trainer['profiler']!r}; allowed: null, simple, advanced, pytorch")
    clip = trainer["gradient_clip_val"]
    if clip is not None and clip < 0:
        found.append(f"trainer.gradient_clip_val is {clip}; it must be at least 0 (null or 0: no clipping)")
    return found


def _try_loss(loss: Loss | None, problems: list[str]) -> list[str]:
    """The names of the loss's parts, from a try on random logits; a loss that breaks its contract is a problem."""
    if loss is None:
        return []
    logits = {role: torch.randn(2, 8) for role in (STUDENT, *loss.requires)}
    try:
        output = loss(logits, torch.tensor([1, 2]))
    # A plug-in may raise anything; here it costs a sentence, in the first step it would cost the loading of models.
    except Exception as error:
        problems.append(f"loss: it fails on random logits [2, 8] for {sorted(logits)}: {type(error).__name__}: {error}")
        return []
    if not isinstance(output, LossOutput) or output.per_token.shape != (2,):
        problems.append("loss: it must return a LossOutput whose per_token is [N], one number (nats) a token")
        return []
    return list(output.parts)


def _objective_problems(objective: str, loss: Loss | None, parts: list[str]) -> list[str]:
    moving = [] if loss is None else sorted(loss.schedules)
    if moving and objective.startswith("val/") and objective not in (*SCORES, "val/ce"):
        return [
            f"objective is {objective}, but {', '.join(moving)} changes with training, so its values can't be compared "
            f"between steps; allowed are {', '.join(SCORES)}, val/ce"
        ]
    allowed = [*SCORES, "val/loss", *(f"val/{name}" for name in parts)]
    if objective in allowed:
        return []
    return [
        f"objective is {objective!r}; the best checkpoint is chosen on validation data, never on a test set: "
        f"allowed are {', '.join(allowed)}"
    ]


def _score_problems(objective: str, scorer: str) -> list[str]:
    """An objective that the answers to the validation rows have no score of."""
    given = [f"val/{metric}" for metric in SCORERS[scorer].metrics] if scorer in SCORERS else [objective]
    if objective not in SCORES or objective in (DEFAULT_OBJECTIVE, *given):
        return []
    return [
        f"objective is {objective}, but evaluation.scorer={scorer} gives {', '.join(given)}; "
        f"give objective=val/{SCORERS[scorer].main}"
    ]
