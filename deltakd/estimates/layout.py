"""Memory on a rank and traffic between ranks, for each strategy.

N is the number of ranks. Collectives are counted as rings: from each rank an all-reduce sends 2 (N − 1)/N of its bytes,
a reduce-scatter and an all-gather (N − 1)/N (Rajbhandari et al., ZeRO, arXiv 1910.02054, section 7). What each strategy
does was read in the libraries' code and measured (tests/estimates/test_costs.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from deltakd.distributed.settings import StrategySettings
from deltakd.estimates.sizes import Skeleton

#: Elements in a bucket of gradients, as Lightning sets it for DeepSpeed.
REDUCE_BUCKET = 200_000_000
#: DeepSpeed's defaults: elements gathered ahead, and elements until the next use within which a parameter is kept.
PREFETCH, REUSE_DISTANCE = 50_000_000, 1_000_000_000
#: Bytes per float32 element.
SINGLE = 4


class Held(NamedTuple):
    """Bytes of a trained model on one rank.

    Args:
        weights: resident.
        gathered: weights of other ranks present at the end of the forward pass.
        kept: gradients present in the forward pass, from the previous step or micro-batch.
        early: gradients present when the backward pass begins.
        made: gradients at the end of the backward pass.
        standing: permanent buffers for collectives.
        buffers: further ones in the backward pass.
        optimiser: master copy and moments.
        update: temporaries of the optimiser's step.
        half: half-precision copies made by autocast.
    """

    weights: int
    optimiser: int
    made: int
    kept: int = 0
    early: int = 0
    gathered: int = 0
    standing: int = 0
    buffers: int = 0
    update: int = 0
    half: int = 0


class Sent(NamedTuple):
    """Bytes that each rank sends in an optimiser step.

    Args:
        all_reduce, reduce_scatter, all_gather: between ranks.
        host: between a GPU and CPU memory, both ways.
    """

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0
    host: float = 0.0


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks.

    Args:
        engine: ``one`` (a process alone), ``ddp``, ``deepspeed`` or ``fsdp``.
        ranks: N.
        stage: of ZeRO; 0 elsewhere.
        threshold: ZeRO 3 keeps parameters with fewer elements whole.
        offload: ZeRO 3 keeps its shards of weights, gradients and optimiser state in CPU memory.
        shards_references: the references are sharded over the ranks, too.
    """

    engine: str = "one"
    ranks: int = 1
    stage: int = 0
    threshold: int = 0
    offload: bool = False
    shards_references: bool = False

    @classmethod
    def of(cls, strategy: StrategySettings, ranks: int, shards_references: bool) -> Layout:
        """Return the layout of a strategy over ``ranks`` ranks."""
        alone = "ddp" if ranks > 1 else "one"
        return cls(
            alone if strategy.name == "auto" else strategy.name,
            ranks,
            strategy.stage or 0,
            strategy.persistence_threshold,
            strategy.offload,
            ranks > 1 and shards_references,
        )

    @property
    def name(self) -> str:
        """The name in tables."""
        names = {"one": "one process", "ddp": "DDP", "fsdp": "FSDP2"}
        return names.get(self.engine) or f"ZeRO {self.stage}{' offload' if self.offload else ''}"

    @property
    def shards_student(self) -> bool:
        """True if no rank holds the whole student between steps."""
        return self.ranks > 1 and (self.engine == "fsdp" or (self.engine == "deepspeed" and self.stage == 3))

    def casts(self, precision: str) -> bool:
        """True if autocast makes half-precision copies; DeepSpeed converts the weights and keeps a master copy."""
        return precision.endswith("-mixed") and self.engine != "deepspeed"

    def whole_dtype(self, precision: str) -> str | None:
        """Return the dtype that all parameters of the student are converted to; None: they keep their own."""
        if self.engine == "deepspeed" and precision != "32-true":
            return "float16" if precision.startswith("16") else "bfloat16"
        return {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}.get(precision)

    def held(
        self, student: Skeleton, accumulate: int, precision: str, fused_update: bool, half_weights: str = "nearest"
    ) -> Held:
        """Return the student's bytes on one rank.

        A single process has AdamW's two moments in each trained parameter's dtype, or in float32, with masters if there
        are any, where ``optim.half_weights`` asks for it. DDP adds a second copy of the
        gradients, in its buckets. FSDP2 shards everything; from the forward to the backward pass it holds parameters
        outside blocks whole, and two blocks at a time (under autocast in half precision, so that it needs copies of the
        head alone). ZeRO keeps sharded moments in float32, and a sharded float32
        master copy (stages 1 and 2 always, stage 3 if the weights are not float32 or with offloading); in half
        precision that makes 2 + 2 + 12 bytes per parameter in all (arXiv 1910.02054, section 3.1).

        Args:
            student: its sizes.
            accumulate: micro-batches per step.
            precision: of the trainer.
            fused_update: AdamW updates all parameters at once, with a temporary of their size.
            half_weights: ``optim.half_weights``.
        """
        weights, trained = student.weight_bytes, student.trained_bytes
        half = 2 * student.linear_elements if self.casts(precision) else 0
        again = accumulate > 1
        state = 2 * trained
        if half_weights != "nearest" and trained < SINGLE * student.trained:
            state = SINGLE * student.trained * (3 if half_weights == "masters" else 2)
        if self.engine in ("one", "ddp"):
            buckets = trained if self.engine == "ddp" and self.ranks > 1 else 0
            made = trained + buckets
            early = made if again else buckets
            temporary = trained if fused_update else 0
            return Held(weights, state, made, kept=made, early=early, update=temporary, half=half)
        if self.engine == "fsdp":
            shard = trained // self.ranks
            outside = weights - student.blocks_bytes
            alone = self.ranks == 1
            block = student.gathered_bytes(self.casts(precision))[1]
            if self.casts(precision) and not alone:
                half = 2 * student.head.numel()
            return Held(
                weights // self.ranks,
                state // self.ranks,
                shard,
                kept=shard,
                early=shard if again else 0,
                gathered=0 if alone else min(weights, outside + 2 * block),
                buffers=0 if alone else min(trained, max(student.block_bytes, outside)),
                update=shard if fused_update else 0,
                half=half,
            )
        return self._held_by_zero(student, again, fused_update)

    def _held_by_zero(self, student: Skeleton, again: bool, fused_update: bool) -> Held:
        weights, gradients = student.weight_bytes, student.trained_bytes
        shard = SINGLE * student.trained // self.ranks
        itemsize = max(1, gradients // max(1, student.trained))
        bucket = REDUCE_BUCKET * itemsize
        update = shard * (2 if fused_update else 1)
        if self.stage < 3:
            made = gradients if self.stage == 1 else gradients // self.ranks
            kept = made if again else 0
            return Held(weights, 3 * shard, made, kept=kept, early=kept, buffers=2 * bucket, update=update)
        small = student.small_bytes(self.threshold)
        made = gradients // self.ranks
        gathered = min(weights - small, self._reused(student) + student.block_bytes + PREFETCH * itemsize)
        moments = 2 * shard + (shard if itemsize < SINGLE or self.offload else 0)
        resident = (weights - small) // self.ranks + small
        return Held(resident, moments, made, kept=made, early=made, gathered=gathered, standing=bucket, update=update)

    def _reused(self, student: Skeleton) -> int:
        """Return the bytes of the last layers, which ZeRO 3 keeps for the backward pass: their next use is near."""
        share = min(1.0, REUSE_DISTANCE / 2 / student.parameters)
        return int(share * student.weight_bytes)

    def sent(self, student: Skeleton, accumulate: int, precision: str = "32-true") -> Sent:
        """Return the bytes that one rank sends for the student in an optimiser step, over all its micro-batches.

        DDP all-reduces gradients once per step. So do ZeRO 1 and, for every micro-batch, ZeRO 2 (where the paper has a
        reduce-scatter, DeepSpeed all-reduces slices of several ranks); both all-gather the updated parameters. ZeRO 3
        and FSDP2 all-gather parameters for the forward and again for the backward pass, and reduce-scatter gradients,
        for every micro-batch, FSDP2 linear layers in half precision under autocast; what ZeRO 3 keeps is gathered
        once. With offloading, parameter shards move from CPU memory for each gather, and gradient shards move back.
        """
        weights, gradients = student.weight_bytes, student.trained_bytes
        part = (self.ranks - 1) / self.ranks
        if self.engine in ("one", "ddp"):
            return Sent(all_reduce=2 * part * gradients)
        if self.engine == "fsdp":
            whole = weights - student.blocks_bytes + student.gathered_bytes(self.casts(precision))[0]
            return Sent(reduce_scatter=part * accumulate * gradients, all_gather=part * accumulate * 2 * whole)
        if self.stage < 3:
            times = accumulate if self.stage == 2 else 1
            return Sent(all_reduce=2 * part * times * gradients, all_gather=part * gradients)
        sharded = weights - student.small_bytes(self.threshold)
        gathers = 2 * sharded - min(sharded, self._reused(student))
        host = accumulate * (gathers + gradients) / self.ranks if self.offload else 0.0
        return Sent(reduce_scatter=part * accumulate * gradients, all_gather=part * accumulate * gathers, host=host)

    def held_of_reference(self, reference: Skeleton) -> tuple[int, int]:
        """Return a frozen model's (resident, gathered) bytes on a rank; the loss needs a sharded head whole."""
        if not self.shards_references:
            return reference.weight_bytes, 0
        return reference.weight_bytes // self.ranks, reference.head_bytes

    def running(self, reference: Skeleton) -> int:
        """Return a sharded frozen model's bytes gathered while it runs: two layers, and all but blocks and head."""
        if not self.shards_references:
            return 0
        outside = reference.weight_bytes - reference.blocks_bytes
        return min(reference.weight_bytes, 2 * reference.block_bytes + outside - reference.head_bytes)

    def sent_of_reference(self, reference: Skeleton, accumulate: int) -> Sent:
        """Return the bytes that one rank sends for a frozen model; a sharded one is gathered for every micro-batch."""
        if not self.shards_references:
            return Sent()
        return Sent(all_gather=(self.ranks - 1) / self.ranks * accumulate * reference.weight_bytes)
