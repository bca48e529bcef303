"""The parts of a run: data, tokenizer, vocabulary, cache, evaluation sets and models, opened in this order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import lightning as L
from transformers import PreTrainedTokenizerBase

from deltakd.data import InstructionData, LoadedSets
from deltakd.data.encoding.two_tokenizers import Coding, TwoTokenizers
from deltakd.data.routing import routed, with_tasks
from deltakd.distributed.ranks import is_main_process, main_process_first
from deltakd.distributed.strategies import count_ranks
from deltakd.evaluation.retention import check_retained
from deltakd.evaluation.sets import CheckedSets, read_checked_sets
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.models import LanguageModel, ModelSpec, load_config
from deltakd.models.adapter_files import base_of
from deltakd.models.dropout import switch_off_dropout
from deltakd.models.experts import balance_warning, router_loss_problem
from deltakd.models.identity import spec_of
from deltakd.models.lora import add_lora
from deltakd.models.packing_check import check_packing
from deltakd.models.roles import OWN_ROLES, Vocabularies, open_model, open_tokenizer, open_vocabularies
from deltakd.models.vocabulary import unaligned_problems, unknown_token_problems
from deltakd.references import (
    LiveReferences,
    References,
    RoutedReferences,
    ServedReferences,
    SourceSettings,
)
from deltakd.references.content import named_sets
from deltakd.rollouts.vllm_server import check_server
from deltakd.training.announce import (
    announce_models,
    preview_data,
    warn_of_extrapolation,
    warn_of_verbatim_prompts,
)
from deltakd.training.elsewhere import open_elsewhere
from deltakd.training.image_check import check_images
from deltakd.training.inputs import check_inputs, read_inputs
from deltakd.training.settings import RunSettings
from deltakd.training.vocabulary_check import vocabulary_problems
from deltakd.types import STUDENT, STUDENT_RAW, TEACHER, TokenMap

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Args:
        student: the one to train.
        references: the frozen ones, or None if the loss reads none.
        loaded: role -> model, including the student.
    """

    student: LanguageModel
    references: References | None
    loaded: dict[str, LanguageModel]


@dataclass(frozen=True)
class Parts:
    """The loaded parts of a run.

    Args:
        settings: of the run.
        directory: where everything goes.
        tokenizer: the student's.
        vocabularies: numbers of tokens, and the teachers' tokenizer if they have one of their own.
        token_map: between the two vocabularies; None: all models share a tokenizer.
        sets: tokenised rows.
        evaluation: the sets to answer at the end; read before training, so that a mistake in a file does not cost a
            run. None: nothing is generated.
        models: student and references.
    """

    settings: RunSettings
    directory: RunDirectory
    tokenizer: PreTrainedTokenizerBase
    vocabularies: Vocabularies
    token_map: TokenMap | None
    sets: LoadedSets
    evaluation: CheckedSets | None
    models: Models

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the student."""
        return self.vocabularies.size

    def close(self) -> None:
        """Leave the server of references, if one was asked."""
        if isinstance(self.models.references, ServedReferences):
            self.models.references.close()


def load_parts(settings: RunSettings, directory: RunDirectory) -> Parts:
    """Prepare or read the data, then open tokenizer and models.

    Raises:
        ValueError: data or models that can't be used, don't fit together, or have changed since the run began.
    """
    # Our own random draws have explicit seeds; this global one is for libraries.
    L.seed_everything(settings.seed, verbose=False)
    _check_rollout_rows(settings)
    if is_main_process():
        announce_models(settings)
        warn_of_extrapolation(settings.loss)
    with main_process_first(f"data of {directory.path}"):
        settings.data.make_files()
        tokenizer = open_tokenizer(settings.model, directory.path / "tokenizer")
        vocabularies = read_vocabularies(settings, tokenizer)
        prompts_only = settings.rollout.own_rows_alone and not settings.loss.needs_pairs
        sets = settings.data.load(tokenizer, prompts_only=prompts_only, teachers=vocabularies.other)
        settings.data.check_lengths(sets)
        check_images(settings, sets)
        if settings.model.routes:
            sets = routed(sets, settings.model.routes)
        elif sets.val is not None:
            sets = sets._replace(val=with_tasks(sets.val, sets.val_rows, None))
        ready = open_elsewhere(settings, tokenizer, sets, vocabularies.other)
        if ready is not None:
            other_size = ready.other_vocabulary or vocabularies.other_size
            vocabularies = replace(vocabularies, size=ready.vocabulary, other_size=other_size)
        check_tokens(sets, tokenizer, vocabularies)
        token_map = make_token_map(settings, tokenizer, vocabularies)
        if is_main_process():
            inputs = read_inputs(settings, tokenizer, sets, ready, vocabularies.other)
            shards = None if sets.stream is None else sets.stream.versions
            check_inputs(directory.path, inputs, shards, force=settings.resume == "force")
            _check_server(settings, tokenizer, vocabularies.size)
            preview_data(settings.data, sets.train, tokenizer)
            warn_of_verbatim_prompts(settings.data, sets.train_rows)
        check_retained(settings.evaluation.measures, settings.data, tokenizer)
        evaluation = (
            _read_evaluation(settings, tokenizer, vocabularies.size, sets) if settings.evaluation.generate else None
        )
    # Only the evaluation sets needed the raw rows.
    sets = sets._replace(train_rows=[])
    models = open_models(settings, tokenizer, vocabularies, ready)
    return Parts(settings, directory, tokenizer, vocabularies, token_map, sets, evaluation, models)


def read_vocabularies(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> Vocabularies:
    """Compare the tokenizers of the run's models, and check that the run can do with what they are.

    Raises:
        ConfigError: teachers have a tokenizer of their own, and the run can't align it.
        ValueError: as ``open_vocabularies``.
    """
    specs = dict(settings.specs)
    if settings.cache is not None and settings.loss.needs_alignment:
        # Their weights are in the cache; their tokenizers are not.
        named = {role: spec_of(settings.model, role) for role in sorted(settings.loss.requires)}
        specs |= {role: spec for role, spec in named.items() if spec is not None and role not in OWN_ROLES}
    vocabularies = open_vocabularies(settings.model, specs, tokenizer, aligns=settings.loss.needs_alignment)
    problems = vocabulary_problems(vocabularies, tokenizer, settings.loss, settings.data, settings.rollout)
    if problems:
        raise ConfigError(problems)
    return vocabularies


def make_token_map(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, vocabularies: Vocabularies
) -> TokenMap | None:
    """Return the map between the student's vocabulary and the teachers'; None: they share one.

    Raises:
        UnalignableError: they share nothing.
    """
    both = two_tokenizers(settings, tokenizer, vocabularies)
    return None if both is None else both.token_map(vocabularies.size, vocabularies.other_size)


def two_tokenizers(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, vocabularies: Vocabularies
) -> TwoTokenizers | None:
    """Return what aligns answers between the tokenizers of student and teachers; None: they share one."""
    if vocabularies.other is None:
        return None
    data = settings.data
    student = Coding(data.make_template(tokenizer), tokenizer, data.max_length, data.max_prompt_length)
    return TwoTokenizers(student, data.teachers_coding(vocabularies.other))


def _check_rollout_rows(settings: RunSettings) -> None:
    """Raise ValueError if responses can't fill an optimiser step; how many rows it has depends on the devices."""
    trainer, batch_size = settings.trainer, settings.data.batch_size
    if settings.rollout.on_policy and batch_size is not None:
        ranks = count_ranks(trainer.accelerator, trainer.devices, trainer.num_nodes)
        rows = batch_size * trainer.accumulate_grad_batches * ranks
        settings.rollout.prompts_per_step(rows, settings.loss.needs_pairs)


def _check_server(settings: RunSettings, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Raise a ConfigError if a server is to write rollouts, and can't."""
    rollout = settings.rollout
    if not rollout.on_policy or rollout.engine == "own":
        return
    student = load_config(
        STUDENT,
        settings.specs[STUDENT],
        vocabulary=vocabulary,
        trust_remote_code=settings.model.trust_remote_code,
    )
    check_server(rollout.vllm, tokenizer, student, settings.data.max_length)


def _read_evaluation(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, vocabulary: int, sets: LoadedSets
) -> CheckedSets:
    student = load_config(
        STUDENT,
        settings.specs[STUDENT],
        vocabulary=vocabulary,
        trust_remote_code=settings.model.trust_remote_code,
    )
    train_rows = sets.train_rows if isinstance(settings.data, InstructionData) and sets.stream is None else None
    if sets.stream is not None:
        _warn_of_sets_in_stream(settings)
    answered = sets.val_rows if settings.generates_on_validation else []
    return read_checked_sets(
        settings.evaluation, settings.deviations, settings.data, tokenizer, student, train_rows, answered
    )


def _warn_of_sets_in_stream(settings: RunSettings) -> None:
    """A stream is never searched as a whole; tasks of ``data.exclude`` are dropped while streaming."""
    excluded = settings.data.exclude if isinstance(settings.data, InstructionData) else ()
    open_sets = [entry.source for entry in settings.evaluation.sets.values() if entry.source not in excluded]
    if open_sets and not settings.evaluation.allow_overlap:
        remedy = f"; to leave their tasks out: data.exclude=[{','.join(open_sets)}]"
        log.warning(
            "Whether rows of a stream are also in the evaluation sets %s is not checked%s.",
            ", ".join(open_sets),
            remedy if isinstance(settings.data, InstructionData) else "",
        )


def check_tokens(sets: LoadedSets, tokenizer: PreTrainedTokenizerBase, vocabularies: Vocabularies) -> None:
    """Raise a ConfigError if rows hold tokens that not all models have, or no token of them can be aligned."""
    problems = []
    for name, encoded in named_sets(sets).items():
        problems += unknown_token_problems(name, encoded, tokenizer, vocabularies.size)
        if encoded.other is not None and vocabularies.other is not None:
            problems += unknown_token_problems(name, encoded.other, vocabularies.other, vocabularies.other_size)
            problems += unaligned_problems(name, encoded, tokenizer, vocabularies.other)
    if problems:
        raise ConfigError(problems)


def open_references(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, vocabularies: Vocabularies
) -> dict[str, LanguageModel]:
    """Open the models of all roles but the student's, on the CPU; roles with one set of weights share one model.

    Raises:
        ValueError: a model is not available or does not fit.
    """
    found: dict[str, LanguageModel] = {}
    for role, spec in settings.specs.items():
        if role == STUDENT or role in found:
            continue
        # Roles that the loss does not read may be measured at the end; they cost nothing.
        sharing = {
            other: one
            for other, one in settings.model.specs.items()
            if other not in (role, STUDENT) and base_of(one) == base_of(spec)
        }
        model = open_role(settings, role, tokenizer, vocabularies, sharing)
        found |= dict.fromkeys((name for name in (role, *sharing) if name in settings.specs), model)
    return found


def open_role(
    settings: RunSettings,
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    vocabularies: Vocabularies,
    sharing: Mapping[str, ModelSpec] | None = None,
) -> LanguageModel:
    """Open the model of one role, on the CPU; ``sharing`` is as for ``open_model``.

    Raises:
        ValueError: it is not available or does not fit.
    """
    model = open_model(
        role,
        settings.specs[role],
        settings.model,
        sharing=sharing,
        vocabulary=vocabularies.of(role),
        eos_token_id=tokenizer.eos_token_id,
        seed=settings.seed,
        max_length=settings.data.max_length if vocabularies.is_own(role) else settings.data.teachers_length,
        tensor_parallel=role != STUDENT and settings.served is not None and settings.served.sharding == "tensor",
    )
    if settings.data.packing:
        check_packing(role, model)
    return model


def open_models(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    vocabularies: Vocabularies,
    ready: References | None = None,
) -> Models:
    """Open every model of the run, prepare the student for training, and freeze the references.

    Args:
        settings: of the run.
        tokenizer: the student's.
        vocabularies: numbers of tokens that the models share.
        ready: references that are run elsewhere, or were (``open_elsewhere``).

    Raises:
        ValueError: a model is not available or does not fit.
    """
    student = _trainable(open_role(settings, STUDENT, tokenizer, vocabularies), settings)
    loaded = {STUDENT: student, **open_references(settings, tokenizer, vocabularies)}
    references = ready
    if settings.loss.requires and ready is None:
        assert isinstance(settings.reference, SourceSettings), "references that are elsewhere were not opened"
        frozen = {role: model for role, model in loaded.items() if role != STUDENT}
        has_adapter = settings.model.lora is not None
        adapted = student if has_adapter and STUDENT_RAW in settings.loss.requires else None
        references = settings.reference.make(frozen, adapted, settings.strategy)
        if settings.model.routes:
            assert isinstance(references, LiveReferences), "config/check_routes.py allows no other"
            references = RoutedReferences(references, settings.loss.requires, settings.model.routes.values())
        if settings.rollout.mixes_teacher:
            assert isinstance(references, LiveReferences), "checked with the config"
            references.prepare_to_lend(TEACHER)
    return Models(student, references, loaded)


def _trainable(student: LanguageModel, settings: RunSettings) -> LanguageModel:
    """Return the student with adapter, gradient checkpointing and compilation, as configured.

    Raises:
        ValueError: its weights are quantised, and there is no adapter to train; or it has no experts to balance.
    """
    lora = settings.model.lora
    if student.quantized and lora is None:
        raise ValueError(
            f"model.student.path={settings.specs[STUDENT].path} is a quantised checkpoint, whose weights can't be "
            "trained; add model/lora=default"
        )
    balances = settings.model.router_aux_loss_coef > 0
    problem = router_loss_problem(student.causal_lm) if balances else None
    if problem:
        raise ValueError(problem)
    unbalanced = None if balances else balance_warning(student.causal_lm.config)
    if unbalanced and is_main_process():
        log.warning("%s.", unbalanced[0].upper() + unbalanced[1:])
    if lora is not None:
        student = LanguageModel(add_lora(student.causal_lm, lora), student.vocabulary)
    if settings.rollout.on_policy and settings.loss.needs_sampled_tokens:
        rate = switch_off_dropout(student)
        if rate and is_main_process():
            log.info(
                "The student's dropout (up to %g) is off: the loss takes its tokens for samples of the student that is "
                "trained, and it writes without dropout.",
                rate,
            )
    if settings.model.gradient_checkpointing:
        student.causal_lm.gradient_checkpointing_enable()
        # With LoRA, nothing before the first adapter needs a gradient, so a checkpointed block would detach the graph.
        student.causal_lm.enable_input_require_grads()
    if settings.trainer.compile:
        student.compile_body()
    return student
