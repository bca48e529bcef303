"""The token that a server of references and its trainers share; it never travels, and is in no config and no log."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import stat
from pathlib import Path
from typing import Any

from deltakd.io.errors import RefusedError
from deltakd.io.files import make_folder
from deltakd.io.home import home_directory
from deltakd.references.serving.wire import PROTOCOL, WireError, receive, send

#: The environment variable that may hold the token; else it is in the file TOKEN_FILE of the home directory.
TOKEN_VARIABLE = "DELTAKD_SERVE_TOKEN"
TOKEN_FILE = Path(".deltakd") / "serve_token"
#: Fewer characters could be guessed.
_SHORTEST = 16


def read_token(*, create: bool) -> bytes:
    """Return the token of the environment, or of its file.

    Args:
        create: make the file if there is neither; a server does.

    Raises:
        ValueError: there is none, it is too short, or others may read its file.
    """
    given = os.environ.get(TOKEN_VARIABLE)
    if given is not None:
        return _checked(given, f"the environment variable {TOKEN_VARIABLE}")
    home = home_directory()
    if home is None:
        raise ValueError(f"there is no home directory to keep the server's token in; set {TOKEN_VARIABLE}")
    path = home / TOKEN_FILE
    if create and not path.exists():
        make_folder(path.parent, "the server's token")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(
            f"the server's token is neither in {TOKEN_VARIABLE} nor in {path} ({reason}); the server makes the file on "
            "its machine: copy it, or set the variable for both"
        ) from None
    if mode & 0o077:
        raise ValueError(f"others may read the token in {path} (mode {mode:o}); chmod 600 {path}")
    return _checked(content, str(path))


def _checked(token: str, where: str) -> bytes:
    found = token.strip()
    if len(found) < _SHORTEST:
        raise ValueError(f"the token in {where} has {len(found)} characters; give at least {_SHORTEST} random ones")
    return found.encode()


def greet_as_server(connection: socket.socket, token: bytes) -> None:
    """Let the other side prove that it knows the token, and prove it, too. Raises WireError if it does not."""
    own = secrets.token_hex(16)
    send(connection, {"protocol": PROTOCOL, "nonce": own})
    said = receive(connection, 0).header
    if said.get("protocol") != PROTOCOL:
        reason = f"the server speaks version {PROTOCOL} of the protocol, the trainer {said.get('protocol')}"
        send(connection, {"refused": f"{reason}; install one version of deltakd on both sides"})
        raise WireError(reason)
    theirs = str(said.get("nonce"))
    if not _is_proof(said, token, "trainer", own, theirs):
        reason = f"the token does not match; both sides need the same {TOKEN_VARIABLE} or token file"
        send(connection, {"refused": reason})
        raise WireError("its token does not match")
    send(connection, {"proof": _proof(token, "server", own, theirs)})


def greet_as_trainer(connection: socket.socket, token: bytes) -> None:
    """Prove to a server that the token is known, and let it prove the same.

    Raises:
        WireError: the server is gone, or is none.
        RefusedError: it has another token, or another version.
    """
    theirs = str(receive(connection, 0).header.get("nonce"))
    own = secrets.token_hex(16)
    send(connection, {"protocol": PROTOCOL, "nonce": own, "proof": _proof(token, "trainer", theirs, own)})
    answer = receive(connection, 0).header
    if "refused" in answer:
        raise RefusedError(str(answer["refused"])[:300], 403)
    if not _is_proof(answer, token, "server", theirs, own):
        raise RefusedError("whoever listens there does not know the token", 403)


def _is_proof(said: dict[str, Any], token: bytes, *facts: str) -> bool:
    return hmac.compare_digest(str(said.get("proof")).encode(), _proof(token, *facts).encode())


def _proof(token: bytes, *facts: str) -> str:
    return hmac.new(token, "|".join(facts).encode(), hashlib.sha256).hexdigest()
