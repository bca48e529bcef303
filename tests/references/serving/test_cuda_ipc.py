"""Answers through a GPU's memory: who writes and reads which block when; on a GPU, between two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from deltakd.references.serving.cuda_ipc import CudaIpcReceiver, CudaIpcSender, CudaRuntime, Pool
from deltakd.references.serving.endpoints import UnavailableError
from deltakd.references.serving.wire import WireError

CPU = torch.device("cpu")
TENSORS = {
    "teacher": torch.arange(12.0).reshape(3, 4).bfloat16(),
    "none": torch.empty(0, 5),
    "not_contiguous": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
}


class Fake:
    """Memory of this process, by handles; counts what is mapped."""

    def __init__(self) -> None:
        self.made: dict[bytes, Tensor] = {}
        self.mapped = 0

    def allocate(self, device: torch.device, size: int) -> tuple[Tensor, bytes]:
        handle = len(self.made).to_bytes(64, "big")
        self.made[handle] = torch.empty(size, dtype=torch.uint8)
        return self.made[handle], handle

    def open(self, device: torch.device, handle: bytes, size: int) -> Tensor:
        if handle not in self.made:
            raise RuntimeError("invalid resource handle")
        self.mapped += 1
        return self.made[handle]

    def close(self, device: torch.device, mapped: Tensor) -> None:
        self.mapped -= 1

    def find(self, name: str) -> torch.device:
        if name != "GPU-1":
            raise RuntimeError("the server's GPU is not among those of this process")
        return CPU

    def name_of(self, device: torch.device) -> str:
        return "GPU-1"

    def waiting(self, *devices: torch.device) -> AbstractContextManager[None]:
        return nullcontext()


def test_answers_arrive_bit_for_bit_and_blocks_are_written_over_once_copied() -> None:
    driver = Fake()
    sender = CudaIpcSender(Pool(CPU, driver))
    receiver = CudaIpcReceiver(json.loads(json.dumps(sender.offer())), driver)
    numbers = []
    for _ in range(3):
        header, carried = sender.place(TENSORS)
        assert carried == {}
        found, said = receiver.take(json.loads(json.dumps(header))["placed"])
        (number,) = said["free"]
        sender.release(number)
        numbers.append(number)
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert len(set(numbers)) == 1, "the block that was offered serves"
    waiting = {sender.place(TENSORS)[0]["placed"]["region"]["number"] for _ in range(2)}
    assert len(waiting) == 2
    receiver.close()
    assert driver.mapped == 0


def test_what_a_killed_trainer_leaves_serves_the_next_one() -> None:
    driver = Fake()
    pool = Pool(CPU, driver)
    for _ in range(3):
        sender = CudaIpcSender(pool)
        CudaIpcReceiver(sender.offer(), driver)
        sender.place(TENSORS)
        sender.place(TENSORS)
        sender.close()
        with pytest.raises(OSError, match="has left"):
            sender.place(TENSORS)
    assert len(driver.made) == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device": "GPU-2"}, "not among those of this process"),
        ({"handle": "AAAA"}, "it is not a handle"),
        ({"proof": "AAAA"}, "it does not hold what the server says"),
    ],
)
def test_memory_that_is_not_the_servers_is_not_used(changed: dict[str, str], said: str) -> None:
    driver = Fake()
    offer = {**CudaIpcSender(Pool(CPU, driver)).offer(), **changed}
    with pytest.raises(UnavailableError, match=said):
        CudaIpcReceiver(offer, driver)
    assert driver.mapped == 0


def test_an_answer_beyond_its_block_is_refused() -> None:
    driver = Fake()
    sender = CudaIpcSender(Pool(CPU, driver))
    receiver = CudaIpcReceiver(sender.offer(), driver)
    placed: Any = sender.place(TENSORS)[0]["placed"]
    with pytest.raises(WireError, match="the block is too small"):
        receiver.take({**placed, "tensors": [["x", "float32", [2**20]]]})


_TRAINER = """
import json, sys, torch
from deltakd.references.serving.cuda_ipc import CudaIpcReceiver
receiver = CudaIpcReceiver(json.loads(sys.stdin.readline()))
for device in ("cuda", "cpu"):
    receiver.device = torch.device(device)
    found, said = receiver.take(json.loads(sys.stdin.readline()))
    values = {name: [value.device.type, value.double().cpu().tolist()] for name, value in found.items()}
    print(json.dumps([values, said]), flush=True)
receiver.close()
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_processes_share_a_gpus_memory() -> None:
    device = torch.device("cuda", 0)
    sender = CudaIpcSender(Pool(device, CudaRuntime()))
    trainer = subprocess.Popen([sys.executable, "-c", _TRAINER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    trainer.stdin.write(json.dumps(sender.offer()).encode() + b"\n")
    for kind in ("cuda", "cpu"):
        header, _ = sender.place({name: tensor.to(device) for name, tensor in TENSORS.items()})
        trainer.stdin.write(json.dumps(header["placed"]).encode() + b"\n")
        trainer.stdin.flush()
        values, said = json.loads(trainer.stdout.readline())
        sender.release(said["free"][0])
        assert values == {name: [kind, tensor.double().tolist()] for name, tensor in TENSORS.items()}
    assert trainer.wait(60) == 0
