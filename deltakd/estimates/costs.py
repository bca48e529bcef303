"""The memory of an optimiser step on a rank, and all that the costs of a step depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from deltakd.estimates.layout import Held, Layout
from deltakd.estimates.sizes import Skeleton
from deltakd.estimates.writing import PARTNER, Writing, gathered_bytes
from deltakd.kernels import chunk_size_for
from deltakd.types import STUDENT, TEACHER
from deltakd.types.role_names import pair_number

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
        routed: number of pairs of teachers that share the rows (``model.routes``); 1: all references run all rows.
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
    routed: int = 1

    def share_of(self, role: str) -> float:
        """Return the share of the rows that a reference runs; pairs of teachers share them evenly."""
        return 1.0 if pair_number(role) is None else 1 / self.routed

    def sizes_of(self, role: str) -> tuple[int, int]:
        """Return the positions of a micro-batch and of its longest row, in the tokenizer of a reference."""
        share = self.teacher_length if role.startswith(TEACHER) else 1.0
        return round(self.positions * share), round(self.row * share)

    def valid_of(self, role: str) -> int:
        """Return the valid tokens of a micro-batch in the tokenizer of a reference."""
        return round(self.valid * (self.teacher_length if role.startswith(TEACHER) else 1.0))

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the references' hidden states of a micro-batch's valid tokens; if routed, all of the widest pair."""
        own, of_pairs = 0, dict[int, int]()
        for role, s in self.references.items():
            size = self.valid_of(role) * s.config.hidden_size * s.head_itemsize
            pair = pair_number(role)
            if pair is None or self.routed == 1:
                own += size
            else:
                of_pairs[pair] = of_pairs.get(pair, 0) + size
        return own + max(of_pairs.values(), default=0)

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
    return [
        Need("gathered heads of the references", setting.device, gathered),
        Need("hidden states of the references", setting.device, setting.hidden_bytes),
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
