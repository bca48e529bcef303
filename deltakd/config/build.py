"""From a composed config to typed settings: the only place where a config becomes objects.

Everything that is wrong is reported at once, before any weight is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deltakd.config.check import (
    caching_problems,
    model_problems,
    objective_problems,
    role_problems,
    specs_to_load,
    try_loss,
)
from deltakd.config.compose import CONF_DIR
from deltakd.config.instantiate import built
from deltakd.config.loss_names import loss_name, read_losses
from deltakd.config.protocols import deviations, make_evaluation
from deltakd.data import InstructionData, TextData
from deltakd.distributed.devices import training_problems
from deltakd.distributed.launchers import alone_problems, launch_problems, read_launch
from deltakd.distributed.settings import StrategySettings
from deltakd.io.errors import ConfigError
from deltakd.io.typed import mismatch, typed
from deltakd.models import LoraSpec, ModelSettings, ModelSpec
from deltakd.models.settings import TokenizerSettings
from deltakd.references import CacheSettings
from deltakd.references.content import cache_problems
from deltakd.references.settings import device_problems
from deltakd.training.optim import AdamW
from deltakd.training.settings import KernelSettings, RunSettings, StepSettings, TrainerSettings
from deltakd.types import TEACHER, Loss, require_kind

#: Keys of ``model`` that are no role.
_NO_ROLES = ("tokenizer", "lora", "attn_implementation", "gradient_checkpointing", "trust_remote_code")

#: Keys of the config itself, beside its groups.
_OWN_KEYS = {
    "name": str,
    "seed": Annotated[int, Ge(0)],
    "delta_weight": float | Mapping[str, Any],
    "objective": str | None,
    "run_dir": str | None,
    "resume": bool | Literal["force"],
}


def make_settings(cfg: DictConfig, *, on_this_machine: bool = True) -> RunSettings:
    """Check a composed config for a training run, and make its settings.

    Args:
        cfg: the config.
        on_this_machine: the devices that it names have to be here; False for estimates.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    draft = _Draft(resolved(cfg), copied_keys(cfg))
    if draft.cache is not None and draft.loss is not None and draft.loss.requires:
        draft.problems += cache_problems(draft.model, draft.loss, draft.cache)
        roles: Collection[str] | None = ()
    else:
        roles = None if draft.loss is None else draft.loss.requires
    if not draft.dry_run:
        if on_this_machine:
            draft.check_devices()
        launch = read_launch(os.environ)
        if draft.trainer is not None:
            draft.problems += launch_problems(launch, draft.trainer.devices, draft.trainer.num_nodes)
    return draft.settings(roles, has_adapter=draft.model.lora is not None)


def make_caching_settings(cfg: DictConfig) -> RunSettings:
    """Check a composed config for ``deltakd.cache``: the references of its loss are loaded, to be stored.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    draft = _Draft(resolved(cfg), copied_keys(cfg))
    draft.problems += caching_problems(draft.reference, draft.model, draft.loss)
    draft.check_alone()
    # The raw student of a cache is a model of its own: there is no adapter to switch off.
    return draft.settings(None if draft.loss is None else draft.loss.requires, has_adapter=False)


def make_answering_settings(cfg: DictConfig) -> RunSettings:
    """Check a composed config for ``deltakd.generate``: the teacher is loaded, to answer the training prompts.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    draft = _Draft(resolved(cfg), copied_keys(cfg))
    if isinstance(draft.data, TextData):
        draft.problems.append(
            "data is plain text, which has no prompts to answer; give data=instruction and data.train=..."
        )
    draft.check_alone()
    return draft.settings({TEACHER}, has_adapter=draft.model.lora is not None)


def make_evaluation_settings(cfg: DictConfig) -> RunSettings:
    """Check a composed config for ``deltakd.evaluate``: nothing is trained, and no reference has to be there.

    Raises:
        ConfigError: every problem found, one sentence each.
    """
    draft = _Draft(resolved(cfg), copied_keys(cfg))
    draft.problems += alone_problems(read_launch(os.environ))
    if draft.evaluation is not None:
        draft.problems += draft.evaluation.problems(draft.data)
        if not draft.evaluation.sets:
            draft.problems.append("nothing to evaluate; give 'evaluation.sets={name: file.jsonl}'")
    if draft.problems:
        raise ConfigError(draft.problems)
    return draft.made({})


def make_step_settings(cfg: DictConfig) -> StepSettings:
    """Make what the cost of a step depends on; paths of models and data are not looked at.

    Raises:
        ConfigError: values of another type.
    """
    draft = _Draft(resolved(cfg), copied_keys(cfg))
    if draft.problems:
        raise ConfigError(draft.problems)
    assert draft.trainer is not None
    assert draft.kernels is not None
    return StepSettings(draft.loss, draft.data, draft.model, draft.trainer, draft.kernels)


def read_strategy(name: str) -> StrategySettings:
    """Read ``conf/strategy/<name>.yaml``."""
    made = typed(
        StrategySettings, OmegaConf.to_container(OmegaConf.load(CONF_DIR / "strategy" / f"{name}.yaml")), "strategy", []
    )
    assert made is not None, f"conf/strategy/{name}.yaml is wrong"
    return made


def stored_settings(path: Path) -> RunSettings:
    """Make the settings of a finished run from its ``config.yaml``; its models and data may be gone.

    Raises:
        ConfigError: the file can't be read, or is not one that this version writes.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError([f"{path} can't be read: {' '.join(str(error).split())}"]) from None
    draft = _Draft(config)
    if draft.problems:
        raise ConfigError([f"{path}: {problem}" for problem in draft.problems])
    return draft.made(specs_to_load(draft.model, draft.loss.requires, draft.model.lora is not None, []))


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as plain dicts and lists, without interpolations; the sets of the data stand for none given.

    Raises:
        ConfigError: an interpolation leads nowhere, or a mandatory value is missing.
    """
    try:
        config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split())]) from None
    if isinstance(config.get("evaluation"), dict) and isinstance(config.get("data"), dict):
        config["evaluation"]["sets"] = config["evaluation"].get("sets") or config["data"].get("sets") or {}
    return config


def _built_loss(node: Any, problems: list[str]) -> Any:
    loss = built(node, "loss", problems)
    try:
        if loss is not None:
            require_kind(loss, Loss, "loss")
    except ValueError as error:
        problems.append(str(error))
        return None
    return loss


def copied_keys(cfg: DictConfig, prefix: str = "") -> set[str]:
    """Return the dotted keys whose value is copied from another key."""
    found: set[str] = set()
    for key in cfg:
        name = prefix + str(key)
        if OmegaConf.is_interpolation(cfg, str(key)):
            found.add(name)
        elif isinstance(node := cfg._get_node(str(key)), DictConfig) and not node._is_none():
            found |= copied_keys(node, f"{name}.")
    return found


def _value_in(problem: str) -> str:
    return problem.partition(" is ")[2].partition(";")[0]


class _Draft:
    """Settings in the making: each group built if it can be, and the problems so far."""

    def __init__(self, config: dict[str, Any], copies: Collection[str] = ()) -> None:
        self.config = config
        self.copies = copies
        self.problems: list[str] = []
        for key, hint in _OWN_KEYS.items():
            self.problems += mismatch(hint, config[key], key)
        self.loss: Any = _built_loss(config["loss"], self.problems)
        self.optim: Any = built(config["optim"], "optim", self.problems)
        self.data: Any = built(config["data"], "data", self.problems)
        self.reference: Any = built(config["reference"], "reference", self.problems)
        self.evaluation = make_evaluation(config["evaluation"], self.problems)
        self.model = make_model_settings(config["model"], self.problems)
        self.trainer = typed(TrainerSettings, config["trainer"], "trainer", self.problems)
        self.strategy = typed(StrategySettings, config["strategy"], "strategy", self.problems)
        self.kernels = typed(KernelSettings, config["kernels"], "kernels", self.problems)
        self.logger = _built_each(config["logger"], "logger", self.problems)
        self.callbacks = _built_each(config["callbacks"], "callbacks", self.problems)
        #: Keys whose values were left out: what is said of a group without them would mislead.
        self.refused = {problem.partition(" ")[0] for problem in self.problems}
        self._leave_out_copies(copies)

    def _leave_out_copies(self, copies: Collection[str]) -> None:
        """A wrong value that other keys copy is told once, of the key that was given."""
        of_keys = [(problem.partition(" ")[0], problem) for problem in self.problems]
        given = {_value_in(problem) for key, problem in of_keys if key not in copies}
        self.problems = [p for key, p in of_keys if key not in copies or _value_in(p) not in given]

    @property
    def cache(self) -> CacheSettings | None:
        return self.reference if isinstance(self.reference, CacheSettings) else None

    @property
    def dry_run(self) -> bool:
        return self.trainer is not None and self.trainer.dry_run

    def check_devices(self) -> None:
        """The devices that the config names have to be there."""
        if self.trainer is not None:
            self.problems += training_problems(self.trainer.accelerator)
        placement = getattr(self.reference, "placement", "auto")
        if placement != "auto":
            self.problems += device_problems("reference.placement", placement)

    def check_alone(self) -> None:
        """For commands that are one process and no training."""
        if self.dry_run:
            self.problems.append("trainer.dry_run says what a training will need; give it to deltakd.train")
        self.problems += alone_problems(read_launch(os.environ))

    def settings(self, roles: Collection[str] | None, has_adapter: bool) -> RunSettings:
        """Check what concerns several groups, and put everything together.

        Raises:
            ConfigError: everything that is wrong.
        """
        problems = self.problems
        problems += role_problems(self.model.specs, () if self.loss is None else self.loss.requires)
        known = roles if roles is None else [role for role in roles if role in self.model.specs or "teacher" in role]
        specs = specs_to_load(self.model, known, has_adapter, problems)
        problems += model_problems(self.model, specs)
        if self.evaluation is not None:
            problems += self.evaluation.problems(self.data)
        if self.reference is not None:
            problems += self.reference.problems(specs)
        for part in (self.optim, self.data, self.trainer, self.strategy):
            problems += part.problems() if part is not None else []
        parts = try_loss(self.loss, problems)
        objective = self.config["objective"]
        if objective is None or isinstance(objective, str):
            problems += objective_problems(objective, self.data, self.evaluation, self.loss, parts)
        if problems:
            raise ConfigError(self.told())
        return self.made(specs)

    def told(self) -> list[str]:
        """Return the problems, each once, without those that come of a value that was left out."""
        first: dict[str, str] = {}
        for problem in self.problems:
            key = problem.partition(" ")[0]
            if key in self.refused and key not in self.copies:
                first.setdefault(key, problem)
        misleading = [re.compile(rf"(?<![\w.]){re.escape(key)}(?![\w.])") for key in self.refused if "." in key]

        def follows(problem: str) -> bool:
            return problem not in first.values() and any(key.search(problem) for key in misleading)

        return [problem for problem in dict.fromkeys(self.problems) if not follows(problem)]

    def made(self, specs: Mapping[str, ModelSpec]) -> RunSettings:
        """Put everything together; every group has been built."""
        assert isinstance(self.data, InstructionData | TextData)
        assert isinstance(self.optim, AdamW)
        # A group without a problem is built.
        assert self.trainer is not None
        assert self.strategy is not None
        assert self.kernels is not None
        assert self.evaluation is not None
        return RunSettings(
            **{key: self.config[key] for key in _OWN_KEYS},
            model=self.model,
            specs=specs,
            data=self.data,
            trainer=self.trainer,
            strategy=self.strategy,
            kernels=self.kernels,
            reference=self.reference,
            evaluation=self.evaluation,
            deviations=deviations(self.evaluation),
            optim=self.optim,
            loss=self.loss,
            loss_name=loss_name(self.config["loss"], read_losses(CONF_DIR / "loss")),
            logger=self.logger,
            callbacks=self.callbacks,
            record=self.config,
        )


def make_model_settings(node: Mapping[str, Any], problems: list[str]) -> ModelSettings:
    """Make the settings of the group ``model``; values of another type are left out, and become problems."""
    specs = {
        role: typed(ModelSpec, entry, f"model.{role}", problems)
        for role, entry in node.items()
        if role not in _NO_ROLES
    }
    own = {key: node[key] for key in _NO_ROLES if key in node}
    for key, kind in (("tokenizer", TokenizerSettings), ("lora", LoraSpec)):
        if own.get(key) is not None:
            own[key] = typed(kind, own[key], f"model.{key}", problems)
    own = {key: value for key, value in own.items() if value is not None or key not in ("tokenizer", "lora")}
    made = typed(ModelSettings, own | {"specs": {r: s for r, s in specs.items() if s is not None}}, "model", problems)
    assert made is not None, "every field has a default"
    return made


def _built_each(node: Any, key: str, problems: list[str]) -> dict[str, Any]:
    """Build the entries of a group that is a mapping of names; None and an empty mapping are nothing."""
    if node is not None and not isinstance(node, Mapping):
        problems.append(f"{key} is {node!r}; it must be a mapping of names, or null")
        return {}
    made = {str(name): built(entry, f"{key}.{name}", problems) for name, entry in (node or {}).items()}
    return {name: one for name, one in made.items() if one is not None}
