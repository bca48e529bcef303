"""Validation during training: the loss on held-out rows, and the quality of generated answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, final

import lightning as L
import torch

from deltakd.distributed.sharding import gathered
from deltakd.training.callbacks.steps import at_step_end
from deltakd.training.module import DistillationModule
from deltakd.types import Batch

#: Generates answers with the student and scores them: metric name (``rougeL``) -> value.
Generate = Callable[[DistillationModule], dict[str, float]]


@final
class Validation(L.Callback):
    """Runs at chosen optimiser steps, outside Lightning's validation loop.

    Lightning validates at multiples of an interval within its epoch, and on resume re-enters its loop by rules that
    depend on where the checkpoint was written. Here the steps are given (always including the last one), and a resumed
    run validates exactly where an uninterrupted one would.

    Args:
        batches: returns this rank's validation batches, in a fixed order; called once the ranks are joined.
        steps: optimiser steps (counted from 1) after which to validate.
        generate: answers and scores; None: only the loss.
    """

    def __init__(
        self, batches: Callable[[], Iterable[Batch] | None], steps: Collection[int], generate: Generate | None
    ) -> None:
        self.batches = batches
        self.steps = frozenset(steps)
        self.generate = generate
        self.last_step: int | None = None
        self.last_metrics: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Validate if this batch ended one of the chosen optimiser steps."""
        step = trainer.global_step
        if step not in self.steps or not at_step_end(trainer):
            return
        assert isinstance(pl_module, DistillationModule)
        pl_module.settle()
        self.last_metrics = self.run(pl_module)
        self.last_step = step
        for logger in trainer.loggers:
            logger.log_metrics(self.last_metrics, step=step)

    @torch.no_grad()
    def run(self, module: DistillationModule) -> dict[str, float]:
        """Return ``val/loss``, its parts (nats per valid token), and ``val/<metric>`` of the generated answers.

        Collective: call on every rank. Each rank runs its own batches; sums are over all ranks.
        """
        module.student.eval()
        sums = {"loss": 0.0}
        tokens = 0
        with module.trainer.precision_plugin.forward_context():
            for batch in module.asked_ahead(self.batches() or ()):
                moved = batch.to(module.device)
                loss, parts = module.step(moved)
                tokens += len(moved.labels_N)
                for name, value in {"loss": loss, **parts}.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        of_ranks = gathered((tokens, sums))
        tokens = sum(count for count, _ in of_ranks)
        # A rank whose batches are all masked has no parts: take the names from all ranks.
        names = dict.fromkeys(name for _, found in of_ranks for name in found)
        metrics = {f"val/{name}": sum(found.get(name, 0.0) for _, found in of_ranks) / tokens for name in names}
        if self.generate is not None:
            metrics |= {f"val/{name}": value for name, value in self.generate(module).items()}
        module.student.train()
        return metrics
