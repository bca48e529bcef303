"""The frozen models that a student is measured against, read from the reference cache or loaded once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from deltakd.data import EncodedSet, tokenizer_fingerprint
from deltakd.distributed.sharding import gathered
from deltakd.generation.model_step import position_limit
from deltakd.kernels import Buckets
from deltakd.models import LanguageModel, ModelSettings, load_config, spec_problems
from deltakd.models.identity import spec_of
from deltakd.models.roles import open_reference
from deltakd.references import (
    CachedReferences,
    CacheSettings,
    CacheStore,
    LiveReferences,
    References,
    RoutedHeads,
    ServedReferences,
)
from deltakd.references.content import cached_model_problems
from deltakd.references.index import keys_of_set
from deltakd.references.routed import names_of_pair
from deltakd.types import STUDENT, STUDENT_RAW, TEACHER, TEACHER_RAW, Batch, Head

log = logging.getLogger(__name__)

#: Roles that a student is measured against.
WANTED = (TEACHER, TEACHER_RAW, STUDENT_RAW)


@dataclass(frozen=True)
class HeadSource:
    """Heads of some roles for the rows of one set.

    Args:
        parts: sources of the heads.
        roles: roles that have a head.
        vocabulary: number of tokens that all of them share.
        name: ``cached``, ``served``, ``live``, several of them, or ``none``.
    """

    parts: list[References]
    roles: frozenset[str]
    vocabulary: int
    name: str

    def __call__(self, batch: Batch) -> dict[str, Head]:
        """Return role -> head of the batch's N valid tokens, cut to the vocabulary."""
        heads: dict[str, Head] = {}
        for part in self.parts:
            given = part(batch)
            assert not isinstance(given, Buckets), "a store of log-probs of some tokens is never opened here"
            # Rows are measured task by task.
            given = given.of_one_pair if isinstance(given, RoutedHeads) else given
            heads |= {role: cut(head, self.vocabulary) for role, head in given.items() if role in self.roles}
        return heads


def cut(head: Head, vocabulary: int) -> Head:
    """Return the head over the first N tokens of the vocabulary."""
    bias = None if head.bias is None else head.bias[:vocabulary]
    return replace(head, weight=head.weight[:vocabulary], bias=bias)


@final
class MeasuredReferences:
    """Finds the references available for each set of rows, and logs the missing ones.

    Args:
        models: the models that the run names.
        tokenizer: the student's.
        vocabulary: its number of tokens.
        cache: the group ``reference`` if it names a cache, else None.
        served: references that a server runs; no teacher is loaded then. None: there are none.
        pair: number of the pair that ``models`` and ``loaded`` have as ``teacher`` and ``teacher_raw``.
        loaded: role -> frozen model already in memory.
        placement: placement of the live references, see ``LiveReferences``.
        device: the student's device.
    """

    def __init__(
        self,
        models: ModelSettings,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: int,
        cache: CacheSettings | None,
        loaded: Mapping[str, LanguageModel],
        placement: str,
        device: torch.device,
        served: ServedReferences | None = None,
        pair: int = 1,
    ) -> None:
        self._models = models
        #: Role -> its name in the config.
        self._names = names_of_pair(WANTED, pair)
        self._served = served
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._placement = placement
        self._device = device
        #: Those loaded for other roles can be these with another adapter, or without one.
        also = {role: model for model in loaded.values() for role in model.adapters}
        self._loaded: dict[str, LanguageModel] = also | dict(loaded)
        self._given_up: set[str] = set()
        #: Role -> the latest reason for leaving it out.
        self.reasons: dict[str, str] = {}
        self._cached = None if cache is None else self._open(cache)
        if self._cached is not None:
            self._cached.to(device)
        if served is not None:
            served.to(device)

    def missing(self) -> dict[str, str]:
        """Return role, by its name in the config -> why it is not available, without loading a model."""
        there = frozenset(self._loaded) | (frozenset() if self._cached is None else self._cached.roles)
        reasons = {role: self._reason(role) for role in WANTED if role not in there}
        return {self._names[role]: reason for role, reason in reasons.items() if reason}

    def held_for(self, models: ModelSettings) -> dict[str, LanguageModel]:
        """Return role -> model in memory, of the roles that have the same model in other settings."""
        return {
            role: model for role, model in self._loaded.items() if spec_of(self._models, role) == spec_of(models, role)
        }

    def _is_named(self, role: str) -> bool:
        """Return True if the config names a trained model for the role, whose absence is worth reporting."""
        spec = spec_of(self._models, role)
        return spec is not None and spec.path is not None and spec.init == "pretrained"

    def _reason(self, role: str) -> str:
        """Return why the model of a role can't be loaded, judged by its config alone; empty if it may be loadable."""
        spec = spec_of(self._models, role)
        if spec is None or spec.path is None or spec.init == "random":
            if role == STUDENT_RAW and self._models.specs[STUDENT].init == "random":
                return "model.student.init=random has no trained self; the run began from scratch"
            key = f"model.{self._names[role]}.path"
            return f"{key} is missing; give a hub id or a local directory: {key}=..."
        problems = spec_problems(self._names[role], spec)
        if problems:
            return "; ".join(problems)
        try:
            load_config(self._names[role], spec, trust_remote_code=self._models.trust_remote_code)
        except ValueError as error:
            return str(error)
        return ""

    def source(
        self, name: str, encoded: EncodedSet, rows: NDArray[np.int64], wanted: Collection[str] = WANTED
    ) -> HeadSource:
        """Return the heads available for some rows of a set. Collective: call on every rank.

        Args:
            name: name of the set, for the log.
            encoded: the set.
            rows: positions in it, the same on all ranks.
            wanted: the roles to find.
        """
        cached = self._cached_roles(encoded, rows) & frozenset(wanted)
        longest = int(encoded.lengths[rows].max())
        served = self._served_roles(longest) & frozenset(wanted)
        live = self._fitting(self._live({role for role in wanted if role not in cached | served}, longest))
        own = {role: model.vocabulary for role, model in live.items()}
        if self._cached is not None:
            own |= dict.fromkeys(cached, self._cached.vocabulary)
        if self._served is not None:
            own |= dict.fromkeys(served, self._served.vocabulary)
        # The ranks agree on the roles: one of them may have failed to read a file, or run out of memory.
        of_ranks = gathered(own)
        roles = frozenset.intersection(*(frozenset(of) for of in of_ranks))
        vocabulary = min([self._vocabulary, *(of[role] for of in of_ranks for role in roles)])
        lacking = [role for role in wanted if role not in roles and self._is_named(role)]
        if lacking:
            log.info("%s is measured without %s.", name, ", ".join(self._names[role] for role in lacking))
        parts: dict[str, References] = {}
        if self._cached is not None and roles & cached:
            parts["cached"] = self._cached
        if self._served is not None and roles & served:
            parts["served"] = self._served
        if roles & live.keys():
            references = LiveReferences({role: live[role] for role in live if role in roles}, placement=self._placement)
            references.to(self._device)
            parts["live"] = references
        return HeadSource([*parts.values()], roles, vocabulary, " and ".join(parts) or "none")

    def _cached_roles(self, encoded: EncodedSet, rows: NDArray[np.int64]) -> frozenset[str]:
        if self._cached is None:
            return frozenset()
        needed = rows[encoded.valid_tokens[rows] > 0]
        there = self._cached.index.find(keys_of_set(encoded)[needed]) >= 0
        return self._cached.roles if there.all() else frozenset()

    def _served_roles(self, longest: int) -> frozenset[str]:
        if self._served is None:
            return frozenset()
        positions = self._served.positions
        if positions is not None and longest > positions:
            log.warning("The server's models have positions for %d tokens, but a row has %d.", positions, longest)
            return frozenset()
        return self._served.roles

    def _open(self, settings: CacheSettings) -> CachedReferences | None:
        """Return the cached roles whose models match the config; None if there are none.

        Rows are found by their tokens, so the cache may have been made from different data.
        """
        path = Path(str(settings.path))
        if not settings.path or not CacheStore.is_at(path):
            return None
        try:
            store = CacheStore.open(path)
            content = store.manifest.content
            if content["store"] != "hidden":
                log.info("%s keeps log-probs of some tokens, which can't give exact measures: it is not read.", path)
                return None
            if content["tokenizer"] != tokenizer_fingerprint(self._tokenizer):
                return None
            there = content["models"]
            held = {role: there[name] for role, name in self._names.items() if name in there}
            specs = {role: spec_of(self._models, role) for role in WANTED if role in held}
            roles = [
                role for role, spec in specs.items() if not cached_model_problems(role, spec, held[role], str(path))
            ]
            # No checksums: if the loss reads this cache, they were verified before training.
            store.check(checksum=False)
            return CachedReferences(store, roles) if roles else None
        except (ValueError, OSError) as error:
            log.warning("The cache of references can't be read to measure with it: %s", error)
            return None

    def _live(self, roles: Collection[str], longest: int) -> dict[str, LanguageModel]:
        found = {}
        for role in WANTED:
            model = self._model(role) if role in roles else None
            if model is None:
                continue
            positions = position_limit(model.causal_lm)
            if positions is not None and longest > positions:
                self.reasons[role] = f"it has positions for {positions} tokens, but a row has {longest}"
                named = self._names[role]
                log.warning("The %s has positions for %d tokens, but a row has %d.", named, positions, longest)
                continue
            found[role] = model
        return found

    def _fitting(self, models: Mapping[str, LanguageModel]) -> dict[str, LanguageModel]:
        """Move the models that fit alongside the student to the device, and return them; give up the rest."""
        found = {}
        for role, model in models.items():
            try:
                LiveReferences({role: model}, placement=self._placement).to(self._device)
            except torch.OutOfMemoryError as error:
                log.warning(
                    "The %s does not fit beside the student, so its measures are left out "
                    "(evaluation.measures.references=none loads no model): %s",
                    self._names[role],
                    error,
                )
                self.reasons[role] = f"it does not fit beside the student ({error})"
                if not model.quantized:
                    model.to("cpu")
                self._loaded.pop(role)
                self._given_up.add(role)
            else:
                found[role] = model
        return found

    def _model(self, role: str) -> LanguageModel | None:
        """Return the model of a role, loading it on first use; None if the config names none or it can't be used."""
        if role in self._loaded or role in self._given_up:
            return self._loaded.get(role)
        spec = spec_of(self._models, role)
        if self._served is not None and role != STUDENT_RAW:
            self.reasons[role] = "the server of references does not run it"
        elif spec is not None and self._is_named(role):
            try:
                self._loaded[role] = open_reference(role, spec, self._models, self._tokenizer, self._vocabulary)
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                self.reasons[role] = str(error)
                named = self._names[role]
                log.warning("The %s is not available, so its measures are left out: %s", named, error)
        if role not in self._loaded:
            self._given_up.add(role)
        return self._loaded.get(role)
