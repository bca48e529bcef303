"""The group ``reference`` of the config: where the references' hidden states come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, final

import torch
from annotated_types import Ge, Gt, Lt

from deltakd.distributed.settings import StrategySettings
from deltakd.io.keys import Resume
from deltakd.models import LanguageModel
from deltakd.models.settings import Dtype, ModelSpec
from deltakd.references.base import References
from deltakd.references.live import LiveReferences
from deltakd.references.serving.address import Address
from deltakd.references.serving.team import Sharding
from deltakd.references.serving.transports import Transport
from deltakd.types import STUDENT, TEACHER, TEACHER_RAW


class ReferenceSettings:
    """Base of the choices of ``reference``: ``LiveSettings``, ``CacheSettings``, ``ServedSettings``, or your own.

    Attributes:
        placement: a separate device for live references; ``auto``: the student's.
        shards: True if each rank holds a part of the models.
    """

    placement: str = "auto"

    @property
    def shards(self) -> bool:
        """True if each rank holds a part of the models."""
        return False

    def problems(self, specs: Mapping[str, ModelSpec]) -> list[str]:
        """Return the problems with ``reference``, one sentence each.

        Args:
            specs: role -> where its model comes from, of the models to load.
        """
        return []


class SourceSettings(ReferenceSettings, ABC):
    """References made from loaded models.

    For your own source, subclass it as a frozen dataclass, and name it as the ``_target_`` of a YAML in
    ``conf/reference``; ``make`` must return an object that fulfils the contract of ``References``.
    """

    @abstractmethod
    def make(
        self, models: Mapping[str, LanguageModel], adapted_student: LanguageModel | None, strategy: StrategySettings
    ) -> References:
        """Make the source of references.

        Args:
            models: role -> model, for each role that the loss reads; to be frozen.
            adapted_student: a LoRA student that serves as ``student_raw`` with its adapter off, or None.
            strategy: sharded references use the library that shards the student, or FSDP2 if none does.
        """


@final
@dataclass(frozen=True, kw_only=True)
class LiveSettings(SourceSettings):
    """The references run alongside the student on every batch (``conf/reference/live.yaml``).

    Args:
        placement: ``auto``: the student's device; else the name of the device where they stay, such as ``cuda:1``.
        sharding: ``replicate``: each process holds all of them; ``shard``: each a part, gathered layer by layer.
    """

    placement: str = "auto"
    sharding: Annotated[Literal["replicate", "shard"], Resume.FREE] = "replicate"

    def make(
        self, models: Mapping[str, LanguageModel], adapted_student: LanguageModel | None, strategy: StrategySettings
    ) -> References:
        """Return references that run alongside the student."""
        return LiveReferences(
            models,
            adapted_student,
            placement=self.placement,
            sharding=self.sharding,
            engine="deepspeed" if strategy.name == "deepspeed" else "fsdp",
            persistence_threshold=strategy.persistence_threshold,
        )

    @property
    def shards(self) -> bool:
        """True if each rank holds a part of the models."""
        return self.sharding == "shard"

    def problems(self, specs: Mapping[str, ModelSpec]) -> list[str]:
        """Return the problems with ``reference``, one sentence each."""
        found = []
        if self.shards:
            if self.placement != "auto":
                found.append(
                    "reference.sharding=shard divides the references over the ranks' devices, and "
                    f"reference.placement is {self.placement!r}; leave placement at auto, or sharding at replicate"
                )
            found += [
                f"model.{role}.quantization is given, but quantised weights can't be sharded; "
                "reference.sharding=replicate"
                for role, spec in specs.items()
                if role != STUDENT and spec.quantization is not None
            ]
        return found


@final
@dataclass(frozen=True, kw_only=True)
class ServedSettings(ReferenceSettings):
    """A server runs the references, in another process or on another machine (``conf/reference/served.yaml``).

    Args:
        url: where the server listens: ``tcp://host:port`` or ``unix:///path``.
        ahead: micro-batches made and asked for in advance; 0: each is asked for when its step starts.
        wait_s: seconds to wait for a server that is not there, or not any more, before the run stops.
        transport: how hidden states come: ``cuda_ipc`` between processes with GPUs in a machine, ``shared_memory``
            within a machine, ``socket``, or ``auto``: the fastest of these that works; ``nccl`` between GPUs of two
            machines, ``gloo`` between CPUs, both in private networks alone.
        sharding: how a server of several processes holds the models: each has all (``replicate``) or a part of each
            layer (``shard``, by FSDP2) and runs a part of the rows; or ``tensor``: layers are split by transformers'
            plan, and all run all rows.
    """

    url: Annotated[str | None, Resume.FREE] = None
    ahead: Annotated[int, Ge(0), Resume.FREE] = 2
    wait_s: Annotated[float, Ge(0), Resume.FREE] = 300.0
    transport: Annotated[Transport, Resume.FREE] = "auto"
    sharding: Annotated[Sharding, Resume.FREE] = "replicate"

    @property
    def address(self) -> Address:
        """Where the server listens. Raises ValueError if ``url`` is no address."""
        return Address.parse(self.url, "reference.url")

    def problems(self, specs: Mapping[str, ModelSpec]) -> list[str]:
        """Return the problems with ``reference``, one sentence each."""
        found = []
        try:
            _ = self.address
        except ValueError as error:
            found.append(str(error))
        loaded = {role: spec for role, spec in specs.items() if role != STUDENT}
        if self.sharding != "replicate":
            found += [
                f"model.{role}.quantization is given, but quantised weights can't be split over processes; give "
                "reference.sharding=replicate"
                for role, spec in loaded.items()
                if spec.quantization is not None
            ]
        if self.sharding == "tensor":
            found += [
                f"model.{role}.adapter is given, and reference.sharding=tensor splits plain models only; give "
                "reference.sharding=shard, or a merged model"
                for role, spec in loaded.items()
                if spec.adapter is not None
            ]
        return found


@final
@dataclass(frozen=True, kw_only=True)
class CacheSettings(ReferenceSettings):
    """The references were run once and are read from a cache (``conf/reference/cached.yaml``).

    Args:
        path: the directory of the cache.
        store: ``hidden``: last hidden states, exact, for every loss; ``topk``: log-probs of K tokens and of the rest,
            small, approximate, for one τ. None: the existing cache's, or ``hidden`` for a new cache.
        k: tokens in the support of ``topk``; None: chosen by ``target_error``.
        target_error: the largest relative error that the chosen K may cause on a sample, in the loss's distillation
            term (without the cross-entropy, which is exact) and in its gradient.
        dtype: of the stored numbers; None: the models' own for ``hidden``, float16 for ``topk``.
        verify: check all checksums when the cache is opened; sizes are always checked.
        remake: recreate damaged files (``deltakd.cache`` only).
        url: the address of a vLLM or SGLang server that serves the teacher, which is then not loaded
            (``deltakd.cache`` only, as all that follow).
        served_model: the teacher's name there; None: the only model.
        raw_url: likewise of a vLLM server that serves the raw teacher.
        served_raw_model: the raw teacher's name there; None: the only model.
        log_probs: files with the teacher's top-k log-probs, instead of a server.
    """

    path: str | None = None
    store: Literal["hidden", "topk"] | None = None
    k: Annotated[int, Ge(2)] | None = None
    target_error: Annotated[float, Gt(0), Lt(1)] = 0.01
    dtype: Dtype | None = None
    verify: Annotated[bool, Resume.FREE] = True
    remake: Annotated[bool, Resume.FREE] = False
    url: Annotated[str | None, Resume.FREE] = None
    served_model: Annotated[str | None, Resume.FREE] = None
    raw_url: Annotated[str | None, Resume.FREE] = None
    served_raw_model: Annotated[str | None, Resume.FREE] = None
    log_probs: Annotated[str | Sequence[str] | None, Resume.FREE] = None

    @property
    def outside(self) -> frozenset[str]:
        """Roles whose log-probs come from servers or files, so that their models are not loaded."""
        if self.url is None and self.log_probs is None:
            return frozenset()
        return frozenset({TEACHER} if self.raw_url is None else {TEACHER, TEACHER_RAW})

    def problems(self, specs: Mapping[str, ModelSpec]) -> list[str]:
        """Return the problems with ``reference``, one sentence each."""
        if self.path:
            return []
        return ["reference.path is missing; give the directory of the cache: reference.path=outputs/cache_of_x"]


def device_problems(key: str, name: str) -> list[str]:
    """Return why the device that a config key names is not available; empty if it is."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"{key} is {name!r}, which names no device; give auto, cpu, cuda:1, ..."]
    if device.type in ("cpu", "meta"):
        return []
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if there is None or there.type != device.type:
        return [f"{key} is {name!r}, but this machine has no {device.type} device; give auto or cpu"]
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        return [f"{key} is {name!r}, but this machine has {count} {device.type} devices, counted from 0"]
    return []
