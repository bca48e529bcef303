"""Frames, addresses, the token and the queue."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deltakd.io.errors import RefusedError
from deltakd.references.serving.address import Address
from deltakd.references.serving.fair_queue import FairQueue
from deltakd.references.serving.secret import TOKEN_VARIABLE, greet_as_server, greet_as_trainer, read_token
from deltakd.references.serving.wire import WireError, receive, send


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    found = socket.socketpair()
    for end in found:
        end.settimeout(5)
    yield found
    for end in found:
        end.close()


def test_tensors_of_every_dtype_arrive_bit_for_bit(ends: tuple[socket.socket, socket.socket]) -> None:
    tensors = {
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float64": torch.tensor([[float("nan"), -0.0, float("inf")]], dtype=torch.float64),
        "transposed": torch.arange(6, dtype=torch.int32).reshape(2, 3).T,
        "nothing": torch.empty(0, 7),
        "bool": torch.tensor([True, False]),
    }
    size = send(ends[0], {"number": 3}, tensors)
    header, got = receive(ends[1], size)
    assert header == {"number": 3}
    assert list(got) == list(tensors)
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name].isnan(), tensor.isnan())
        assert torch.equal(got[name].nan_to_num(), tensor.nan_to_num())


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "does not speak"),
        (struct.pack("<4sIQ", b"DKD1", 2**31, 0), "does not speak"),
        (struct.pack("<4sIQ", b"DKD1", 4, 0) + b"\x80\x04K.", "can't be read"),
        (struct.pack("<4sIQ", b"DKD1", 2, 0) + b"[]", "can't be read"),
    ],
)
def test_what_is_no_frame_is_refused(ends: tuple[socket.socket, socket.socket], sent: bytes, reason: str) -> None:
    ends[0].sendall(sent)
    with pytest.raises(WireError, match=reason):
        receive(ends[1], 0)


@pytest.mark.parametrize("shape", [[-1], [2**40, 2**40], "3", [1.5], [True], [1] * 9])
def test_shapes_that_do_not_fit_the_frame_are_refused(ends: tuple[socket.socket, socket.socket], shape: object) -> None:
    header = json.dumps({"tensors": [["x", "float32", shape]]}).encode()
    ends[0].sendall(struct.pack("<4sIQ", b"DKD1", len(header), 8) + header + bytes(8))
    with pytest.raises(WireError, match=r"can't be read|are allowed"):
        receive(ends[1], 100)


def test_a_side_that_leaves_in_the_middle_of_a_frame_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall(b"DKD1\x00")
    ends[0].close()
    with pytest.raises(WireError, match=r"closed the connection"):
        receive(ends[1], 0)


def greet(ends: tuple[socket.socket, socket.socket], server: bytes, trainer: bytes) -> list[Exception]:
    """Let both sides greet each other, and return the server's error."""
    found: list[Exception] = []

    def serve() -> None:
        try:
            greet_as_server(ends[0], server)
        except WireError as error:
            found.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        greet_as_trainer(ends[1], trainer)
    finally:
        thread.join()
    return found


def test_both_sides_prove_that_they_know_the_token(ends: tuple[socket.socket, socket.socket]) -> None:
    assert greet(ends, b"one token", b"one token") == []


def test_another_token_is_refused_by_name_of_its_variable(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(RefusedError, match=rf"the token does not match; .*{TOKEN_VARIABLE}"):
        greet(ends, b"one token", b"another token")


def test_a_server_that_does_not_know_the_token_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    """One that admits anybody could read the rows."""
    send(ends[0], {"protocol": 1, "nonce": "0" * 32})
    send(ends[0], {"proof": "0" * 64})
    with pytest.raises(RefusedError, match=r"does not know the token"):
        greet_as_trainer(ends[1], b"one token")
    assert b"one token" not in ends[0].recv(4096)


def test_the_server_makes_a_token_that_only_its_user_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"neither in DELTAKD_SERVE_TOKEN nor in .*serve_token"):
        read_token(create=False)
    made = read_token(create=True)
    assert len(made) > 40
    assert read_token(create=False) == made
    file = tmp_path / ".deltakd" / "serve_token"
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(ValueError, match=r"others may read the token .* chmod 600"):
        read_token(create=True)


def test_a_short_token_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "guess me")
    with pytest.raises(ValueError, match=r"has 8 characters; give at least 16") as caught:
        read_token(create=False)
    assert "guess" not in str(caught.value)


@pytest.mark.parametrize(
    "url", [None, "", "127.0.0.1:7711", "http://127.0.0.1:7711", "tcp://127.0.0.1", "tcp://:5", "tcp://a:0", "tcp://a:99999",
            "unix://", "unix:///", f"unix:///{'x' * 110}", "tcp://me:secret@host:1", "tcp://host:1/path"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str | None) -> None:
    with pytest.raises(ValueError, match=r"reference.url is .*tcp://127.0.0.1:7711"):
        Address.parse(url, "reference.url")


def test_a_socket_left_by_a_killed_server_is_taken_over_and_admits_its_owner_alone(tmp_path: Path) -> None:
    address = Address.parse(f"unix://{tmp_path}/s", "reference.url")
    address.listen().close()
    with address.listen():
        assert os.stat(tmp_path / "s").st_mode & 0o777 == 0o600
        with pytest.raises(ValueError, match=r"can't be listened on .*a server answers there"):
            address.listen()


def test_trainers_are_served_in_turn_however_much_one_asks_for() -> None:
    requests: FairQueue[str, int] = FairQueue(most=10)
    for client in ("busy", "modest", "idle"):
        requests.join(client)
    for number in range(4):
        requests.put("busy", number)
    requests.put("modest", 10)
    taken = [requests.take(0) for _ in range(6)]
    assert taken == [("busy", 0), ("modest", 10), ("busy", 1), ("busy", 2), ("busy", 3), None]


def test_a_trainer_waits_for_room_until_it_is_answered_or_leaves() -> None:
    requests: FairQueue[str, int] = FairQueue(most=1)
    requests.join("one")
    assert requests.put("one", 0)
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.extend(requests.put("one", number) for number in (1, 2)))
    thread.start()
    assert requests.take(1) == ("one", 0)
    assert requests.take(0.05) is None
    requests.done("one")
    assert requests.take(1) == ("one", 1)
    requests.leave("one")
    thread.join(5)
    assert found == [True, False]
