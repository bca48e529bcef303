"""What a run is made of: tokenizer, data, evaluation sets, models and references, loaded."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltakd.data import InstructionData, LoadedSets, read_texts
from deltakd.distributed.ranks import is_main_process, main_process_first
from deltakd.evaluation.sets import CheckedSets, read_checked_sets
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models import (
    LanguageModel,
    add_lora,
    common_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    train_tokenizer,
)
from deltakd.references import CachedReferences, CacheStore, LiveSettings, References
from deltakd.references.content import data_identity, data_problems, missing_problem, missing_rows
from deltakd.training.settings import RunSettings
from deltakd.types import STUDENT, STUDENT_RAW

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Args:
        student: the one to train.
        references: the frozen ones, or None where the loss reads none.
        loaded: role -> model, the student among them, for counting.
    """

    student: LanguageModel
    references: References | None
    loaded: dict[str, LanguageModel]


@dataclass(frozen=True)
class Parts:
    """What a run is made of once everything is loaded.

    Args:
        settings: of the run.
        directory: where everything goes.
        tokenizer: the student's.
        vocabulary: number of tokens that all models share.
        sets: tokenised rows.
        evaluation: what to answer at the end; read before anything is trained, since a mistake in a file must not
            cost a run. None: nothing is generated.
        models: student and references.
    """

    settings: RunSettings
    directory: RunDirectory
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    sets: LoadedSets
    evaluation: CheckedSets | None
    models: Models


def load_parts(settings: RunSettings, directory: RunDirectory) -> Parts:
    """Make or read the data, then load tokenizer and models.

    Raises:
        ValueError: data or models that can't be used, or that don't belong together.
    """
    # Everything random is drawn from seeds given where it is drawn; this one is for libraries we do not know of.
    L.seed_everything(settings.seed, verbose=False)
    with main_process_first(f"data of {directory.path}"):
        if settings.data.prepare is not None:
            settings.data.prepare()
        tokenizer = make_tokenizer(settings, directory.path / "tokenizer")
        vocabulary = shared_vocabulary(settings, tokenizer)
        sets = settings.data.load(tokenizer)
        settings.data.check_lengths(sets)
        cached = None
        if settings.cache is not None:
            cached = _cached_references(settings, tokenizer, sets)
            vocabulary = cached.vocabulary
        evaluation = _read_evaluation(settings, tokenizer, vocabulary, sets) if settings.evaluation.generate else None
    # They were needed for that alone.
    sets = sets._replace(train_rows=[])
    models = make_models(settings, tokenizer, vocabulary, cached)
    return Parts(settings, directory, tokenizer, vocabulary, sets, evaluation, models)


def _read_evaluation(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, vocabulary: int, sets: LoadedSets
) -> CheckedSets:
    student = load_config(
        STUDENT,
        settings.specs[STUDENT],
        vocabulary=vocabulary,
        trust_remote_code=settings.model.trust_remote_code,
    )
    train_rows = sets.train_rows if isinstance(settings.data, InstructionData) else None
    return read_checked_sets(settings.evaluation, settings.deviations, settings.data, tokenizer, student, train_rows)


def open_cache(settings: RunSettings, tokenizer: PreTrainedTokenizerBase, sets: LoadedSets) -> CacheStore:
    """The cache of a plan, proved to be of this data; rows may be missing.

    Raises:
        ConfigError: every difference by name.
        StoreError: a file is not as it was written.
    """
    assert settings.cache is not None
    assert settings.cache.path is not None
    store = CacheStore.open(Path(settings.cache.path))
    given = data_identity(settings.data, tokenizer, sets)
    problems = data_problems(store.manifest.content, given, store.path)
    if problems:
        raise ConfigError(problems)
    # One process reads all of it once; the sizes are cheap.
    store.check(checksum=settings.cache.verify and is_main_process())
    return store


def _cached_references(settings: RunSettings, tokenizer: PreTrainedTokenizerBase, sets: LoadedSets) -> CachedReferences:
    store = open_cache(settings, tokenizer, sets)
    references = CachedReferences(store, settings.loss.requires)
    missing = missing_problem(missing_rows(references.index, sets), sets, store.path)
    if missing:
        raise ConfigError(missing)
    return references


def make_tokenizer(settings: RunSettings, directory: Path) -> PreTrainedTokenizerBase:
    """The student's tokenizer: loaded, or trained on text and kept in ``directory`` for the next start.

    Raises:
        ValueError: there is none, or it has no EOS.
    """
    wanted, spec = settings.model.tokenizer, settings.specs[STUDENT]
    if wanted.train_on and not spec.tokenizer:
        if not directory.is_dir():
            texts = read_texts(wanted.train_on, subset=wanted.train_subset)
            trained = train_tokenizer(texts, wanted.vocabulary, wanted.add_prefix_space)
            partial = directory.with_name(directory.name + ".partial")
            trained.save_pretrained(partial)
            os.replace(partial, directory)
        return load_tokenizer(str(directory), "model.tokenizer")
    trust = settings.model.trust_remote_code
    source, key = (spec.tokenizer, "model.student.tokenizer") if spec.tokenizer else (spec.path, "model.student.path")
    tokenizer = load_tokenizer(str(source), key, trust_remote_code=trust)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{key}={source}: the tokenizer has no EOS token, so no answer could ever end; set its eos_token"
        )
    return tokenizer


def shared_vocabulary(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> int:
    """Prove that all references speak the student's tokenizer; the number of tokens they share.

    Raises:
        ValueError: one does not.
    """
    # Not len(tokenizer): ids may have gaps.
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    own = settings.specs[STUDENT].tokenizer or (
        None if settings.model.tokenizer.train_on else settings.specs[STUDENT].path
    )
    trust = settings.model.trust_remote_code
    for role, spec in settings.specs.items():
        source = spec.tokenizer or spec.path
        if role == STUDENT or source == own:
            continue
        other = load_tokenizer(str(source), f"model.{role}.tokenizer", trust_remote_code=trust)
        vocabulary = min(vocabulary, common_vocabulary(tokenizer, other, role))
    return vocabulary


def _check_positions(role: str, model: PreTrainedModel, max_length: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"data.max_length is {max_length}, but model.{role} has positions for {limit} tokens only; "
            f"give data.max_length={limit} or less, or another model"
        )


def make_model(settings: RunSettings, role: str, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> LanguageModel:
    """Load the model of one role, and check its head against its own logits.

    Raises:
        ValueError: it can't be had or does not fit.
    """
    hf = load_model(
        role,
        settings.specs[role],
        vocabulary=vocabulary,
        eos_token_id=tokenizer.eos_token_id,
        seed=settings.seed,
        attn_implementation=settings.model.attn_implementation,
        trust_remote_code=settings.model.trust_remote_code,
    )
    _check_positions(role, hf, settings.data.max_length)
    model = LanguageModel(hf, vocabulary)
    model.check_head()
    return model


def make_models(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, vocabulary: int, cached: References | None = None
) -> Models:
    """Load every model of the plan, check its head against its own logits, and freeze the references.

    Args:
        settings: of the run.
        tokenizer: the student's.
        vocabulary: number of tokens that all models share.
        cached: the references where they were run before.

    Raises:
        ValueError: a model can't be had or does not fit.
    """
    lora = settings.model.lora
    loaded = {role: make_model(settings, role, tokenizer, vocabulary) for role in settings.specs}
    student = loaded[STUDENT]
    if student.quantized and lora is None:
        raise ValueError(
            f"model.student.path={settings.specs[STUDENT].path} is a quantised checkpoint, whose weights can't be "
            "trained; add model/lora=default"
        )
    if lora is not None:
        student = loaded[STUDENT] = LanguageModel(add_lora(student.causal_lm, lora), vocabulary)
    if settings.model.gradient_checkpointing:
        student.causal_lm.gradient_checkpointing_enable()
        # With LoRA nothing before the first adapter needs a gradient, and a checkpointed block would cut the graph.
        student.causal_lm.enable_input_require_grads()
    if settings.trainer.compile:
        student.causal_lm.base_model.compile()
    references = cached
    if settings.loss.requires and cached is None:
        assert isinstance(settings.reference, LiveSettings), "a cache that is to be read was not opened"
        frozen = {role: model for role, model in loaded.items() if role != STUDENT}
        adapted = student if lora is not None and STUDENT_RAW in settings.loss.requires else None
        references = settings.reference.make(frozen, adapted, settings.strategy)
    return Models(student, references, loaded)
