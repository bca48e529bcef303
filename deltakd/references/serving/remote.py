"""References that a server runs: hidden states travel, logits never do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from deltakd.io.errors import ServerError
from deltakd.references.serving.connection import ServerConnection
from deltakd.references.serving.requests import request_of
from deltakd.references.serving.wire import Frame
from deltakd.types import Batch, Head


@final
class ServedReferences:
    """Asks a server for each batch, ahead of its step where the batch is known, else when the step starts.

    Args:
        connection: to the server, which has sent the heads.
        ahead: micro-batches to ask for in advance.
    """

    def __init__(self, connection: ServerConnection, ahead: int) -> None:
        self.ahead = ahead
        self._connection = connection
        header, tensors = connection.welcome
        #: What determines the server's answers (``deltakd.training.serving``).
        self.content = connection.content
        self._heads = {role: _head(entry, tensors) for role, entry in header["heads"].items()}
        self._device = torch.device("cpu")
        self._logged_seconds = 0.0

    @property
    def roles(self) -> frozenset[str]:
        return frozenset(self._heads)

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
        """Return role -> head over no tokens."""
        return dict(self._heads)

    def read_ahead(self, batch: Batch) -> Batch:
        """Ask for a batch on the CPU, for ``start`` later; may run in a thread while another batch is trained on."""
        if not self.ahead:
            return batch
        return replace(batch, asked=self._connection.ask(request_of(batch)))

    def start(self, batch: Batch) -> Callable[[], dict[str, Head]]:
        """Ask for a batch, unless that was done ahead; the returned function waits for the answer.

        Raises:
            ServerError: there is no answer; ``LostServerError`` if the server is gone.
        """
        number = batch.asked
        if number is None or not self._connection.is_open(number):
            number = self._connection.ask({name: tensor.cpu() for name, tensor in request_of(batch).items()})
        asked, tokens = number, len(batch.valid_N)
        return lambda: self._received(self._connection.take(asked), tokens)

    def __call__(self, batch: Batch) -> dict[str, Head]:
        """Return role -> head of the batch's valid tokens. Raises as ``start``."""
        return self.start(batch)()

    def take_wait_seconds(self) -> float:
        """Return the seconds that steps have waited for the server since the last call."""
        waited = self._connection.waited
        since, self._logged_seconds = waited - self._logged_seconds, waited
        return since

    def close(self) -> None:
        """Leave the server."""
        self._connection.close()

    def _received(self, answer: Frame, tokens: int) -> dict[str, Head]:
        moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in answer.tensors.items()}
        for tensor in moved.values():
            if tensor.is_cuda:
                # Another thread's stream made it: its memory must not be reused before this one has read it.
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        found = {}
        for role, head in self._heads.items():
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
