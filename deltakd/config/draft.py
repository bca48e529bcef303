"""Settings under construction: the groups of a config, each built if possible, and the problems found."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, Literal, final

from deltakd.config.check import (
    engine_problems,
    model_problems,
    objective_problems,
    role_problems,
    rollout_problems,
    specs_to_load,
    stream_problems,
    try_loss,
)
from deltakd.config.check_routes import route_problems
from deltakd.config.check_serving import transport_problems
from deltakd.config.check_tokenizers import tokenizer_problems
from deltakd.config.instantiate import built
from deltakd.config.loss_names import known_losses, loss_name
from deltakd.config.problems import Problems
from deltakd.config.protocols import deviations, make_evaluation
from deltakd.data import InstructionData, TextData
from deltakd.distributed.devices import training_problems
from deltakd.distributed.launchers import alone_problems, read_launch
from deltakd.distributed.settings import StrategySettings
from deltakd.io.errors import ConfigError
from deltakd.io.keys import Seed
from deltakd.io.typed import mismatch, typed
from deltakd.models import LoraSpec, ModelSettings, ModelSpec
from deltakd.models.adapter_files import with_base
from deltakd.models.settings import TokenizerSettings
from deltakd.references import CacheSettings, ReferenceSettings, ServedSettings
from deltakd.references.settings import device_problems
from deltakd.rollouts.settings import RolloutSettings
from deltakd.training.optim import AdamW
from deltakd.training.settings import KernelSettings, RunSettings, TrainerSettings
from deltakd.types import STUDENT, Loss, is_reference_role, require_kind

#: Keys of ``model`` that are not roles.
_NO_ROLES = (
    "tokenizer",
    "lora",
    "attn_implementation",
    "gradient_checkpointing",
    "router_aux_loss_coef",
    "trust_remote_code",
    "routes",
)

#: The groups that a config must have.
_GROUPS = (
    "loss", "optim", "data", "reference", "rollout", "evaluation", "model", "trainer", "strategy", "kernels", "logger",
    "callbacks",
)  # fmt: skip

#: Top-level keys of the config that are not groups.
_OWN_KEYS = {
    "name": str,
    "seed": Seed,
    "delta_weight": float | Mapping[str, Any],
    "objective": str | None,
    "run_dir": str | None,
    "resume": bool | Literal["force"],
}


@final
class Draft:
    """Settings under construction: each group, built if possible, and the problems so far."""

    def __init__(self, config: dict[str, Any], copies: Collection[str] = ()) -> None:
        absent = [key for key in (*_OWN_KEYS, *_GROUPS) if key not in config]
        if absent:
            raise ConfigError([f"{key} is missing; a config can't be without it (leave out ~{key})" for key in absent])
        self.config = config
        problems = self.problems = Problems(copies)
        for key, hint in _OWN_KEYS.items():
            problems += mismatch(hint, config[key], key)
        self.loss: Any = _built(Loss, config["loss"], "loss", problems)
        self.optim: Any = _built(AdamW, config["optim"], "optim", problems)
        self.data: Any = _built((InstructionData, TextData), config["data"], "data", problems)
        self.reference: Any = _built(ReferenceSettings, config["reference"], "reference", problems)
        self.rollout = typed(RolloutSettings, config["rollout"], "rollout", problems)
        self.evaluation = make_evaluation(config["evaluation"], problems)
        self.model = make_model_settings(config["model"], problems)
        self.trainer = typed(TrainerSettings, config["trainer"], "trainer", problems)
        self.strategy = typed(StrategySettings, config["strategy"], "strategy", problems)
        self.kernels = typed(KernelSettings, config["kernels"], "kernels", problems)
        self.logger = _built_each(config["logger"], "logger", problems)
        self.callbacks = _built_each(config["callbacks"], "callbacks", problems)
        problems.close_types()

    @property
    def cache(self) -> CacheSettings | None:
        """The cache of references that the config names."""
        return self.reference if isinstance(self.reference, CacheSettings) else None

    @property
    def served(self) -> ServedSettings | None:
        """The server of references that the config names."""
        return self.reference if isinstance(self.reference, ServedSettings) else None

    @property
    def dry_run(self) -> bool:
        """True if only the run's memory estimate is requested."""
        return self.trainer is not None and self.trainer.dry_run

    def check_devices(self) -> None:
        """Add the devices that the config names and this machine lacks."""
        if self.trainer is not None:
            self.problems += training_problems(self.trainer.accelerator)
        self.check_transport()
        if self.reference is not None and self.reference.placement != "auto":
            self.problems += device_problems("reference.placement", self.reference.placement)

    def check_transport(self) -> None:
        """Add what keeps hidden states from travelling to or from a server here as the config says."""
        if self.served is not None and self.trainer is not None:
            self.problems += transport_problems(self.served, self.trainer)

    def check_alone(self, *, several: bool = False) -> None:
        """Add the problems for a command that trains nothing, and is a single process unless it can be ``several``."""
        if self.dry_run:
            self.problems.append("trainer.dry_run prints what a training run will need; give it to deltakd.train")
        launch = read_launch(os.environ)
        if several:
            self.problems += [launch.problem] if launch is not None and launch.problem else []
        else:
            self.problems += alone_problems(launch)

    def settings(self, roles: Collection[str] | None, has_adapter: bool, *, any_tokenizer: bool = False) -> RunSettings:
        """Check across groups, and make the settings.

        Args:
            roles, has_adapter: as for the checks of models.
            any_tokenizer: the teacher's text is all that is used of it.

        Raises:
            ConfigError: lists all problems.
        """
        problems = self.problems
        specs = self._checked_specs(roles, has_adapter)
        if self.evaluation is not None:
            problems += self.evaluation.problems(self.data)
        if self.reference is not None:
            problems += self.reference.problems(specs)
        for part in (self.optim, self.data, self.trainer, self.strategy):
            problems += part.problems() if part is not None else []
        problems += self._half_weights_problems()
        problems += self._precision_problems()
        if self.rollout is not None:
            problems += rollout_problems(self.rollout, self.loss, self.data, self.reference)
            problems += engine_problems(self.rollout, self.model)
        if self.data is not None:
            problems += stream_problems(self.data, self.trainer, self.reference)
        parts = try_loss(self.loss, problems)
        objective = self.config["objective"]
        if objective is None or isinstance(objective, str):
            problems += objective_problems(objective, self.data, self.evaluation, self.loss, parts)
        if problems:
            if not any_tokenizer:
                # A run without problems opens its tokenizers anyway, before any weights.
                problems += tokenizer_problems(self.model, specs, self.loss, self.data, self.rollout)
            raise ConfigError(problems.told())
        return self.made(specs)

    def settings_of_models(self, roles: Collection[str] | None) -> RunSettings:
        """Check the models of roles, raw student included, and make the settings; all else is another process's.

        Raises:
            ConfigError: lists all problems.
        """
        specs = self._checked_specs(roles, has_adapter=False)
        self.problems += [] if self.reference is None else self.reference.problems(specs)
        if self.problems:
            raise ConfigError(self.problems.told())
        return self.made(specs)

    def _checked_specs(self, roles: Collection[str] | None, has_adapter: bool) -> dict[str, ModelSpec]:
        problems = self.problems
        problems += role_problems(self.model.specs, () if self.loss is None else self.loss.requires)
        known = roles if roles is None else [role for role in roles if is_reference_role(role)]
        specs = specs_to_load(self.model, known, has_adapter, problems)
        problems += route_problems(self.model.routes, self.loss, self.data, self.reference, self.rollout)
        problems += model_problems(self.model, specs, None if self.data is None else self.data.max_length)
        return specs

    def _half_weights_problems(self) -> list[str]:
        if self.optim is None or self.optim.half_weights == "nearest" or self.strategy is None:
            return []
        found = []
        if self.strategy.name == "deepspeed":
            found.append(
                f"optim.half_weights={self.optim.half_weights} does not go with DeepSpeed, whose ZeRO keeps float32 "
                "masters of its own; leave it at nearest"
            )
        student = self.model.specs.get(STUDENT)
        kinds = (student.dtype if student else "", self.trainer.precision if self.trainer else "")
        if self.optim.half_weights == "stochastic" and ("float16" in kinds or "16-true" in kinds):
            found.append("optim.half_weights=stochastic is for bfloat16, and the student is float16; give masters")
        return found

    def _precision_problems(self) -> list[str]:
        """Return a sentence if Lightning's strategy does not train in ``trainer.precision``."""
        if self.strategy is None or self.trainer is None:
            return []
        refused = {"fsdp": (16, "16-mixed", 64, "64-true"), "deepspeed": (64, "64-true")}
        precision = self.trainer.precision
        if precision not in refused.get(self.strategy.name, ()):
            return []
        half = "bf16-mixed, bf16-true or 16-true" if self.strategy.name == "fsdp" else "a half precision"
        return [
            f"trainer.precision={precision} does not go with strategy.name={self.strategy.name}; give 32-true, {half}, "
            "or strategy=ddp"
        ]

    def made(self, specs: Mapping[str, ModelSpec]) -> RunSettings:
        """Make the settings; there must be no problems, so that every group is built."""
        assert self.trainer is not None
        assert self.strategy is not None
        assert self.kernels is not None
        assert self.rollout is not None
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
            rollout=self.rollout,
            evaluation=self.evaluation,
            deviations=deviations(self.evaluation),
            optim=self.optim,
            loss=self.loss,
            loss_name=loss_name(self.config["loss"], known_losses()),
            logger=self.logger,
            callbacks=self.callbacks,
            record=self.config,
        )


def make_model_settings(node: Any, problems: list[str]) -> ModelSettings:
    """Make the settings of the group ``model``; values of the wrong type are left out and become problems."""
    if not isinstance(node, Mapping):
        problems.append(f"model is {node!r}; it must be a mapping of roles: student, teacher, ...")
        return ModelSettings()
    node = {str(key): value for key, value in node.items()}
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
    given = with_base({role: spec for role, spec in specs.items() if spec is not None})
    made = typed(ModelSettings, own | {"specs": given}, "model", problems)
    assert made is not None, "every field has a default"
    return made


def _built(kind: type | tuple[type, ...], node: Any, key: str, problems: list[str]) -> Any:
    """Build a group; return None if that fails or gives an object of another kind."""
    made = built(node, key, problems)
    try:
        if made is not None:
            require_kind(made, kind, key)
    except ValueError as error:
        problems.append(str(error))
        return None
    return made


def _built_each(node: Any, key: str, problems: list[str]) -> dict[str, Any]:
    """Build the entries of a group that maps names to nodes; None means no entries."""
    if node is not None and not isinstance(node, Mapping):
        problems.append(f"{key} is {node!r}; it must be a mapping of names, or null")
        return {}
    made = {str(name): built(entry, f"{key}.{name}", problems) for name, entry in (node or {}).items()}
    return {name: one for name, one in made.items() if one is not None}
