"""The memory that a run needs, estimated from its config, and the memory available: ``trainer.dry_run=true``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from deltakd.distributed.devices import choose_device
from deltakd.distributed.launchers import count_devices
from deltakd.estimates.costs import MIB, Need, Setting, memory, while_writing
from deltakd.estimates.layout import Layout
from deltakd.estimates.sizes import Skeleton
from deltakd.estimates.work import operations, writing_operations
from deltakd.estimates.writing import Writing
from deltakd.io.console import make_console
from deltakd.kernels import MEMORY_BUDGET, KernelOptions
from deltakd.models import load_skeleton, load_tokenizer
from deltakd.models.adapter_files import adapter_bytes, shared_weights
from deltakd.models.loading import DTYPES
from deltakd.models.lora import add_lora
from deltakd.references import CacheStore
from deltakd.training.settings import RunSettings, StepSettings
from deltakd.types import STUDENT, STUDENT_RAW

log = logging.getLogger(__name__)


def show_memory(settings: RunSettings, console: Console | None = None) -> None:
    """Print the table of :func:`estimate`, and warn if there is too little memory.

    Raises:
        ValueError: a model's configuration is not available.
    """
    needs = estimate(settings)
    devices = list(dict.fromkeys(need.device for need in needs))
    together = processes(settings)
    table = Table("a process needs, in MiB", title=f"{settings.name}: memory (estimate)", title_justify="left")
    for device in devices:
        table.add_column(device, justify="right")
    for what in dict.fromkeys(need.what for need in needs):
        shown = [sum(n.bytes for n in needs if (n.what, n.device) == (what, device)) for device in devices]
        table.add_row(what, *(_mib(size) if size else "" for size in shown))
    total = {device: sum(need.bytes for need in needs if need.device == device) for device in devices}
    there = {device: available(device) for device in devices}
    table.add_section()
    table.add_row("all together", *(_mib(total[device]) for device in devices))
    table.add_row("there is", *(_mib(size) if (size := there[device]) is not None else "?" for device in devices))
    shown_on = console or make_console()
    shown_on.print(table)
    if settings.rollout.on_policy:
        _show_writing(settings, shown_on)
    for device in devices:
        # Processes share CPU memory, but each has its own GPU.
        wanted = total[device] * (together if device == "cpu" else 1)
        has = there[device]
        if has is not None and wanted > has:
            log.warning(
                "%s: about %s MiB are needed%s, but there are %s MiB. Smaller micro-batches (data.batch_size, with "
                "trainer.accumulate_grad_batches), model.gradient_checkpointing=true, model.teacher.dtype=bfloat16, "
                "model/lora=default, kernels.memory_budget or reference=cached need less.",
                device,
                _mib(wanted),
                f" by {together} processes" if wanted != total[device] else "",
                _mib(has),
            )


def _show_writing(settings: RunSettings, console: Console) -> None:
    """Print what of the memory the student needs to write responses, and their share of a step's operations."""
    setting = setting_of(settings, *_devices(settings))
    if setting.writing is None:
        console.print("A server writes the responses; its memory is not counted.", markup=False)
        return
    table = Table("while responses are written, in MiB", title="beside weights and optimiser", title_justify="left")
    table.add_column("")
    for what, device, size in while_writing(setting):
        if size:
            table.add_row(what, f"{_mib(size)} ({device})")
    console.print(table)
    share = sum(a for _, a in writing_operations(setting)) / sum(a for _, a in operations(setting))
    console.print(
        f"Responses: {setting.writing.responses:g} a step of a process, up to {setting.writing.response:,} tokens "
        f"each, {share:.0%} of the step's operations.",
        markup=False,
        highlight=False,
    )


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"


def estimate(settings: RunSettings) -> list[Need]:
    """Return each process's memory at the peak of a training step (see ``costs.memory``).

    Sharding of student and references is counted. Measured on CPUs, the sum is within 25 % of what the tensors take
    (tests/estimates/test_costs.py). glibc keeps freed memory, so a process on a CPU grows by up to 1.3 times that.

    Raises:
        ValueError: a model's configuration is not available.
    """
    return memory(setting_of(settings, *_devices(settings)))


def planned_setting(settings: RunSettings) -> Setting:
    """Return the setting of a plan for ``trainer.devices`` GPUs (or CPUs, with that accelerator), present or not.

    Raises:
        ValueError: a model's configuration is not available, or the number of devices or machines is 0.
    """
    for key in ("devices", "num_nodes"):
        if getattr(settings.trainer, key) in (0, []):
            raise ValueError(f"trainer.{key} is {getattr(settings.trainer, key)}; give at least 1")
    device = "cpu" if settings.trainer.accelerator == "cpu" else "cuda"
    placement = placement_of(settings)
    return setting_of(settings, device, device if placement == "auto" else placement)


def setting_of(settings: RunSettings, device: str, home: str) -> Setting:
    """Return the inputs to the costs of the run's steps.

    Args:
        settings: of the run.
        device: the student's device.
        home: the references' device.

    Raises:
        ValueError: a model's configuration is not available.
    """
    shards = settings.reference.shards
    layout = Layout.of(settings.strategy, processes(settings) * settings.trainer.num_nodes, shards)
    skeletons = {role: _skeleton(settings, role, layout) for role in settings.specs}
    student = skeletons.pop(STUDENT)
    heads, token_bytes = _cached(settings)
    elsewhere = settings.cache is not None or settings.served is not None
    return make_setting(
        StepSettings(
            settings.loss, settings.data, settings.model, settings.trainer, settings.kernels, settings.rollout
        ),
        layout,
        student,
        skeletons,
        device=device,
        home=home,
        adapted=settings.model.lora is not None and not elsewhere and STUDENT_RAW in settings.loss.requires,
        cached_heads=heads,
        cached_bytes=token_bytes,
        half_weights=settings.optim.half_weights,
        shared=shared_weights({role: spec for role, spec in settings.specs.items() if role != STUDENT}),
        adapters={role: adapter_bytes(spec) for role, spec in settings.specs.items() if spec.adapter},
        routed=len(set((settings.model.routes or {"*": 1}).values())),
    )


def make_setting(
    settings: StepSettings,
    layout: Layout,
    student: Skeleton,
    references: Mapping[str, Skeleton],
    **others: Any,
) -> Setting:
    """Return the inputs to the costs of a step; ``others`` are further fields of ``Setting``."""
    form = settings.loss.fused_form
    return Setting(
        student,
        references,
        layout,
        positions=settings.data.positions,
        row=settings.data.max_length,
        valid=settings.data.positions,
        accumulate=settings.trainer.accumulate_grad_batches,
        precision=str(settings.trainer.precision),
        checkpointed=settings.model.gradient_checkpointing,
        budget=_budget(settings.kernels.memory_budget, str(others.get("device", "cpu"))),
        form="autograd" if form is None else form.kind,
        writing=Writing.of(settings),
        teacher_length=settings.data.teachers_length / settings.data.max_length,
        **others,
    )


def _budget(given: float | None, device: str) -> float:
    """Return the MiB for a chunk of logits; on a GPU that is not here, those on one of 80 GB."""
    if given is not None or not device.startswith("cuda"):
        return given or MEMORY_BUDGET
    return KernelOptions().budget(torch.device(device)) if torch.cuda.is_available() else 80e9 / 56 / 2**20


def _skeleton(settings: RunSettings, role: str, layout: Layout) -> Skeleton:
    """Return the sizes of a role's model as it will be in training."""
    spec = settings.specs[role]
    if role == STUDENT and spec.quantization is not None:
        # Unquantised weights become float32 for training (models/lora.py).
        spec = replace(spec, dtype="float32")
    model: Any = load_skeleton(
        role,
        spec,
        vocabulary=_vocabulary(settings) if spec.init == "random" else 0,
        attn_implementation=settings.model.attn_implementation,
        trust_remote_code=settings.model.trust_remote_code,
    )
    if role != STUDENT:
        return Skeleton(model.requires_grad_(False), spec)
    if settings.model.lora is not None:
        with torch.device("meta"):
            model = add_lora(model, settings.model.lora)
    whole = layout.whole_dtype(str(settings.trainer.precision))
    return Skeleton(model, spec, DTYPES[whole] if whole else None)


def _vocabulary(settings: RunSettings) -> int:
    """Return V of a model from scratch, or its upper limit if the tokenizer is still to be trained."""
    spec = settings.specs[STUDENT]
    if not spec.tokenizer:
        return settings.model.tokenizer.vocabulary
    trust = settings.model.trust_remote_code
    tokenizer = load_tokenizer(spec.tokenizer, "model.student.tokenizer", trust_remote_code=trust)
    return max(tokenizer.get_vocab().values()) + 1


def _cached(settings: RunSettings) -> tuple[list[tuple[int, int]], int]:
    """Return the cached heads as (elements, bytes per element), and the cache's bytes per token."""
    if settings.cache is None or settings.cache.path is None:
        return [], 0
    manifest = CacheStore.open(Path(settings.cache.path)).manifest
    token_bytes = int(manifest.content["bytes_per_token"])
    if manifest.heads is None:
        return [], token_bytes
    found = []
    with safe_open(Path(settings.cache.path) / manifest.heads.file, "pt") as heads:
        for name in heads.keys():  # noqa: SIM118 - no mapping
            if name.partition(".")[0] in settings.read_roles:
                part = heads.get_slice(name)
                found.append((math.prod(part.get_shape()), 2 if part.get_dtype() in ("BF16", "F16") else 4))
    return found, token_bytes


def processes(settings: RunSettings) -> int:
    """Return the number of processes on this machine, by the config or else its GPUs."""
    return count_devices(settings.trainer.devices) or max(1, torch.cuda.device_count())


def _devices(settings: RunSettings) -> tuple[str, str]:
    """Return (the student's device, the references') of the first process."""
    try:
        student = str(choose_device(settings.trainer.accelerator))
    except ValueError:
        # Training itself will report the missing device; the memory it needs is the same.
        student = "cpu"
    placement = placement_of(settings)
    home = student if placement == "auto" else placement
    return student, "cuda:0" if home == "cuda" else home


def placement_of(settings: RunSettings) -> str:
    """Return where the references run: ``auto`` is the student's device, as for cached ones."""
    return settings.reference.placement


def available(device: str) -> int | None:
    """Return the free bytes of a GPU, or the available CPU memory; None: unknown."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if device != "cpu":
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
