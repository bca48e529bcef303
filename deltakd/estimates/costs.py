"""The cost of an optimiser step on a rank: memory, floating-point operations, bytes moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from deltakd.estimates.layout import Held, Layout
from deltakd.estimates.sizes import Skeleton
from deltakd.estimates.writing import PARTNER, Writing, gathered_bytes
from deltakd.kernels import chunk_size_for
from deltakd.types import STUDENT, TEACHER

MIB = 2**20


class Need(NamedTuple):
    """The memory of one thing on one device.

    Args:
        what: its name in the table.
        device: where it is.
        bytes: its size.
    """

    what: str
    device: str
    bytes: int


class Amount(NamedTuple):
    """The amount of work or traffic in one part of a step.

    Args:
        what: its name in the table.
        amount: floating-point operations, or bytes.
    """

    what: str
    amount: float


@dataclass(frozen=True)
class Setting:
    """Everything that the costs of a step depend on.

    Args:
        student: its sizes.
        references: role -> sizes of the live references.
        layout: how the run is spread over ranks.
        positions: in a micro-batch of one rank, padding included.
        row: positions in its longest row.
        valid: its valid tokens, those that reach the heads.
        accumulate: micro-batches per step.
        precision: of the trainer.
        device: the student's.
        home: the references'.
        checkpointed: True if activations are recomputed in the backward pass.
        budget: MiB for a chunk of logits.
        form: ``fused``, ``gated`` or ``autograd``: how the loss is computed (kernels/chunked.py).
        adapted: True if the raw student is the student with its adapter off.
        cached_heads: (elements, bytes per element) of the heads of cached references.
        cached_bytes: bytes read from disk per valid token.
        half_weights: ``optim.half_weights``.
        shared: role -> role that holds its weights, for references that share them.
        adapters: role -> bytes of its adapter.
        writing: the responses that the student writes; None: none, or a server does.
        teacher_length: tokens of a row for the teachers per token for the student, if they have another tokenizer.
    """

    student: Skeleton
    references: Mapping[str, Skeleton]
    layout: Layout
    positions: int
    row: int
    valid: int
    accumulate: int = 1
    precision: str = "32-true"
    device: str = "cpu"
    home: str = "cpu"
    checkpointed: bool = False
    budget: float = 256.0
    form: str = "fused"
    adapted: bool = False
    cached_heads: Sequence[tuple[int, int]] = field(default=())
    cached_bytes: int = 0
    half_weights: str = "nearest"
    shared: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, int] = field(default_factory=dict)
    writing: Writing | None = None
    teacher_length: float = 1.0

    def sizes_of(self, role: str) -> tuple[int, int]:
        """Return the positions of a micro-batch and of its longest row, in the tokenizer of a reference."""
        share = self.teacher_length if role.startswith(TEACHER) else 1.0
        return round(self.positions * share), round(self.row * share)

    def valid_of(self, role: str) -> int:
        """Return the valid tokens of a micro-batch in the tokenizer of a reference."""
        return round(self.valid * (self.teacher_length if role.startswith(TEACHER) else 1.0))

    @property
    def writers(self) -> dict[str, Skeleton]:
        """Role -> sizes of the models that write responses."""
        if self.writing is None:
            return {}
        partner = (
            {PARTNER: self.references[PARTNER]} if self.writing.mixes_teacher and PARTNER in self.references else {}
        )
        return {STUDENT: self.student, **partner}

    def cache_itemsize(self, role: str) -> int:
        """Return the bytes per number of a writer's key-value cache."""
        model = self.writers[role]
        half = role == STUDENT and self.layout.casts(self.precision)
        return min(2, model.head_itemsize) if half else model.head_itemsize

    @property
    def tokens(self) -> int:
        """Positions in a step over all ranks."""
        return self.positions * self.accumulate * self.layout.ranks


def memory(setting: Setting) -> list[Need]:
    """Return a rank's memory at the peak of a step, the largest of five moments on the student's device.

    The moments: the student writes responses, if it does (``while_writing``); the references run (before the student,
    on its device); the student's forward pass ends, with the loss; the backward pass starts, with buffers for
    collectives; the optimiser steps.

    Weights, gradients and optimiser state are exact (``Layout.held``). Activations are an **estimate** by
    ``Skeleton.layer_elements`` for a full micro-batch; with gradient checkpointing each layer keeps only its input, and
    one layer at a time everything. The loss takes ``kernels.memory_budget``, the head's gradient in float32, and
    copies of heads in the precision of their products. Not counted: the libraries' own memory (CUDA context,
    NCCL, the interpreter), validation (where each rank holds a sharded student whole to answer), and memory that is
    free but not returned.
    """
    standing = _standing(setting)
    moments = [
        while_writing(setting),
        _while_references_run(setting),
        _after_forward(setting),
        _before_backward(setting),
        _in_update(setting),
    ]

    def on_device(needs: list[Need]) -> int:
        return sum(need.bytes for need in needs if need.device == setting.device)

    return [need for need in (*standing, *max(moments, key=on_device)) if need.bytes]


def _held(setting: Setting) -> Held:
    on_gpu = setting.device != "cpu" and not setting.layout.offload
    return setting.layout.held(setting.student, setting.accumulate, setting.precision, on_gpu, setting.half_weights)


def _shard_device(setting: Setting) -> str:
    """Return the device of the student's weights, gradients and optimiser state."""
    return "cpu" if setting.layout.offload else setting.device


def _standing(setting: Setting) -> list[Need]:
    """Return the memory that is always in use."""
    held, device, home = _held(setting), setting.device, setting.home
    needs = [
        Need("weights of the student", _shard_device(setting), held.weights),
        Need("buffers for collectives", device, held.standing),
        Need("optimiser (AdamW)", _shard_device(setting), held.optimiser),
    ]
    for role, reference in setting.references.items():
        resident = 0 if role in setting.shared else setting.layout.held_of_reference(reference)[0]
        needs.append(Need(f"reference {role}", home, resident + setting.adapters.get(role, 0)))
    cached = sum(numbers * itemsize for numbers, itemsize in setting.cached_heads)
    needs.append(Need("heads of the cached references", device, cached))
    if home != device:
        needs.append(Need("heads of the references", device, sum(s.head_bytes for s in setting.references.values())))
        needs.append(Need("activations of the references", home, _reference_activations(setting)))
    return needs


def _given(setting: Setting) -> list[Need]:
    """Return the memory of the references' inputs to the loss."""
    gathered = sum(setting.layout.held_of_reference(s)[1] for s in setting.references.values())
    hidden = sum(
        setting.valid_of(role) * s.config.hidden_size * s.head_itemsize for role, s in setting.references.items()
    )
    return [
        Need("gathered heads of the references", setting.device, gathered),
        Need("hidden states of the references", setting.device, hidden),
    ]


def _while_references_run(setting: Setting) -> list[Need]:
    if not setting.references or setting.home != setting.device:
        return []
    layers = max(setting.layout.running(s) for s in setting.references.values())
    return [
        Need("gradients", _shard_device(setting), _held(setting).kept),
        *_given(setting),
        Need("gathered layers of a reference", setting.device, layers),
        Need("activations of the references", setting.device, _reference_activations(setting)),
    ]


def while_writing(setting: Setting) -> list[Need]:
    """Return a rank's memory while responses are written, beyond what is always in use; empty if it writes none.

    An **estimate**: the key-value caches of a full batch of the longest rows, one layer's activations of their prompts,
    and the logits of one token each; the gradients of the step before are still there. A sharded model is whole.
    """
    writing = setting.writing
    if writing is None:
        return []
    needs = [Need("gradients", _shard_device(setting), _held(setting).kept)]
    for role, model in setting.writers.items():
        where = setting.device if role == STUDENT else setting.home
        matrix = model.makes_attention_matrix("", training=False)
        layer = model.layer_elements(writing.batch * writing.prompt, writing.prompt, matrix) * model.head_itemsize
        needs += [
            Need(f"whole {role}, to write", where, gathered_bytes(setting.layout, model, role != STUDENT)),
            Need("key-value cache", where, writing.cache_bytes(model, setting.cache_itemsize(role))),
            Need("activations of the prompts", where, layer),
            Need("logits of the batch", where, writing.logits_bytes(model)),
        ]
    return needs


def _after_forward(setting: Setting) -> list[Need]:
    held = _held(setting)
    return [
        Need("gradients", _shard_device(setting), held.kept),
        Need("gathered weights", setting.device, held.gathered),
        Need("half-precision copies", setting.device, held.half),
        *_given(setting),
        Need("activations of the student", setting.device, activations(setting)),
        Need("loss", setting.device, _chunk(setting) + _head_gradient(setting) + _converted_heads(setting)),
    ]


def _before_backward(setting: Setting) -> list[Need]:
    held = _held(setting)
    return [
        Need("gradients", _shard_device(setting), held.early),
        Need("gathered weights", setting.device, held.gathered),
        Need("half-precision copies", setting.device, held.half),
        Need("buffers for collectives", setting.device, held.buffers),
        *_given(setting),
        Need("activations of the student", setting.device, activations(setting)),
        Need("loss", setting.device, _head_gradient(setting)),
    ]


def _in_update(setting: Setting) -> list[Need]:
    held, device = _held(setting), _shard_device(setting)
    return [Need("gradients", device, held.made), Need("update of the weights", device, held.update)]


def activations(setting: Setting) -> int:
    """Return the bytes that the student keeps for its backward pass."""
    student, positions = setting.student, setting.positions
    matrix = student.makes_attention_matrix(setting.device, training=True)
    layer = student.layer_elements(positions, setting.row, matrix)
    layers, hidden = student.config.num_hidden_layers, student.config.hidden_size
    elements = layer + layers * positions * hidden if setting.checkpointed else layers * layer
    itemsize = student.head_itemsize
    # Autocast halves all but norms and the residual stream; measured, three quarters of the float32 bytes remain.
    share = 0.75 if setting.layout.casts(setting.precision) and itemsize > 2 else 1
    return int((elements + 2 * positions * hidden) * itemsize * share)


def _reference_activations(setting: Setting) -> int:
    """Return the bytes of the references' largest layer: they run one after the other and keep nothing."""
    return max(
        s.layer_elements(*setting.sizes_of(role), s.makes_attention_matrix("", training=False)) * s.head_itemsize
        for role, s in setting.references.items()
    )


def _chunk(setting: Setting) -> int:
    chunk = chunk_size_for(
        setting.budget, len(setting.student.head), max(4, setting.student.head_itemsize), setting.form
    )
    return int(setting.budget * MIB * min(1.0, setting.valid / chunk))


def _head_gradient(setting: Setting) -> int:
    head = setting.student.head
    return head.numel() * max(4, setting.student.head_itemsize) if head.requires_grad else 0


def _converted_heads(setting: Setting) -> int:
    """Return the bytes of heads as they are multiplied (types/products.py), beside those that the models hold."""
    models = (setting.student, *setting.references.values())
    heads = [(s.head.numel(), s.head_itemsize) for s in models] + list(setting.cached_heads)
    if not setting.device.startswith("cuda"):
        return sum(4 * numbers for numbers, itemsize in heads if itemsize < 4)
    # Half-precision heads stay as they are; gradients want the student's in float16, or float32 ones in two summands.
    numbers, itemsize = heads[0]
    return 2 * numbers if itemsize < 4 else 4 * numbers if setting.layout.casts(setting.precision) else 0


def operations(setting: Setting) -> list[Amount]:
    """Return a rank's floating-point operations in an optimiser step, over all its micro-batches.

    Forward: 2 per weight and position; backward: twice that (``Skeleton.forward_flops``); with gradient checkpointing
    the forward pass once more. Heads: 2 V D per valid token and model, and twice that again for the student's gradients
    (of hidden states and, if trained, the head). Norms, softmax and the optimiser are left out: they are bound by
    memory, not arithmetic.
    """
    student, sizes = setting.student, (setting.positions, setting.row)
    forward = student.forward_flops(*sizes)
    parts = [Amount("student, forward", forward), Amount("student, backward", student.backward_flops(*sizes))]
    if setting.checkpointed:
        parts.append(Amount("student, forward again", forward))
    parts += [
        Amount(f"reference {role}", s.forward_flops(*setting.sizes_of(role))) for role, s in setting.references.items()
    ]
    if setting.adapted:
        parts.append(Amount("reference student_raw", forward))
    own = student.head.numel()
    products = own * (2 + student.head.requires_grad) + (own if setting.adapted else 0)
    products += sum(numbers for numbers, _ in setting.cached_heads)
    of_references = sum(setting.valid_of(role) * s.head.numel() for role, s in setting.references.items())
    parts.append(Amount("heads", 2 * (setting.valid * products + of_references)))
    trained = [Amount(what, setting.accumulate * amount) for what, amount in parts]
    return [*trained, *writing_operations(setting)]


def writing_operations(setting: Setting) -> list[Amount]:
    """Return a rank's operations by which responses for an optimiser step are written; empty if it writes none."""
    writing = setting.writing
    if writing is None:
        return []
    parts = [Amount(f"{role}, writes responses", writing.operations(model)) for role, model in setting.writers.items()]
    scored = sum(writing.scoring_operations(model) for model in setting.writers.values())
    return [*parts, *([Amount("log-probs of the responses", scored)] if scored else [])]


def traffic(setting: Setting) -> list[Amount]:
    """Return the bytes that a rank sends or reads from disk in an optimiser step, over all its micro-batches.

    Collectives come from ``Layout.sent`` and ``Layout.sent_of_reference``. Gathering weights for validation and the few
    bytes of metrics are left out.
    """
    layout, accumulate = setting.layout, setting.accumulate
    own = layout.sent(setting.student, accumulate, setting.precision)
    gathered = sum(layout.sent_of_reference(s, accumulate).all_gather for s in setting.references.values())
    away = setting.references.values() if setting.home != setting.device else ()
    hidden = sum(accumulate * setting.valid * s.config.hidden_size * s.head_itemsize for s in away)
    parts = [
        Amount("gradients, all-reduce", own.all_reduce),
        Amount("gradients, reduce-scatter", own.reduce_scatter),
        Amount("weights, all-gather", own.all_gather),
        Amount("references, all-gather", gathered),
        Amount("whole models to write with, all-gather", _gathered_to_write(setting)),
        Amount(HOST, own.host),
        Amount(HIDDEN, hidden),
        Amount(DISK, float(accumulate * setting.valid * setting.cached_bytes)),
    ]
    return [part for part in parts if part.amount]


def _gathered_to_write(setting: Setting) -> float:
    if setting.writing is None:
        return 0.0
    whole = sum(gathered_bytes(setting.layout, model, role != STUDENT) for role, model in setting.writers.items())
    return whole * (setting.layout.ranks - 1) / setting.layout.ranks / setting.writing.every


#: Names of traffic that is not between ranks.
HOST, HIDDEN, DISK = "weights and gradients, from and to RAM", "hidden states of references", "references from disk"


def between_ranks(parts: Sequence[Amount]) -> float:
    """Return the bytes of ``traffic`` between ranks."""
    return sum(part.amount for part in parts if part.what not in (HOST, HIDDEN, DISK))


def seconds(setting: Setting, tflops: float, interconnect: float | None, bandwidth: float | None = None) -> float:
    """Return the seconds of an optimiser step: arithmetic at the given rate, then the collectives.

    Real steps overlap the two in part, so with an interconnect this is an upper bound at that rate, except that
    transfers between GPU, CPU memory and disk (offloading, caches) are left out.

    Args:
        setting: the step.
        tflops: TFLOP/s (10¹² operations per second) that a GPU really reaches.
        interconnect: GB/s (10⁹ bytes per second) that a GPU sends; None: collectives cost no time.
        bandwidth: as for ``writing_seconds``.
    """
    written = sum(part.amount for part in writing_operations(setting))
    arithmetic = (sum(part.amount for part in operations(setting)) - written) / (tflops * 1e12)
    sending = between_ranks(traffic(setting)) / (interconnect * 1e9) if interconnect else 0.0
    return arithmetic + sending + writing_seconds(setting, tflops, bandwidth)


def writing_seconds(setting: Setting, tflops: float, bandwidth: float | None) -> float:
    """Return the seconds in which the responses for an optimiser step are written, the longer of two.

    Args:
        setting: the step.
        tflops: as for ``seconds``; the time of the arithmetic.
        bandwidth: GB/s (10⁹ bytes per second) that a GPU reads from its memory, which bounds the decoding of small
            batches; None: only arithmetic counts, so that the time is too short.
    """
    arithmetic = sum(part.amount for part in writing_operations(setting)) / (tflops * 1e12)
    if setting.writing is None or bandwidth is None:
        return arithmetic
    read = sum(setting.writing.bytes_read(model, setting.cache_itemsize(r)) for r, model in setting.writers.items())
    return max(arithmetic, read / (bandwidth * 1e9))
