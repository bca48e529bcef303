"""References that run alongside the student."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, final

import torch
import torch.distributed as dist

from deltakd.distributed.settings import PERSISTENCE_THRESHOLD
from deltakd.models import LanguageModel
from deltakd.types import STUDENT_RAW, Batch, Head, TokenStream, device_of

if TYPE_CHECKING:
    from deltakd.distributed.sharding import Shell
    from deltakd.references.sharded import Engine


@final
class LiveReferences:
    """Frozen models, run on every batch. Hidden states travel to the student's device, logits never do.

    Args:
        models: role -> model; frozen here and put in eval mode for good. Roles may share one model, with another
            adapter or the same; it runs once for each adapter.
        adapted_student: a LoRA student that serves ``student_raw`` with its adapter switched off. If it is sharded,
            its head is whole only in the ``forward`` of the sharded module: call the references from there.
        placement: ``auto``: the student's device; else the name of the references' device.
        sharding: ``replicate``: each rank holds all of them; ``shard``: each holds a part and gathers layer by layer.
        engine: the library that shards them.
        persistence_threshold: ZeRO 3 keeps parameters with fewer elements whole on each rank.
    """

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        adapted_student: LanguageModel | None = None,
        placement: str = "auto",
        sharding: str = "replicate",
        engine: Engine = "fsdp",
        persistence_threshold: int = PERSISTENCE_THRESHOLD,
    ) -> None:
        self._models = dict(models)
        self._sharding = sharding
        self._engine = engine
        self._persistence_threshold = persistence_threshold
        #: By the model's id, the callable to run: the model, or a wrapper that gathers its shards.
        self._runners: dict[int, Callable[[TokenStream], Head]] = {id(model): model for model in models.values()}
        self._adapted_student = adapted_student
        self._placement = placement
        self._device = torch.device("cpu")
        #: Roles to be lent whole, and for sharded models the shells that are filled for it.
        self._lent: set[str] = set()
        self._shells: dict[str, Shell] = {}
        #: Output embeddings of models on another device, copied to the student's once.
        self._remote_weights: dict[str, torch.Tensor] = {}
        for model in self._models.values():
            model.eval().requires_grad_(False)

    @property
    def roles(self) -> frozenset[str]:
        extra = {STUDENT_RAW} if self._adapted_student is not None else set()
        return frozenset(self._models) | extra

    def to(self, device: torch.device) -> None:
        """Move to ``device`` with the student, or stay on the device of ``placement`` and send hidden states over.

        Sharded references are sharded here; it is then collective: call on every rank.
        """
        self._device = device
        home = self._home
        if self.is_sharded:
            # FSDP2 and DTensor are imported for those who shard.
            from deltakd.distributed.sharding import Shell
            from deltakd.references.sharded import sharded

            self._shells = {role: Shell(self._models[role]) for role in self._lent}
            self._runners = {
                id(model): sharded(model, self._engine, device, self._persistence_threshold) for model in self._distinct
            }
            return
        for model in self._distinct:
            # Most quantised weights can't be moved, or only once: from CPU memory to the device that packs them.
            if not (model.quantized and device_of(model).type == home.type):
                model.to(home)

    def empty_heads(self) -> dict[str, Head]:
        """Return role -> head over no tokens, of the models loaded. Call before ``to``, which may shard them."""
        return {role: model.empty_head() for role, model in self._models.items()}

    @property
    def _distinct(self) -> list[LanguageModel]:
        return list({id(model): model for model in self._models.values()}.values())

    @property
    def _home(self) -> torch.device:
        return self._device if self._placement == "auto" else torch.device(self._placement)

    def prepare_to_lend(self, role: str) -> None:
        """Allow ``whole(role)`` later. Call before ``to``: a sharded model needs a shell made of the whole one."""
        self._lent.add(role)

    @contextmanager
    def whole(self, role: str) -> Iterator[LanguageModel]:
        """Yield a model, on its own device, that this rank can run alone. Collective: call on every rank."""
        assert role in self._lent, f"{role} was not prepared"
        model = self._models[role]
        shell = self._shells.get(role)
        with nullcontext(model) if shell is None else shell.filled(model) as whole, whole.as_role(role):
            yield whole

    def start(self, batch: Batch) -> Callable[[], dict[str, Head]]:
        """On the student's device, run now: the activations are freed before the student makes its own.

        On another device, send the batch now and run once the student's forward pass is queued: both devices then work
        at the same time, and only the loss waits.
        """
        if self.runs_beside_student:
            heads = self(batch)
            return lambda: heads
        there = self.sent(batch)
        return lambda: self.heads(self.roles, batch, there)

    def __call__(self, batch: Batch) -> dict[str, Head]:
        """Return role -> head of the valid tokens of the role's stream (``Batch.stream_of``)."""
        return self.heads(self.roles, batch, self.sent(batch))

    @property
    def runs_beside_student(self) -> bool:
        """True if the models are on the student's device."""
        return self._home == self._device

    @property
    def is_sharded(self) -> bool:
        """True if each rank holds a part of the models, so that all ranks must run them together."""
        return self._sharding == "shard" and dist.is_initialized()

    def sent(self, batch: Batch) -> Batch:
        """Return the batch on the models' device."""
        return batch.to(self._home, non_blocking=self._home.type == "cuda")

    @torch.no_grad()
    def heads(self, roles: Collection[str], batch: Batch, there: TokenStream) -> dict[str, Head]:
        """Return role -> head, for some of the roles.

        Args:
            roles: the roles.
            batch: on the student's device, for a LoRA student that serves as ``student_raw``.
            there: on the models' device; its valid tokens are those of the heads.
        """
        found: dict[str, Head] = {}
        runs: dict[tuple[int, str | None], Head] = {}
        for role, model in self._models.items():
            if role not in roles:
                continue
            run = (id(model), model.adapters.get(role))
            if run not in runs:
                with model.as_role(role):
                    runs[run] = self._run(self._runners[id(model)], there.stream_of(role))
            found[role] = runs[run]
        # Only once all are queued: a copy to the student's device waits for its source.
        heads = {role: self._brought(role, head) for role, head in found.items()}
        if self._adapted_student is not None and STUDENT_RAW in roles:
            # Not called as a module: ZeRO 3 would free the head on return, and the loss still multiplies by it.
            with self._adapted_student.adapter_off():
                head = self._adapted_student.head(batch)
            heads[STUDENT_RAW] = replace(head, weight=head.weight.detach())
        return heads

    def _run(self, runner: Callable[[TokenStream], Head], rows: TokenStream) -> Head:
        # The student's autocast must not reach the references: each runs in its own dtype.
        with torch.autocast(self._home.type, enabled=False):
            return runner(rows)

    def _brought(self, role: str, head: Head) -> Head:
        if head.hidden.device == self._device:
            return head
        if role not in self._remote_weights or self._remote_weights[role].device != self._device:
            self._remote_weights[role] = head.weight.to(self._device)
        bias = None if head.bias is None else head.bias.to(self._device)
        return replace(head, hidden=head.hidden.to(self._device), weight=self._remote_weights[role], bias=bias)
