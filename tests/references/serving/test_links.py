"""Answers over a group of two: gloo between threads, and NCCL's calls with a stand-in for the library."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError
from deltakd.references.serving import link, nccl_link
from deltakd.references.serving.endpoints import UnavailableError
from deltakd.references.serving.gloo_link import GlooLink
from deltakd.references.serving.link import Form, LinkReceiver, LinkSender
from deltakd.references.serving.nccl_link import NcclLink
from deltakd.references.serving.transports import Offers, choose
from deltakd.references.serving.wire import WireError, receive, send
from tests.references.serving.servers import at
from tests.tiny import World

CPU = torch.device("cpu")
TENSORS = {
    "teacher": torch.arange(12.0).reshape(3, 4).bfloat16(),
    "none": torch.empty(0, 5),
    "not_contiguous": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
    "flags": torch.tensor([True, False, True]),
}


class FakeNccl:
    """Two communicators of one process that hand tensors over; nothing settles until both sides have begun."""

    version = "2.28.0"

    def __init__(self) -> None:
        self.joined: list[int] = []
        self.moved: dict[str, list[list[Tensor]]] = {"send": [], "recv": []}
        self.aborted: list[int] = []
        self.failure = ""

    def new_id(self) -> bytes:
        return b"i" * 128

    def join(self, identity: bytes, rank: int) -> int:
        assert identity == self.new_id()
        self.joined.append(rank)
        return rank

    def move(self, communicator: int, operation: str, tensors: Sequence[Tensor], other: int) -> None:
        assert other == 1 - communicator
        assert communicator not in self.aborted
        self.moved[operation].append(list(tensors))

    def is_settled(self, communicator: int) -> bool:
        if self.failure:
            raise RuntimeError(self.failure)
        return len(set(self.joined)) == 2 and len(self.moved["send"]) == len(self.moved["recv"])

    def mark(self) -> Callable[[], bool]:
        for source, target in zip(self.moved["send"][-1], self.moved["recv"][-1], strict=True):
            target.copy_(source)
        return lambda: True

    def abort(self, communicator: int) -> None:
        self.aborted.append(communicator)

    def room(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)


class Pair:
    """Server and trainer of one connection, in two threads."""

    def __init__(self, form: Form) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.sender, self.receiver = LinkSender("link", form, CPU), LinkReceiver("link", form)
        self.failed: list[Exception] = []
        meeting = self.beside(lambda: self.sender.meet(self.ours))
        try:
            self.receiver.meet(self.theirs, lambda said: send(self.theirs, said) and None)
        except UnavailableError:
            self.close()
            raise
        finally:
            meeting.join()

    def beside(self, work: Callable[[], Any]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except (OSError, UnavailableError) as error:
                self.failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def deliver(self, tensors: dict[str, Tensor]) -> threading.Thread:
        """Place an answer and send it in a thread."""
        header, placed = self.sender.place(tensors)
        return self.beside(lambda: self.sender.deliver(self.ours, header, placed))

    def moved(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return an answer as the trainer gets it."""
        thread = self.deliver(tensors)
        frame = receive(self.theirs, 0)
        hearing = self.beside(lambda: self.sender.hear(receive(self.ours, 0).header))
        found, said = self.receiver.take(frame.header["placed"])
        hearing.join()
        thread.join()
        assert said == {}
        return found

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.ours.close()
        self.theirs.close()


@pytest.fixture(params=["gloo", "nccl"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    form: Form = GlooLink if request.param == "gloo" else partial(NcclLink, driver=FakeNccl())
    made = Pair(form)
    yield made
    made.close()


def test_tensors_arrive_bit_for_bit_and_stay_while_others_come(pair: Pair) -> None:
    found = [pair.moved({name: tensor + turn for name, tensor in TENSORS.items()}) for turn in range(3)]
    for turn, tensors in enumerate(found):
        assert list(tensors) == list(TENSORS)
        assert all(torch.equal(tensors[name], tensor + turn) for name, tensor in TENSORS.items())
    assert pair.failed == []


def test_memory_is_used_again_once_nothing_reads_it() -> None:
    pair = Pair(GlooLink)
    places = []
    for _ in range(3):
        found = pair.moved({"x": torch.ones(1000)})["x"][5:]
        places.append(found.data_ptr())
        del found
    kept = pair.moved({"x": torch.ones(1000)})["x"][5:]
    other = pair.moved({"x": torch.zeros(1000)})["x"][5:]
    assert places[1] == places[2] == kept.data_ptr() != other.data_ptr()
    assert bool((kept == 1).all())
    pair.close()


def test_an_answer_waits_for_its_trainer_and_ends_with_it(pair: Pair) -> None:
    """A stopped trainer has no kernel wait for it on the server's GPU, and one that leaves ends what waits."""
    thread = pair.deliver(TENSORS)
    thread.join(0.2)
    assert thread.is_alive()
    pair.sender.close()
    thread.join()
    assert [str(error) for error in pair.failed] == ["the trainer has left"]


def test_a_server_that_closes_in_the_middle_of_an_answer_ends_it(pair: Pair) -> None:
    header, _ = pair.sender.place({"x": torch.ones(2**22)})
    pair.sender.close()
    pair.ours.shutdown(socket.SHUT_WR)
    with pytest.raises(OSError, match=r"[Cc]losed"):
        pair.receiver.take(header["placed"])


@pytest.mark.parametrize("failure", ["", "remote process exited or there was a network error"])
def test_a_communicator_that_fails_or_stalls_is_aborted(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    driver = FakeNccl()
    pair = Pair(partial(NcclLink, driver=driver))
    monkeypatch.setattr(link, "_TRANSFER_SECONDS", 0.05)
    driver.failure = failure
    header, _ = pair.sender.place(TENSORS)
    with pytest.raises(OSError, match=failure or "it did not finish within 0 seconds"):
        pair.receiver.take(header["placed"])
    assert driver.aborted == [link.TRAINER]
    with pytest.raises(WireError, match="the group is closed"):
        pair.receiver.take(header["placed"])
    pair.close()
    assert driver.aborted == [link.TRAINER, link.SERVER]


def test_a_group_that_can_not_form_says_why_to_both(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeNccl()
    driver.failure = "unhandled system error"
    with pytest.raises(UnavailableError, match=r"NCCL 2.28.0 can't join server and run \(unhandled system error\)"):
        Pair(partial(NcclLink, driver=driver))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
        with pytest.raises(UnavailableError, match="built without gloo"):
            LinkSender("gloo", GlooLink, CPU).meet(ours)
        monkeypatch.undo()
        with pytest.raises(UnavailableError, match="built without gloo"):
            LinkReceiver("gloo", GlooLink).meet(theirs, lambda said: None)


def test_nccl_is_refused_where_it_can_not_work(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nccl" not in Offers(CPU).make(["nccl"])
    with pytest.raises(UnavailableError, match="the server's models are on no CUDA device"):
        choose(["nccl"], {})
    with pytest.raises(UnavailableError, match="this run's device is cpu, and NCCL joins GPUs alone"):
        choose(["nccl"], {"nccl": {"gpu": "GPU-1"}})
    with monkeypatch.context() as patched:
        patched.setattr("deltakd.references.serving.transports.NcclDriver", lambda device: FakeNccl())
        patched.setattr("deltakd.references.serving.transports.gpu_of", lambda device: "GPU-1")
        with pytest.raises(UnavailableError, match="server and run are on one GPU, and NCCL joins two"):
            choose(["nccl"], {"nccl": {"gpu": "GPU-1"}}, torch.device("cuda", 0))
        assert choose(["nccl"], {"nccl": {"gpu": "GPU-2"}}, torch.device("cuda", 0)).name == "nccl"
    options = ("reference.transport=nccl", "trainer.accelerator=cpu")
    overrides = world.overrides(tmp_path, "kd", *at(tmp_path), *options)
    with pytest.raises(ConfigError, match=r"reference.transport=nccl .* this process's device is cpu; give"):
        make_settings(compose_config("train", overrides))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: NCCL does not join two processes on one")
def test_two_gpus_are_joined() -> None:
    devices = [torch.device("cuda", number) for number in (0, 1)]

    def form(meeting: link.Meeting, rank: int) -> NcclLink:
        return NcclLink(meeting, rank, nccl_link.NcclDriver(devices[rank]))

    pair = Pair(form)
    pair.sender._device = devices[0]
    for turn in range(3):
        found = pair.moved({name: (tensor + turn).to(devices[0]) for name, tensor in TENSORS.items()})
        assert all(found[name].device == devices[1] for name in found)
        assert all(torch.equal(found[name].cpu(), tensor + turn) for name, tensor in TENSORS.items())
    pair.close()
