"""How much memory a run will need, from its config alone, beside how much there is: ``trainer.dry_run=true``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltakd.kernels.chunked import chunk_size_for
from deltakd.models import ModelSpec, add_lora, load_skeleton, load_tokenizer
from deltakd.models.loading import DTYPES
from deltakd.models.quantization import weight_bits
from deltakd.references import CacheStore
from deltakd.runs.plan import Plan
from deltakd.types import STUDENT, LinearForwardKL

log = logging.getLogger(__name__)

MIB = 2**20
#: Activations that gelu_new and its like, which are made of several operations, keep of each inner unit.
_COMPOSITE = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "quick_gelu")


class Need(NamedTuple):
    """What one thing takes on one device.

    Args:
        what: its name in the table.
        device: where it is.
        bytes: its size.
    """

    what: str
    device: str
    bytes: int


@dataclass(frozen=True)
class Skeleton:
    """A model's sizes.

    Args:
        model: the model on ``meta``, with its adapter where it has one.
        spec: where it comes from.
        dtype: what its parameters are converted to, or None.
    """

    model: PreTrainedModel | Any
    spec: ModelSpec
    dtype: torch.dtype | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, tied ones once; quantised layers at their few bits a weight."""
        bits = weight_bits(self.spec.quantization or getattr(self.config, "quantization_config", None))
        packed = {id(weight) for weight in self._linear_weights()} if bits is not None else set()
        return sum(
            p.numel() * (bits or 0) // 8 if id(p) in packed else p.numel() * self._itemsize(p)
            for p in self.model.parameters()
        )

    @property
    def trained_bytes(self) -> int:
        """Bytes of the parameters that are trained."""
        return sum(p.numel() * self._itemsize(p) for p in self.model.parameters() if p.requires_grad)

    @property
    def linear_elements(self) -> int:
        """Weights of linear layers, the head among them: what autocast makes half-precision copies of."""
        return sum(w.numel() for w in self._linear_weights()) + self.head.numel()

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def head(self) -> torch.Tensor:
        """[V, D] the output embedding."""
        return self.model.get_output_embeddings().weight

    @property
    def head_itemsize(self) -> int:
        """Bytes of a number of the head."""
        return self._itemsize(self.head)

    def _itemsize(self, tensor: torch.Tensor) -> int:
        return tensor.itemsize if self.dtype is None else self.dtype.itemsize

    def _linear_weights(self) -> list[torch.Tensor]:
        """Frozen or trained weights of the linear layers but the head and adapters."""
        layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
        return [m.weight for name, m in layers if m.weight is not self.head and "lora_" not in name]

    def layer_elements(self, positions: int, row: int, attention_matrix: bool) -> int:
        """Numbers that one layer keeps for its backward pass, after Korthikanti et al. (arXiv 2205.05198).

        10 h a position for norms, projections and dropout; and of each inner unit of the MLP 2 (input and output of
        the activation), 4 where it is gated, 5 where the activation is made of several operations. Where the attention
        matrix is made, 3 numbers (softmax, dropout and their product) of it for each head.

        Args:
            positions: B · T.
            row: T.
            attention_matrix: whether attention is not one fused operation.
        """
        config = self.config
        hidden = config.hidden_size
        inner = next(
            (int(v) for k in ("intermediate_size", "ffn_dim", "n_inner") if (v := getattr(config, k, None))), 4 * hidden
        )
        activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
        gated = any(name.endswith(("gate_proj", "gate_up_proj")) for name, _ in self.model.named_modules())
        per_unit = 4 if gated else 5 if activation in _COMPOSITE else 2
        matrix = 3 * config.num_attention_heads * row if attention_matrix else 0
        return positions * (10 * hidden + per_unit * inner + matrix)


def show_memory(plan: Plan, console: Console | None = None) -> None:
    """Print the table of :func:`estimate`, and warn where more is needed than there is.

    Raises:
        ValueError: a model's configuration can't be had.
    """
    needs = estimate(plan)
    devices = list(dict.fromkeys(need.device for need in needs))
    processes = _processes(plan)
    table = Table("a process needs, in MiB", title=f"{plan.config['name']}: memory (estimate)", title_justify="left")
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
    (console or Console()).print(table)
    for device in devices:
        # Processes share the RAM, but each has a GPU of its own.
        wanted = total[device] * (processes if device == "cpu" else 1)
        has = there[device]
        if has is not None and wanted > has:
            log.warning(
                "%s: about %s MiB are needed%s, but there are %s MiB. Smaller micro-batches (data.batch_size, with "
                "trainer.accumulate_grad_batches), model.gradient_checkpointing=true, model.teacher.dtype=bfloat16, "
                "model/lora=default, kernels.memory_budget or reference=cached need less.",
                device,
                _mib(wanted),
                f" by {processes} processes" if wanted != total[device] else "",
                _mib(has),
            )


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"


def estimate(plan: Plan) -> list[Need]:
    """What a training step of the plan has in memory at its peak, at the end of the student's forward pass.

    Weights, gradients and AdamW's moments are exact (two moments of each trained parameter, in its dtype); the
    gradients of the step before are still there. Activations are an **estimate**, by the formula of
    ``Skeleton.layer_elements`` for a micro-batch without any room to spare; with gradient checkpointing each layer
    keeps its input alone, and one layer at a time all. The loss takes ``kernels.memory_budget``, the gradient of the
    head in float32, and float32 copies of half-precision heads (kernels/chunked.py). Not counted: the libraries'
    own memory (a CUDA context, the interpreter), the generation of answers, what ZeRO or FSDP would spare, and memory
    that is free but not given back. Measured on a CPU (GPT-2, 6 layers of 256), the sum is 0.78 to 1.05 times what the
    tensors take at the peak; glibc keeps so much freed memory that the process grows by up to 1.3 times that.

    Raises:
        ValueError: a model's configuration can't be had.
    """
    device, home = _devices(plan)
    precision = str(plan.config["trainer"]["precision"])
    skeletons = {role: _skeleton(plan, role, precision) for role in plan.specs}
    student = skeletons.pop(STUDENT)
    copies = 2 if _processes(plan) > 1 else 1  # Data-parallel training has a second copy, in buckets.
    needs = [
        Need("weights of the student", device, student.weight_bytes),
        Need("gradients", device, copies * student.trained_bytes),
        Need("optimiser (AdamW)", device, 2 * student.trained_bytes),
    ]
    if _is_mixed(precision):
        needs.append(Need("half-precision copies", device, 2 * student.linear_elements))
    needs += [Need(f"reference {role}", home, s.weight_bytes) for role, s in skeletons.items()]
    cached = sum(numbers * itemsize for numbers, itemsize in _cached_heads(plan))
    needs.append(Need("heads of the cached references", device, cached))
    if home != device:
        remote = sum(s.head.numel() * s.head_itemsize for s in skeletons.values())
        needs.append(Need("heads of the references", device, remote))
        needs.append(Need("activations of the references", home, _reference_activations(plan, skeletons)))
    hidden = sum(plan.data.positions * s.config.hidden_size * s.head_itemsize for s in skeletons.values())
    needs += [
        Need("hidden states of the references", device, hidden),
        Need("activations of the student", device, _activations(plan, student, device, precision)),
        Need("loss", device, _loss(plan, student, skeletons)),
    ]
    return [need for need in needs if need.bytes]


def _skeleton(plan: Plan, role: str, precision: str) -> Skeleton:
    """The model of a role as it will be in training."""
    settings, spec = plan.config["model"], plan.specs[role]
    if role == STUDENT and spec.quantization is not None:
        # What is not quantised is made float32 for training (models/lora.py).
        spec = replace(spec, dtype="float32")
    model: Any = load_skeleton(
        role,
        spec,
        vocabulary=_vocabulary(plan) if spec.init == "random" else 0,
        attn_implementation=settings["attn_implementation"],
        trust_remote_code=settings["trust_remote_code"],
    )
    if role != STUDENT:
        return Skeleton(model.requires_grad_(False), spec)
    if plan.lora is not None:
        with torch.device("meta"):
            model = add_lora(model, plan.lora)
    whole = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}.get(precision)
    return Skeleton(model, spec, DTYPES[whole] if whole else None)


def _vocabulary(plan: Plan) -> int:
    """Tokens of a model from scratch; about, where its tokenizer has still to be trained."""
    spec, settings = plan.specs[STUDENT], plan.config["model"]
    if not spec.tokenizer:
        return int(settings["tokenizer"]["vocabulary"])
    trust = bool(settings["trust_remote_code"])
    tokenizer = load_tokenizer(spec.tokenizer, "model.student.tokenizer", trust_remote_code=trust)
    return max(tokenizer.get_vocab().values()) + 1


def _activations(plan: Plan, student: Skeleton, device: str, precision: str) -> int:
    """Bytes that the student keeps for its backward pass."""
    row, positions = plan.data.max_length, plan.data.positions
    layer = student.layer_elements(positions, row, _makes_attention_matrix(student.config, device, training=True))
    layers, hidden = student.config.num_hidden_layers, student.config.hidden_size
    checkpointed = plan.config["model"]["gradient_checkpointing"]
    elements = layer + layers * positions * hidden if checkpointed else layers * layer
    itemsize = student.head_itemsize
    # Under autocast norms and the residual stream stay in float32: measured, three quarters of it all is left.
    return int((elements + 2 * positions * hidden) * itemsize * (0.75 if _is_mixed(precision) and itemsize > 2 else 1))


def _reference_activations(plan: Plan, references: Mapping[str, Skeleton]) -> int:
    """Bytes of the hungriest layer of the references, which run one after the other and keep nothing."""
    row, positions = plan.data.max_length, plan.data.positions
    return max(
        s.layer_elements(positions, row, _makes_attention_matrix(s.config, "", training=False)) * s.head_itemsize
        for s in references.values()
    )


def _makes_attention_matrix(config: Any, device: str, training: bool) -> bool:
    """Whether [heads, T, T] exists: in eager attention, with soft-capping, and with dropout on a CPU."""
    dropout = getattr(config, "attn_pdrop", None) or getattr(config, "attention_dropout", None) or 0.0
    eager = config._attn_implementation == "eager" or bool(getattr(config, "attn_logit_softcapping", None))
    return eager or (training and device == "cpu" and dropout > 0)


def _loss(plan: Plan, student: Skeleton, references: Mapping[str, Skeleton]) -> int:
    """Bytes of a chunk, of the head's gradient, and of float32 copies of heads."""
    budget = float(plan.config["kernels"]["memory_budget"])
    vocabulary = len(student.head)
    form = "fused" if isinstance(getattr(plan.loss, "linear_forward_kl", None), LinearForwardKL) else "autograd"
    chunk = chunk_size_for(budget, vocabulary, max(4, student.head_itemsize), form)
    used = int(budget * MIB * min(1.0, plan.data.positions / chunk))
    trained = student.head.requires_grad
    gradient = student.head.numel() * max(4, student.head_itemsize) if trained else 0
    heads = [(s.head.numel(), s.head_itemsize) for s in (student, *references.values())] + _cached_heads(plan)
    return used + gradient + sum(4 * numbers for numbers, itemsize in heads if itemsize < 4)


def _cached_heads(plan: Plan) -> list[tuple[int, int]]:
    """(numbers, bytes of a number) of each head in the cache that the references are read from; [] with ``topk``."""
    if plan.cache is None or plan.cache.path is None:
        return []
    entry = CacheStore.open(Path(plan.cache.path)).manifest.heads
    if entry is None:
        return []
    found = []
    with safe_open(Path(plan.cache.path) / entry.file, "pt") as heads:
        for name in heads.keys():  # noqa: SIM118 - no mapping
            if name.partition(".")[0] in plan.loss.requires:
                part = heads.get_slice(name)
                found.append((math.prod(part.get_shape()), 2 if part.get_dtype() in ("BF16", "F16") else 4))
    return found


def _is_mixed(precision: str) -> bool:
    return precision.endswith("-mixed")


def _processes(plan: Plan) -> int:
    """Processes of this machine, as far as the config says."""
    devices = plan.config["trainer"]["devices"]
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    return max(1, torch.cuda.device_count())


def _devices(plan: Plan) -> tuple[str, str]:
    """(the student's device, the references'), of the first process."""
    accelerator = str(plan.config["trainer"]["accelerator"])
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        student = "cuda:0"
    elif accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        student = "mps"
    else:
        student = "cpu"
    placement = str(plan.config["reference"].get("placement", "auto"))
    home = student if placement == "auto" or plan.cache is not None else placement
    return student, "cuda:0" if home == "cuda" else home


def available(device: str) -> int | None:
    """Free bytes of a GPU, or the RAM that can still be had; None: unknown."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if device != "cpu":
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
