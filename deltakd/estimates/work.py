"""The work of an optimiser step on a rank: floating-point operations, bytes moved, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from deltakd.estimates.costs import Setting
from deltakd.estimates.writing import gathered_bytes
from deltakd.types import STUDENT

#: Names of traffic that is not between ranks.
HOST, HIDDEN, DISK = "weights and gradients, from and to RAM", "hidden states of references", "references from disk"


class Amount(NamedTuple):
    """The amount of work or traffic in one part of a step.

    Args:
        what: its name in the table.
        amount: floating-point operations, or bytes.
    """

    what: str
    amount: float


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
        Amount(f"reference {role}", setting.share_of(role) * s.forward_flops(*setting.sizes_of(role)))
        for role, s in setting.references.items()
    ]
    if setting.adapted:
        parts.append(Amount("reference student_raw", forward))
    own = student.head.numel()
    products = own * (2 + student.head.requires_grad) + (own if setting.adapted else 0)
    products += sum(numbers for numbers, _ in setting.cached_heads)
    of_references = sum(
        setting.share_of(role) * setting.valid_of(role) * s.head.numel() for role, s in setting.references.items()
    )
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
    hidden = accumulate * setting.hidden_bytes if setting.home != setting.device else 0
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
