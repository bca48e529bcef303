"""The single place that opens a role's tokenizer and model, and an exported student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from deltakd.data import read_texts
from deltakd.generation.model_step import position_limit
from deltakd.io.files import replacing
from deltakd.io.hub import hub_reachable
from deltakd.models.image_models import auto_class
from deltakd.models.language_model import LanguageModel
from deltakd.models.loading import load_config, load_model, spec_problems
from deltakd.models.recurrence import check_recurrence
from deltakd.models.settings import ModelSettings, ModelSpec
from deltakd.models.tokenizers import OtherTokenizerError, common_vocabulary, load_tokenizer, train_tokenizer
from deltakd.models.vocabulary import vocabulary_of
from deltakd.types import STUDENT, STUDENT_RAW

#: Roles that always have the student's tokenizer.
OWN_ROLES = (STUDENT, STUDENT_RAW)


def open_tokenizer(models: ModelSettings, directory: Path) -> PreTrainedTokenizerBase:
    """Return the student's tokenizer: loaded, or trained on text and saved in ``directory`` for the next start.

    Args:
        models: of the run.
        directory: of a trained tokenizer; created if needed.

    Raises:
        ValueError: it is not available, or it has no EOS.
    """
    wanted, spec = models.tokenizer, models.specs[STUDENT]
    if wanted.train_on and not spec.tokenizer:
        if not directory.is_dir():
            texts = read_texts(wanted.train_on, subset=wanted.train_subset)
            trained = train_tokenizer(texts, wanted.vocabulary, wanted.add_prefix_space)
            with replacing(directory, "the tokenizer", first_wins=True) as partial:
                trained.save_pretrained(partial)
        return load_tokenizer(str(directory), "model.tokenizer")
    source, key = (spec.tokenizer, "model.student.tokenizer") if spec.tokenizer else (spec.path, "model.student.path")
    tokenizer = load_tokenizer(str(source), key, trust_remote_code=models.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{key}={source}: the tokenizer has no EOS token, so no answer could ever end; set its eos_token"
        )
    return tokenizer


@dataclass(frozen=True)
class Vocabularies:
    """The vocabularies of a run's models.

    Args:
        size: V, number of tokens that the student and all models with its tokenizer have.
        other: the teachers' tokenizer, if it is not the student's.
        other_size: number of tokens that all teachers have, if they have a tokenizer of their own.
    """

    size: int
    other: PreTrainedTokenizerBase | None = None
    other_size: int = 0

    def is_own(self, role: str) -> bool:
        """Return True if a role's model has the student's tokenizer."""
        return self.other is None or role in OWN_ROLES

    def of(self, role: str) -> int:
        """Return V of a role's model."""
        return self.size if self.is_own(role) else self.other_size


def open_vocabularies(
    models: ModelSettings, specs: Mapping[str, ModelSpec], tokenizer: PreTrainedTokenizerBase, *, aligns: bool = False
) -> Vocabularies:
    """Compare the tokenizers of all references with the student's, and count the tokens that the models share.

    Args:
        models: of the run.
        specs: role -> model, of the student and the references in question.
        tokenizer: the student's.
        aligns: allow teachers with a tokenizer of their own, one for all of them.

    Raises:
        OtherTokenizerError: a reference uses another tokenizer, and it must not.
        ValueError: a model has too few tokens.
    """
    own = specs[STUDENT].tokenizer or (None if models.tokenizer.train_on else specs[STUDENT].path)
    sizes = [vocabulary_of(tokenizer)]
    foreign: dict[str, PreTrainedTokenizerBase] = {}
    for role, spec in specs.items():
        if role == STUDENT or (spec.tokenizer or spec.path) == own:
            continue
        theirs = _tokenizer_of(role, spec, f"model.{role}.tokenizer", models)
        try:
            sizes.append(common_vocabulary(tokenizer, theirs, role))
        except OtherTokenizerError:
            if not aligns or role in OWN_ROLES:
                raise
            foreign[role] = theirs
    # After the tokenizers: a model with another tokenizer may lack rows, too, but that is not the cause to report.
    other = next(iter(foreign.values()), None)
    other_sizes = [] if other is None else [vocabulary_of(other), *_sizes_of_teachers(foreign, specs)]
    for role, spec in specs.items():
        if spec.init == "pretrained":
            config = load_config(role, spec, trust_remote_code=models.trust_remote_code)
            own_sizes, theirs = (sizes, tokenizer) if role not in foreign else (other_sizes, foreign[role])
            own_sizes.append(vocabulary_of(theirs, config, role))
    return Vocabularies(min(sizes), other, min(other_sizes, default=0))


def _sizes_of_teachers(foreign: Mapping[str, PreTrainedTokenizerBase], specs: Mapping[str, ModelSpec]) -> list[int]:
    """Check that all teachers share one tokenizer; return the numbers of tokens that they share.

    Raises:
        OtherTokenizerError: some have the student's, or there are more than two.
    """
    alone = [role for role in specs if role not in foreign and role not in OWN_ROLES]
    if alone:
        raise OtherTokenizerError(
            f"{', '.join(foreign)} have another tokenizer than the student, and {', '.join(alone)} the student's: all "
            "teachers must share one, and raw teachers that of their teachers; give models of one family"
        )
    (first, tokenizer), *rest = foreign.items()
    found = []
    for role, theirs in rest:
        try:
            found.append(common_vocabulary(tokenizer, theirs, role))
        except OtherTokenizerError as error:
            raise OtherTokenizerError(
                f"a run has the student's tokenizer and at most one other, and {role} has another one than {first}; "
                f"give teachers of one family (compared with {first} in the student's place: {error})"
            ) from None
    return found


def _tokenizer_of(role: str, spec: ModelSpec, key: str, models: ModelSettings) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(spec.tokenizer or spec.path), key, trust_remote_code=models.trust_remote_code)


def position_problems(role: str, positions: int | None, max_length: int | None) -> list[str]:
    """Return a sentence if rows of ``max_length`` tokens do not fit a model; None: no limit, or not known yet."""
    if positions is None or max_length is None or max_length <= positions:
        return []
    return [
        f"data.max_length is {max_length}, but model.{role} has positions for {positions} tokens only; "
        f"give data.max_length={positions} or less, or another model"
    ]


def open_model(
    role: str,
    spec: ModelSpec,
    models: ModelSettings,
    *,
    vocabulary: int,
    eos_token_id: int | None = None,
    seed: int = 0,
    max_length: int | None = None,
    sharing: Mapping[str, ModelSpec] | None = None,
    tensor_parallel: bool = False,
) -> LanguageModel:
    """Open the model of a role on the CPU, in its own dtype, and check its head against its own logits.

    Args:
        role: for the messages.
        spec: where it comes from.
        models: how the models of the run are opened.
        vocabulary: V of its head.
        eos_token_id: the tokenizer's, for a model from scratch.
        seed: for the weights of a model from scratch.
        max_length: tokens of the longest row (``data.max_length``); None: not known yet.
        sharing: role -> spec, of further roles with the same model under their adapters (``adapter_files.base_of``).
        tensor_parallel: split it over all processes, each part on its device. Collective if so.

    Raises:
        ValueError: it is not available, does not fit its adapter, has too few positions or tokens, transforms its
            logits in an unknown way, or has a recurrent state that padding changes.
    """
    hf = load_model(
        role,
        spec,
        vocabulary=vocabulary,
        eos_token_id=eos_token_id,
        seed=seed,
        attn_implementation=models.attn_implementation,
        trust_remote_code=models.trust_remote_code,
        tensor_parallel=tensor_parallel,
    )
    problems = position_problems(role, position_limit(hf), max_length)
    if problems:
        raise ValueError("; ".join(problems))
    adapters = {name: one.adapter for name, one in {role: spec, **(sharing or {})}.items()}
    given = {name: path for name, path in adapters.items() if path is not None}
    if not given:
        model = LanguageModel(hf, vocabulary)
        model.check_head()
    else:
        # peft takes part of a second to import, and few runs need it.
        from deltakd.models.adapters import load_adapters

        names = {name: None if path is None else name for name, path in adapters.items()}
        model = LanguageModel(load_adapters(hf, given), vocabulary, names)
        for name in names:
            with model.as_role(name):
                model.check_head()
    check_recurrence(role, model)
    return model


def open_reference(
    role: str, spec: ModelSpec, models: ModelSettings, tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> LanguageModel:
    """Open a model to measure a finished student against, in eval mode; its config is checked here.

    Args:
        role: for the messages.
        spec: where it comes from.
        models: how the models of the run are opened.
        tokenizer: the student's, which it must share.
        vocabulary: V of the student; the reference's head is cut to the tokens that they share.

    Raises:
        ValueError: it is not available or does not fit.
    """
    problems = spec_problems(role, spec)
    if problems:
        raise ValueError("; ".join(problems))
    # First the tokenizers: a model with another one may lack rows, too, but that is not the cause to report.
    shared = min(vocabulary, common_vocabulary(tokenizer, _tokenizer_of(role, spec, role, models), role))
    config = load_config(role, spec, trust_remote_code=models.trust_remote_code)
    shared = min(shared, vocabulary_of(tokenizer, config, role))
    return open_model(role, spec, models, vocabulary=shared).eval()


def open_exported(path: str | Path, models: ModelSettings, vocabulary: int, device: torch.device) -> nn.Module:
    """Open a trained student as its users will: by path alone, in its file's dtype, in eval mode.

    Args:
        path: model directory or hub id.
        models: how the models of the run are opened.
        vocabulary: V of its tokenizer.
        device: where it goes.

    Raises:
        ValueError: no model can be loaded from there, or it transforms its logits in an unknown way.
    """
    try:
        remote: dict[str, Any] = {
            "trust_remote_code": models.trust_remote_code,
            "local_files_only": not hub_reachable(),
        }
        model: nn.Module = auto_class(AutoConfig.from_pretrained(path, **remote)).from_pretrained(
            path,
            attn_implementation=models.attn_implementation,
            **remote,
        )
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model={path}: no model can be loaded from there ({first}); give a model directory") from None
    model.to(device)
    LanguageModel(model, vocabulary).check_head()
    # The wrapper starts in training mode, and its check restores that.
    return model.eval()
