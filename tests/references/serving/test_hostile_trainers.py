"""Whatever one side sends, the server answers its other trainers, and nobody waits for ever."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from deltakd.io.errors import ServerError
from deltakd.references.serving.address import Address
from deltakd.references.serving.connection import ServerConnection
from deltakd.references.serving.gloo_link import GlooLink
from deltakd.references.serving.link import LinkReceiver
from deltakd.references.serving.secret import TOKEN_VARIABLE, greet_as_trainer
from deltakd.references.serving.shared_memory import SharedMemoryReceiver
from deltakd.references.serving.transports import Transport
from deltakd.references.serving.wire import HEADER_BYTES, WireError, receive, send
from tests.references.serving.servers import TOKEN, at, serving
from tests.tiny import World

REQUEST = {
    "input_ids": torch.tensor([[5, 6, 7, 8]], dtype=torch.int32),
    "attention_mask": torch.ones(1, 4, dtype=torch.bool),
    "trained": torch.tensor([[False, False, True, True]]),
}


@pytest.fixture(scope="module")
def address(world: World) -> Iterator[Address]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setenv(TOKEN_VARIABLE, TOKEN)
        overrides = world.overrides(Path(folder), "kd", *at(Path(folder)))
        with serving(overrides):
            yield Address.parse(f"unix://{folder}/socket", "url")


def admitted(connection: socket.socket, transport: object = "socket", **asked: Any) -> None:
    greet_as_trainer(connection, TOKEN.encode())
    send(connection, {"roles": ["teacher"], "heads": False, "transports": ["shared_memory"], **asked})
    receive(connection, None)
    receive(connection, 0)
    send(connection, {"transport": transport})


def junk(connection: socket.socket) -> None:
    connection.sendall(os.urandom(4096))


def half_a_frame(connection: socket.socket) -> None:
    connection.sendall(struct.pack("<4sIQ", b"DKD1", 100, 0) + b'{"number":')


def a_header_without_end(connection: socket.socket) -> None:
    connection.sendall(struct.pack("<4sIQ", b"DKD1", HEADER_BYTES + 1, 0))


def half_a_request(connection: socket.socket) -> None:
    admitted(connection)
    connection.sendall(struct.pack("<4sIQ", b"DKD1", 100, 1000) + b'{"number":')


def no_such_transport(connection: socket.socket) -> None:
    admitted(connection, transport=["carrier pigeon"])


def transports_that_are_none(connection: socket.socket) -> None:
    admitted(connection, transports={"socket": 1})


def memory_that_was_never_lent(connection: socket.socket) -> None:
    admitted(connection, transport="shared_memory")
    for freed in ([7, -1, "x", [1], None, True], 7, "x", {}):
        send(connection, {"free": freed})


def a_group_that_is_left_in_the_middle_of_an_answer(connection: socket.socket) -> None:
    greet_as_trainer(connection, TOKEN.encode())
    send(connection, {"roles": ["teacher"], "heads": False, "transports": ["gloo"]})
    receive(connection, None)
    receive(connection, 0)
    send(connection, {"transport": "gloo"})
    receiver = LinkReceiver("gloo", GlooLink)
    receiver.meet(connection, lambda said: None)
    send(connection, {"number": 1}, REQUEST)
    placed = receive(connection, 0).header["placed"]
    receiver.close()
    send(connection, {"awaited": placed["number"]})
    with pytest.raises(WireError, match="closed the connection"):
        receive(connection, 0)


def a_group_that_never_forms(connection: socket.socket) -> None:
    admitted(connection, transport="gloo", transports=["gloo"])
    send(connection, {"key": "0/1", "value": "no base64!"})


def requests_that_are_none(connection: socket.socket) -> None:
    admitted(connection)
    for tensors in ({}, {"input_ids": torch.ones(3)}, {**REQUEST, "input_ids": REQUEST["input_ids"] + 2**20}):
        send(connection, {"number": 1}, tensors)
        assert "refused" in receive(connection, None).header
    for roles in ([], "teacher", ["student"], [["teacher"]], {}):
        send(connection, {"number": 1, "roles": roles}, REQUEST)
        assert "refused" in receive(connection, None).header


@pytest.mark.parametrize(
    "attack",
    [
        junk,
        half_a_frame,
        a_header_without_end,
        half_a_request,
        no_such_transport,
        transports_that_are_none,
        memory_that_was_never_lent,
        a_group_that_is_left_in_the_middle_of_an_answer,
        a_group_that_never_forms,
        requests_that_are_none,
    ],
)
def test_a_server_outlives_its_trainers_mistakes(address: Address, attack: Callable[[socket.socket], None]) -> None:
    with address.connect() as connection:
        with suppress(WireError):
            attack(connection)
        honest = ServerConnection(address, TOKEN.encode(), ["teacher"], wait_s=0)
        answer = honest.take(honest.ask(REQUEST))
        honest.close()
    assert answer.tensors["teacher"].shape[0] == 2


def test_trainers_with_more_requests_than_the_server_holds_are_answered_in_order(address: Address) -> None:
    """Over groups of two, where the server hears between its answers that the trainer waits for one."""
    trainers = [ServerConnection(address, TOKEN.encode(), ["teacher"], 0, transport) for transport in ("gloo", "gloo")]
    rows = [{**REQUEST, "input_ids": REQUEST["input_ids"] + row} for row in range(70)]
    asked = [[trainer.ask(row) for row in rows] for trainer in trainers]
    one, other = (
        [trainer.take(number).tensors["teacher"] for number in numbers]
        for trainer, numbers in zip(trainers, asked, strict=True)
    )
    alone = ServerConnection(address, TOKEN.encode(), ["teacher"], 0, "socket")
    for row in (0, 1, 69):
        expected = alone.take(alone.ask(rows[row])).tensors["teacher"]
        assert torch.equal(one[row], expected)
        assert torch.equal(other[row], expected)
    for trainer in (*trainers, alone):
        trainer.close()


@pytest.mark.parametrize("transport", ["socket", "shared_memory", "gloo"])
def test_an_answer_without_tokens_is_an_answer(address: Address, transport: Transport) -> None:
    """Such as that to a rank for which the last micro-batch has only prompts left."""
    trainer = ServerConnection(address, TOKEN.encode(), ["teacher"], 0, transport)
    numbers = [trainer.ask({**REQUEST, "trained": REQUEST["trained"] & kept}) for kept in (False, True)]
    none, some = (trainer.take(number).tensors["teacher"] for number in numbers)
    trainer.close()
    assert (none.shape, none.dtype) == ((0, some.shape[1]), some.dtype)
    assert len(some) == 2


def test_whoever_waits_hears_that_an_answer_could_not_be_taken_in(
    address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(SharedMemoryReceiver, "take", full)
    trainer = ServerConnection(address, TOKEN.encode(), ["teacher"], 0, "shared_memory")
    number = trainer.ask(REQUEST)
    with pytest.raises(ServerError, match="could not be received: no memory is left"):
        trainer.take(number)
    trainer.close()
