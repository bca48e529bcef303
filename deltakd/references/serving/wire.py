"""Frames between a trainer and a server of references: a JSON header, then the bytes of tensors; nothing is unpickled.

A frame is ``DKD1``, the length of the header (uint32) and of the body (uint64), both little-endian, the header and the
body. The header's ``tensors`` lists name, dtype and shape of each tensor; the body holds them one after the other.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Increase it when an older side can no longer read the frames, or reads them otherwise.
PROTOCOL = 2

_MAGIC = b"DKD1"
_PREFIX = struct.Struct("<4sIQ")
#: Longest header, and longest frame from a side that has not proved to know the token.
HEADER_BYTES = 2**20
#: Bytes given to the kernel at a time.
_PIECE = 2**22
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
}


class WireError(OSError):
    """The other side is gone, or does not speak this protocol."""


class Frame(NamedTuple):
    """What one side says to the other."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def send(connection: socket.socket, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> int:
    """Send a frame and return its bytes.

    Args:
        connection: one thread may send at a time.
        header: JSON.
        tensors: on any device.

    Raises:
        OSError: the other side is gone.
    """
    parts = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
    said = json.dumps({**header, "tensors": describe(parts)}).encode()
    size = sum(part.nbytes for part in parts.values())
    connection.sendall(_PREFIX.pack(_MAGIC, len(said), size) + said)
    for part in parts.values():
        content = _bytes_of(part).numpy().data
        for start in range(0, len(content), _PIECE):
            connection.sendall(content[start : start + _PIECE])
    return _PREFIX.size + len(said) + size


def receive(connection: socket.socket, most_bytes: int | None) -> Frame:
    """Wait for a frame and return it.

    Args:
        connection: one thread may receive at a time.
        most_bytes: of its tensors; None: as many as the other side says, which must be trusted.

    Raises:
        WireError: the other side is gone, says nothing in time, or sends something else.
    """
    magic, header_bytes, size = _PREFIX.unpack(_read(connection, _PREFIX.size))
    if magic != _MAGIC or header_bytes > HEADER_BYTES:
        raise WireError("it does not speak deltakd's protocol")
    try:
        header = json.loads(_read(connection, header_bytes))
        shapes = read_description(header.pop("tensors"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WireError("its frame has a header that can't be read") from None
    wanted = sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())
    if wanted != size or (most_bytes is not None and size > most_bytes):
        raise WireError(f"its frame has {size} bytes of tensors; {min(wanted, most_bytes or wanted)} are allowed")
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    for tensor in tensors.values():
        _fill(connection, _bytes_of(tensor).numpy().data)
    return Frame(header, tensors)


def describe(tensors: Mapping[str, Tensor]) -> list[list[Any]]:
    """Return name, dtype and shape of each tensor; JSON."""
    return [[name, str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()]


def read_description(listed: Any) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Return name -> dtype and shape. Raises ValueError, KeyError or TypeError if ``describe`` did not write it."""
    return {str(name): (_DTYPES[dtype], _checked(shape)) for name, dtype, shape in listed}


def _checked(shape: Any) -> list[int]:
    if not isinstance(shape, list) or len(shape) > 6 or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("no shape")
    return shape


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return [bytes] uint8, the memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8)


def _read(connection: socket.socket, size: int) -> bytes:
    found = bytearray(size)
    _fill(connection, memoryview(found))
    return bytes(found)


def _fill(connection: socket.socket, room: memoryview) -> None:
    done = 0
    while done < len(room):
        try:
            got = connection.recv_into(room[done:])
        except (BlockingIOError, TimeoutError):
            raise WireError("it has stopped answering") from None
        except OSError as error:
            raise WireError(error.strerror or type(error).__name__) from None
        if not got:
            raise WireError("it closed the connection")
        done += got
