"""Answers through memory that server and trainer both map."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from deltakd.references.serving.endpoints import UnavailableError
from deltakd.references.serving.shared_memory import SharedMemoryReceiver, SharedMemorySender
from deltakd.references.serving.transports import Offers, candidates, choose
from deltakd.references.serving.wire import WireError

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="anonymous shared memory needs Linux")

TENSORS = {
    "teacher": torch.arange(12.0).reshape(3, 4).bfloat16(),
    "none": torch.empty(0, 5),
    "not_contiguous": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
    "flags": torch.tensor([True, False, True]),
}


def test_tensors_arrive_bit_for_bit_and_stay_until_nothing_reads_them() -> None:
    sender = SharedMemorySender()
    receiver = SharedMemoryReceiver(sender.offer())
    found = {}
    for turn in range(3):
        header, carried = sender.place(TENSORS)
        assert carried == {}
        kept, said = receiver.take(header["placed"])
        assert said == {"free": []}
        found[turn] = kept
    for tensors in found.values():
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {n: t.dtype for n, t in TENSORS.items()}
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    part = found.pop(1)["teacher"][1:]
    found.pop(0)
    del tensors, kept
    _, said = receiver.take(sender.place(TENSORS)[0]["placed"])
    assert said == {"free": [1]}, "a part of a tensor keeps the region of the whole"
    assert torch.equal(part, TENSORS["teacher"][1:])


def test_a_region_is_used_again_once_it_is_free_and_given_up_when_too_small() -> None:
    sender = SharedMemorySender()
    receiver = SharedMemoryReceiver(sender.offer())
    small, large = {"x": torch.ones(8)}, {"x": torch.ones(2**19)}
    regions = []
    for tensors in (small, small, large, large):
        header, _ = sender.place(tensors)
        region = header["placed"]["region"]["number"]
        found, _ = receiver.take(header["placed"])
        assert torch.equal(found["x"], tensors["x"])
        sender.release(region)
        regions.append(region)
    assert regions[0] == regions[1] != regions[2] == regions[3]
    waiting = [sender.place(large)[0]["placed"]["region"]["number"] for _ in range(2)]
    assert len({*waiting}) == 2, "what the trainer may still read is not written over"


def test_nothing_is_left_in_the_file_system_and_a_region_outlives_the_server_that_has_gone() -> None:
    there = set(os.listdir("/dev/shm"))
    sender = SharedMemorySender()
    receiver = SharedMemoryReceiver(sender.offer())
    header, _ = sender.place(TENSORS)
    receiver.take(header["placed"])
    assert set(os.listdir("/dev/shm")) == there
    sender.close()
    assert receiver.take(header["placed"])[0].keys() == TENSORS.keys()
    receiver.close()
    with pytest.raises(WireError, match=r"shared memory can't be read"):
        receiver.take(header["placed"])


@pytest.mark.parametrize(
    "changed", [{"name": "deltakd-0"}, {"file": 0}, {"pid": 2**22 + 1}, {"size": 1}, {"size": "x"}]
)
def test_memory_of_another_process_is_not_opened(changed: dict[str, object]) -> None:
    sender = SharedMemorySender()
    with pytest.raises(UnavailableError, match="can't be opened from here"):
        SharedMemoryReceiver({**sender.offer(), **changed})


def test_a_file_that_could_be_cut_under_its_reader_is_refused(tmp_path: Path) -> None:
    """Reading beyond its end would kill the trainer."""
    name = "deltakd-1"
    file = os.memfd_create(name)
    os.truncate(file, 4096)
    with pytest.raises(UnavailableError, match="not what the server says"):
        SharedMemoryReceiver({"number": 1, "size": 4096, "pid": os.getpid(), "file": file, "name": name})
    os.close(file)


def test_the_fastest_way_that_works_is_chosen_and_the_reason_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    wanted = candidates("auto", cpu)

    def offered() -> dict[str, object]:
        return {name: offer for name, (_, offer) in Offers(cpu).make(wanted).items()}

    assert choose(wanted, offered())[::2] == ("shared_memory", "")
    assert choose(candidates("socket", cpu), offered()).receiver is None
    assert candidates("auto", torch.device("cuda")) == ["cuda_ipc", "shared_memory", "socket"]
    monkeypatch.delattr(os, "memfd_create")
    assert choose(wanted, offered()) == ("socket", None, "shared_memory is not possible: the server has none")
    with pytest.raises(UnavailableError, match="the server has none"):
        choose(candidates("shared_memory", cpu), offered())
