"""References that a server runs: hidden states travel, logits never do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from deltakd.io.errors import ServerError
from deltakd.references.base import RoutedHeads
from deltakd.references.routed import RolesRun, heads_of_first, in_parts, runs_of
from deltakd.references.serving.connection import ServerConnection
from deltakd.references.serving.requests import request_of
from deltakd.references.serving.wire import Frame
from deltakd.types import Batch, Head


@final
class ServedReferences:
    """Asks a server for each batch, ahead of its step where the batch is known, else when the step starts.

    Of routed rows (``model.routes``), each pair of teachers is asked for its own.

    Args:
        connection: to the server, which has sent the heads.
        ahead: micro-batches to ask for in advance.
        requires: the roles that the loss reads, those of the first pair.
        pairs: numbers of the pairs of teachers; empty: rows are not routed.
    """

    def __init__(
        self, connection: ServerConnection, ahead: int, requires: Collection[str], pairs: Collection[int] = ()
    ) -> None:
        self.ahead = ahead
        self._requires = frozenset(requires)
        self._pairs = frozenset(pairs)
        self._connection = connection
        header, tensors = connection.welcome
        #: What determines the server's answers (``deltakd.training.serving``).
        self.content = connection.content
        self._heads = {role: _head(entry, tensors) for role, entry in header["heads"].items()}
        self._device = torch.device("cpu")
        self._logged_seconds = 0.0

    @property
    def roles(self) -> frozenset[str]:
        return self._requires

    @property
    def vocabulary(self) -> int:
        """V of the heads."""
        return int(self.content["vocabulary"])

    @property
    def other_vocabulary(self) -> None:
        """All models share the student's tokenizer."""
        return None

    @property
    def positions(self) -> int | None:
        """Most tokens of a row; None: no limit."""
        found: int | None = self.content["positions"]
        return found

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received since the heads arrived."""
        return self._connection.sent_bytes, self._connection.received_bytes

    def to(self, device: torch.device) -> None:
        """Return heads on ``device`` from now on."""
        self._device = device
        self._connection.send_to(device)
        moved: dict[int, Tensor] = {}
        for role, head in self._heads.items():
            weight, bias = (
                None if part is None else moved.setdefault(id(part), part.to(device))
                for part in (head.weight, head.bias)
            )
            assert weight is not None
            self._heads[role] = replace(head, hidden=head.hidden.to(device), weight=weight, bias=bias)

    def empty_heads(self) -> dict[str, Head]:
        """Return role -> head over no tokens, of the first pair if rows are routed."""
        return heads_of_first(self._heads, self._requires, self._pairs) if self._pairs else dict(self._heads)

    def read_ahead(self, batch: Batch) -> Batch:
        """Ask for a batch on the CPU, for ``start`` later; may run in a thread while another batch is trained on."""
        if not self.ahead:
            return batch
        return replace(batch, asked=self._ask(self._runs(batch)))

    def start(self, batch: Batch) -> Callable[[], dict[str, Head] | RoutedHeads]:
        """Ask for a batch, unless that was done ahead; the returned function waits for the answer.

        Raises:
            ServerError: there is no answer; ``LostServerError`` if the server is gone.
        """
        runs, numbers = self._runs(batch), batch.asked
        if numbers is None or not all(map(self._connection.is_open, numbers)):
            numbers = self._ask(runs)
        asked = list(zip(numbers, runs, strict=True))

        def finish() -> dict[str, Head] | RoutedHeads:
            heads = [self._received(self._connection.take(number), run) for number, run in asked]
            return in_parts(batch, self._requires, heads) if self._pairs else heads[0]

        return finish

    def __call__(self, batch: Batch) -> dict[str, Head] | RoutedHeads:
        """Return role -> head of the batch's valid tokens, in parts if they are routed. Raises as ``start``."""
        return self.start(batch)()

    def _runs(self, batch: Batch) -> list[RolesRun]:
        return runs_of(batch, self._requires) if self._pairs else [RolesRun(batch, [*self._heads])]

    def _ask(self, runs: Sequence[RolesRun]) -> tuple[int, ...]:
        requests = [{name: tensor.cpu() for name, tensor in request_of(run.rows).items()} for run in runs]
        return tuple(
            self._connection.ask(request, run.roles if self._pairs else None)
            for request, run in zip(requests, runs, strict=True)
        )

    def take_wait_seconds(self) -> float:
        """Return the seconds that steps have waited for the server since the last call."""
        waited = self._connection.waited
        since, self._logged_seconds = waited - self._logged_seconds, waited
        return since

    def close(self) -> None:
        """Leave the server."""
        self._connection.close()

    def _received(self, answer: Frame, run: RolesRun) -> dict[str, Head]:
        tokens = len(run.rows.valid_N)
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in answer.tensors.items()}
        for tensor in moved.values():
            if tensor.is_cuda:
                # Another thread's stream made it: its memory must not be reused before this one has read it.
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        found = {}
        for role in run.roles:
            head = self._heads[role]
            hidden = moved.get(answer.header.get("roles", {}).get(role, ""))
            if hidden is None or hidden.shape != (tokens, head.hidden.shape[1]) or not hidden.is_floating_point():
                shape = None if hidden is None else tuple(hidden.shape)
                raise ServerError(
                    f"the server of references answered {role} of shape {shape}; "
                    f"{(tokens, head.hidden.shape[1])} was asked for"
                )
            found[role] = replace(head, hidden=hidden)
        return found


def _head(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Head:
    try:
        bias = None if entry["bias"] is None else tensors[entry["bias"]]
        return Head(tensors[entry["hidden"]], tensors[entry["weight"]], bias, entry["softcap"], entry["scale"])
    except (KeyError, TypeError):
        raise ServerError("the server of references sent heads that can't be read; is it of another version?") from None
