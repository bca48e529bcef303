"""Checks of a config across its groups, one sentence per problem; no weights are loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from deltakd.data import DataConfig, InstructionData, TextData
from deltakd.evaluation import SCORERS
from deltakd.evaluation.settings import SCORES, EvaluationSettings
from deltakd.generation.model_step import positions_of
from deltakd.io.hub import hub_reachable
from deltakd.kernels import aligned_loss
from deltakd.models import ModelSettings, ModelSpec, load_config, spec_problems
from deltakd.models.adapter_files import adapter_problems
from deltakd.models.causal import NotCausalError
from deltakd.models.quantization import student_problems
from deltakd.models.roles import position_problems
from deltakd.references import CacheSettings, LiveSettings, ReferenceSettings, ServedSettings
from deltakd.references.routed import routed_roles
from deltakd.rollouts.settings import RolloutSettings
from deltakd.training.settings import TrainerSettings
from deltakd.types import (
    ROLES,
    STUDENT,
    STUDENT_RAW,
    AlignedTokens,
    Alignment,
    Head,
    Loss,
    LossOutput,
    SideTokens,
    TokenMap,
    is_reference_role,
)

#: Vocabulary of a model from scratch while its architecture is checked, before a tokenizer is open.
_ANY_VOCABULARY = 2**18
#: Where a study's stages put models and adapters for its later stages.
_STAGE_MODEL = re.compile(r"outputs/(?P<study>[^/]+)/[^/]+/(student|adapter)")


def specs_to_load(
    models: ModelSettings, roles: Collection[str] | None, has_adapter: bool, problems: list[str]
) -> dict[str, ModelSpec]:
    """Return role -> model to load, the student included, in the order of the roles.

    Args:
        models: all models in the config.
        roles: the references wanted; None: unknown, since the loss could not be built.
        has_adapter: the student serves as ``student_raw`` with its LoRA adapter off.
        problems: gets one sentence per role that the config lacks.
    """
    if roles is None:
        return {}
    if models.routes:
        roles = routed_roles(roles, models.routes.values())
    wanted = {STUDENT, *roles} - ({STUDENT_RAW} if has_adapter else set())
    absent = sorted(wanted - set(models.specs))
    reads = "model.routes leads to" if models.routes else "the loss reads"
    problems += [f"{reads} {role}, which the config lacks; add +model.{role}={{path: ...}}" for role in absent]
    needed = [role for role in (*ROLES, *sorted(wanted - set(ROLES))) if role in wanted - set(absent)]
    return {role: models.specs[role] for role in needed}


def role_problems(named: Collection[str], requires: Collection[str]) -> list[str]:
    """Return a sentence if ``model`` has names that are not roles, and one if the loss reads such names."""
    allowed = f"{', '.join(ROLES)}, and further pairs teacher_2, teacher_raw_2, ..."
    found = []
    unknown = [role for role in named if role != STUDENT and not is_reference_role(role)]
    if unknown:
        found.append(f"model has {', '.join(unknown)}, which is not a role; roles are {allowed}")
    strange = sorted(role for role in requires if not is_reference_role(role))
    if strange:
        found.append(f"the loss requires {', '.join(strange)}, which is not a role; roles are {allowed}")
    return found


def model_problems(models: ModelSettings, specs: Mapping[str, ModelSpec], max_length: int | None = None) -> list[str]:
    """Return the problems of the models to load: paths, dtypes, quantisation, tokenizers, configurations.

    Args:
        models: the group ``model``.
        specs: role -> where its model comes from, of the models to load.
        max_length: tokens of the longest row, which need as many positions; None: not known.
    """
    problems: list[str] = []
    if STUDENT not in specs:  # which was said already
        return problems
    student = specs[STUDENT]
    if STUDENT_RAW in specs and student.init == "random":
        problems.append("the loss reads student_raw, but a student with init=random has no raw self; give both a path")
    unmade = _unmade_stages(specs)
    silent = set(unmade)
    if STUDENT_RAW in specs and student.path is None and specs[STUDENT_RAW].path is None:
        # The raw student's path is the student's: that it is missing is said once.
        silent.add(STUDENT_RAW)
    found = [problem for role, spec in specs.items() if role not in silent for problem in spec_problems(role, spec)]
    found += _say_how_to_make(unmade.values())
    found += [problem for role, spec in specs.items() if role not in silent for problem in adapter_problems(role, spec)]
    problems += found
    if not found:
        problems += _config_problems(specs, models.trust_remote_code, max_length)
    problems += student_problems(student.quantization, models.lora is not None)
    problems += [
        f"model.{role}.init=random: a reference has to have learnt something; give model.{role}.path"
        for role, spec in specs.items()
        if role != STUDENT and spec.init == "random"
    ]
    train_on = models.tokenizer.train_on
    if train_on and student.init == "pretrained":
        problems.append(
            "model.tokenizer.train_on is given for a pretrained student, but its weights know its own tokens "
            "only; remove it"
        )
    if student.init == "random" and not (train_on or student.tokenizer):
        problems.append(
            "a student with init=random needs a tokenizer: model.student.tokenizer=<directory>, or "
            "model.tokenizer.train_on=<text files>"
        )
    return problems


def rollout_problems(
    rollout: RolloutSettings,
    loss: Loss | None,
    data: InstructionData | TextData | None,
    reference: ReferenceSettings | None,
) -> list[str]:
    """Return the problems of the rollout settings, alone and in combination with other groups."""
    found = rollout.problems(loss)
    if not rollout.on_policy:
        return found
    answers = f"rollout.fraction is {rollout.fraction:g}, so the student answers prompts"
    if isinstance(data, TextData):
        found.append(f"{answers}, and data is plain text, which has none; give data=instruction, or rollout=none")
    elif data is not None and data.streaming:
        found.append(
            f"{answers}, which are drawn from an indexed data set, and data.streaming=true has none; give "
            "data.streaming=false, or rollout=none"
        )
    elif data is not None and data.batch_size is None:
        found.append(
            f"{answers}, and the lengths of its responses are not known in advance, so batches can't be filled up to "
            "data.max_tokens_per_batch; give data.batch_size, or rollout=none"
        )
    elif data is not None and data.batch_size and data.batch_size % 2 and loss is not None and loss.needs_pairs:
        found.append(
            f"data.batch_size is {data.batch_size}, and the loss compares two rows, which must be in one micro-batch; "
            "give an even number"
        )
    if data is not None and data.packing:
        found.append(
            f"{answers} to be padded, not packed, and data.packing=true; give data.packing=false, or rollout=none"
        )
    if rollout.replay.adaptive and data is not None and not data.validates:
        found.append(
            "rollout.replay.adaptive=true raises the student's share when the validation loss rises, and there is no "
            "validation data; give data.val=... or data.val_size=N, or rollout.replay.adaptive=false"
        )
    if rollout.mixes_teacher and not isinstance(reference, LiveSettings | CacheSettings | ServedSettings | None):
        found.append(
            "rollout.source=mixture runs the teacher token by token, and reference is a source of your own; give "
            "reference=live, or rollout.source=student"
        )
    if isinstance(reference, CacheSettings) and loss is not None and loss.requires:
        found.append(
            f"{answers}, and reference=cached holds the references over the data's responses; give reference=live, or "
            "rollout=none"
        )
    return found


def engine_problems(rollout: RolloutSettings, models: ModelSettings) -> list[str]:
    """Return the problems of the engine that writes rollouts; a server is asked later."""
    if not rollout.on_policy or rollout.engine == "own":
        return []
    student = models.specs.get(STUDENT)
    return rollout.vllm.problems(
        rollout.decoding,
        quantized=student is not None and student.quantization is not None,
        mixes_teacher=rollout.mixes_teacher,
    )


def _unmade_stages(specs: Mapping[str, ModelSpec]) -> dict[str, tuple[str, str]]:
    """Return role -> key and path of a model or adapter that a study makes, and has not made yet."""
    found = {}
    for role, spec in specs.items():
        for key, path in (("path", spec.path), ("adapter", spec.adapter)):
            if path and _STAGE_MODEL.fullmatch(path) and not os.path.isdir(path):
                found[role] = (f"model.{role}.{key}={path}", path)
    return found


def _say_how_to_make(unmade: Collection[tuple[str, str]]) -> list[str]:
    """Return one sentence per study: which models are missing, and the command that makes them."""
    studies: dict[str, list[str]] = {}
    for named, path in unmade:
        found = _STAGE_MODEL.fullmatch(path)
        assert found is not None
        studies.setdefault(found["study"], []).append(named)
    return [
        f"the models of the study {study} are not there yet ({', '.join(named)}); one command makes them: "
        f"python -m deltakd.study experiments/{study}"
        for study, named in studies.items()
    ]


def _config_problems(specs: Mapping[str, ModelSpec], trust_remote_code: bool, max_length: int | None) -> list[str]:
    """Fetch each configuration; name all models that need an unreachable hub in one sentence."""
    missing: dict[str, ValueError] = {}
    found: list[str] = []
    for role, spec in specs.items():
        if spec.init == "pretrained" or (spec.architecture or {}).get("model_type"):
            try:
                config = load_config(role, spec, vocabulary=_ANY_VOCABULARY, trust_remote_code=trust_remote_code)
                found += position_problems(role, positions_of(config), max_length)
            except NotCausalError as error:
                found.append(str(error))
            except ValueError as error:
                missing[role] = error
    on_hub = [role for role in missing if not os.path.isdir(str(specs[role].path))]
    if hub_reachable() or len(on_hub) < 2:
        return found + [str(error) for error in missing.values()]
    named = ", ".join(f"model.{role}.path={specs[role].path}" for role in on_hub)
    found += [str(missing[role]) for role in missing if role not in on_hub]
    return [
        *found,
        "these models are not in the local cache, and the Hugging Face hub can't be reached: "
        f"{named}; to use local copies give model.<role>.path=/path/to/model_directory",
    ]


def stream_problems(data: DataConfig, trainer: TrainerSettings | None, reference: Any) -> list[str]:
    """Return the problems of other groups' settings with streamed data, which is not counted."""
    if not data.streaming:
        return []
    problems = []
    if isinstance(reference, CacheSettings):
        problems.append(
            "reference=cached looks rows up in an indexed data set, and data.streaming=true has none; give "
            "reference=live, or data.streaming=false"
        )
    if trainer is None:
        return problems
    budget = isinstance(data, TextData) and data.max_tokens is not None
    if trainer.max_steps is None and not budget:
        problems.append(
            "data.streaming=true does not know how many steps a pass has, and the schedules need to know the last one; "
            "give trainer.max_steps=N" + (", or data.max_tokens=N" if isinstance(data, TextData) else "")
        )
    if trainer.max_epochs is not None and trainer.max_epochs % 1:
        problems.append(
            f"trainer.max_epochs is {trainer.max_epochs}, but data.streaming=true knows only whole passes; give a "
            "whole number, or trainer.max_epochs=null to stop by trainer.max_steps only"
        )
    if data.validates and trainer.val_every_n_steps is None:
        problems.append(
            "trainer.val_every_n_steps=null validates after each pass, and data.streaming=true does not know when "
            "that is; give trainer.val_every_n_steps=N"
        )
    return problems


def try_loss(loss: Loss | None, problems: list[str]) -> list[str]:
    """Try the loss on random logits and return the names of its parts; a broken contract becomes a problem."""
    if loss is None:
        return []
    logits = {role: torch.randn(2, 8) for role in (STUDENT, *loss.requires)}
    try:
        if loss.needs_alignment:
            return _parts_of_aligned(loss)
        output = loss(logits, torch.tensor([1, 2]))
    # A plug-in may raise anything; better here than in the first step, after all models are loaded.
    except Exception as error:
        problems.append(f"loss: it fails on random logits [2, 8] for {sorted(logits)}: {type(error).__name__}: {error}")
        return []
    if not isinstance(output, LossOutput) or output.per_token.shape != (2,):
        problems.append("loss: it must return a LossOutput whose per_token is [N], one number (nats) a token")
        return []
    return list(output.parts)


def _parts_of_aligned(loss: Loss) -> list[str]:
    """Try a loss of two tokenizers on two of the student's tokens and three of the teachers'."""
    sides = [SideTokens(torch.arange(n) + 1, torch.arange(n), torch.zeros(n, dtype=torch.int64)) for n in (2, 3)]
    alignment = Alignment.of(torch.tensor([0, 1]), torch.tensor([0, 1, 1]))
    tokens = AlignedTokens(sides[0], sides[1], alignment, TokenMap.identity(8))
    widths = {role: (2, 4) if role in (STUDENT, STUDENT_RAW) else (3, 5) for role in (STUDENT, *loss.requires)}
    heads = {role: Head(torch.randn(n, width), torch.randn(8, width)) for role, (n, width) in widths.items()}
    loss.prepare(heads, tokens.token_map, 0)
    with torch.no_grad():
        return list(aligned_loss(loss, heads, tokens)[1])


def objective_problems(
    objective: str | None,
    data: InstructionData | TextData | None,
    evaluation: EvaluationSettings | None,
    loss: Loss | None,
    parts: Collection[str],
) -> list[str]:
    """Return why the user's objective can't choose the best checkpoint.

    Args:
        objective: the given objective; None: the run chooses.
        data: the data group.
        evaluation: the evaluation group.
        loss: the loss.
        parts: names of its parts.
    """
    if objective is None:
        return []
    moving = [] if loss is None else sorted(loss.schedules)
    if moving and objective.startswith("val/") and objective not in (*SCORES, "val/ce"):
        return [
            f"objective is {objective}, but {', '.join(moving)} changes with training, so its values can't be compared "
            f"between steps; allowed are {', '.join(SCORES)}, val/ce"
        ]
    allowed = [*SCORES, "val/loss", *(f"val/{name}" for name in parts)]
    if objective not in allowed:
        return [
            f"objective is {objective!r}; the best checkpoint is chosen on validation data, never on a test set: "
            f"allowed are {', '.join(allowed)}"
        ]
    if data is not None and not data.validates:
        return [f"objective is {objective}, but there is no validation data; give data.val, or leave objective at null"]
    if evaluation is None or objective not in SCORES:
        return []
    if not evaluation.generate or isinstance(data, TextData):
        return [
            f"objective is {objective}, but this run generates no answers; give objective=val/loss, or leave it at null"
        ]
    given = [f"val/{metric}" for metric in SCORERS[evaluation.val_scorer].metrics]
    if objective in given:
        return []
    return [
        f"objective is {objective}, but evaluation.scorer={evaluation.val_scorer} gives {', '.join(given)}; "
        f"give objective=val/{SCORERS[evaluation.val_scorer].main}"
    ]
