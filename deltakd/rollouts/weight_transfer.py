"""Ways to hand the student's weights to a vLLM server, by vLLM's own endpoints (0.32)."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, final

import torch
from safetensors.torch import save_file
from torch import Tensor

from deltakd.io.errors import RefusedError
from deltakd.io.files import remove, replacing
from deltakd.io.inference_server import InferenceServer

#: Bytes of a weights file; only this much is held in CPU memory.
SHARD_BYTES = 4 * 2**30
#: Bytes of the id by which NCCL's ranks find each other.
_UNIQUE_ID_BYTES = 128
#: Seconds that our end of an NCCL operation may take longer than the server's.
_LAST_SECONDS = 60.0


class Transfer(Protocol):
    """Hands weights over; used by one process."""

    def connect(self) -> None:
        """Prepare for a server that has just started. Raises LostServerError and RefusedError."""
        ...

    def send(self, weights: Mapping[str, Tensor], dtype: torch.dtype | None, version: str) -> None:
        """Replace the server's weights.

        Args:
            weights: name -> weight, as in checkpoint files.
            dtype: the server's; None: unknown, so that weights go as they are.
            version: what the server calls them from now on.

        Raises:
            LostServerError: the server is gone.
            RefusedError: it can't take the weights.
        """
        ...


@final
class FilesTransfer:
    """Writes weights files, and lets the server read them: works on every device.

    Args:
        server: the server.
        directory: where, under the same path for the server; removed again afterwards.
        key: the config key of another place, for the message.
    """

    def __init__(self, server: InferenceServer, directory: Path, key: str = "rollout.vllm.weights_dir") -> None:
        self._server = server
        self._directory = directory.absolute()
        self._key = key

    def connect(self) -> None:
        """Nothing to prepare."""

    def send(self, weights: Mapping[str, Tensor], dtype: torch.dtype | None, version: str) -> None:
        """As for ``Transfer``. Raises WriteError if the disk fails."""
        with replacing(self._directory, "the weights for the server") as partial:
            partial.mkdir()
            _write(weights, dtype, partial)
        try:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._directory)}}
            self._server.post("/collective_rpc", body)
        except RefusedError as error:
            raise RefusedError(
                f"the server did not take the weights in {self._directory}; it must see this folder under the same "
                f"path ({self._key}), and serve the student: {error}",
                error.status,
            ) from None
        finally:
            remove(self._directory)
        self._server.post("/update_weight_version", {"new_version": version})


def _write(weights: Mapping[str, Tensor], dtype: torch.dtype | None, directory: Path) -> None:
    """Write weights to files of at most ``SHARD_BYTES``, unless one weight alone is larger."""
    shard: dict[str, Tensor] = {}
    held = written = 0
    for number, (name, weight) in enumerate(weights.items(), start=1):
        shard[name] = _as(weight, dtype).cpu().contiguous()
        held += shard[name].nbytes
        if held >= SHARD_BYTES or number == len(weights):
            save_file(shard, directory / f"model-{written:05d}.safetensors")
            shard, held, written = {}, 0, written + 1


@final
class NcclTransfer:
    """Broadcasts weights from this process's GPU to the server's GPUs; the server was started with the backend nccl.

    This process is NCCL's rank 0; the server's workers follow. They meet by NCCL's unique id, sent over HTTP, so no
    vLLM is needed here. Both sides must use NCCL libraries that understand each other, and a GPU each: NCCL refuses
    two ranks on one.

    Args:
        server: the server.
        device: this process's GPU.
    """

    def __init__(self, server: InferenceServer, device: torch.device) -> None:
        self._server = server
        self._device = device
        self._communicator: Any = None

    def connect(self) -> None:
        """Form the group with the server's workers."""
        from torch.cuda import nccl

        size = 1 + int(self._server.get("/get_world_size", include_dp=True)["world_size"])
        unique_id = nccl.unique_id()
        assert len(unique_id) == _UNIQUE_ID_BYTES
        info = {
            "nccl_unique_id_b64": base64.b64encode(unique_id).decode("ascii"),
            "rank_offset": 1,
            "world_size": size,
            # Weights go one by one, so both sides agree on nothing but their order.
            "packed": False,
        }

        def join() -> Any:
            with self._own_stream() as stream:
                communicator = nccl.init_rank(size, unique_id, 0)
                # vLLM's workers warm up with an all-reduce of one float; every rank must take part.
                nccl.all_reduce([torch.zeros(1, device=self._device)], comms=[communicator])
                stream.synchronize()
            return communicator

        self._communicator = _beside(
            join, lambda: self._server.post("/init_weight_transfer_engine", {"init_info": info})
        )

    def send(self, weights: Mapping[str, Tensor], dtype: torch.dtype | None, version: str) -> None:
        """As for ``Transfer``."""
        kinds = [dtype if dtype is not None and one.is_floating_point() else one.dtype for one in weights.values()]
        update = {
            "names": list(weights),
            "dtype_names": [str(kind).removeprefix("torch.") for kind in kinds],
            "shapes": [list(weight.shape) for weight in weights.values()],
        }

        def broadcast() -> None:
            from torch.cuda import nccl

            with self._own_stream() as stream, torch.no_grad():
                # The memory of a converted copy is reused for later work of the same stream only.
                for weight in weights.values():
                    nccl.broadcast([_as(weight.to(self._device), dtype).contiguous()], comms=[self._communicator])
                stream.synchronize()

        self._server.post("/start_weight_update")
        # The server receives inside this request.
        _beside(broadcast, lambda: self._server.post("/update_weights", {"update_info": update}))
        self._server.post("/finish_weight_update", {"weight_version": version})

    @contextmanager
    def _own_stream(self) -> Iterator[torch.cuda.Stream]:
        """Work on a stream of its own, after what is queued: an operation that never ends must not block training's."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                yield stream


def _as(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a weight in the server's dtype; what is no floating-point number stays."""
    return weight.detach().to(dtype) if dtype is not None and weight.is_floating_point() else weight.detach()


def _beside(ours: Callable[[], Any], theirs: Callable[[], Any]) -> Any:
    """Run our end of an NCCL operation beside the request that starts the server's end; return what ours returns.

    NCCL waits for ever for a rank that never comes. So ours runs in a thread that does not keep the process alive, and
    a request that fails is told without waiting for it.

    Raises:
        RefusedError: ours failed or did not end, although the server's end did.
    """
    results: list[Any] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(ours())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="weight-transfer", daemon=True)
    thread.start()
    theirs()
    thread.join(_LAST_SECONDS)
    if failures:
        raise RefusedError(f"NCCL failed to reach the server: {failures[0]}", 500) from failures[0]
    if not results:
        raise RefusedError(f"NCCL did not finish within {_LAST_SECONDS:g} s of the server's own end", 500)
    return results[0]
