"""A client of an inference server that speaks HTTP and JSON, such as vLLM or SGLang."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, final
from urllib.parse import urlparse

import httpx

from deltakd.io.errors import LostServerError, RefusedError

#: The environment variable of the key that the server asks for, as vLLM's own.
KEY_VARIABLE = "VLLM_API_KEY"
#: Seconds to wait for a connection, and for an answer to a question about the server itself.
CONNECT_SECONDS = 10.0
#: Statuses of a server, or of a proxy in front of one, that is not there.
_GONE = (502, 503, 504)
#: Characters of the server's own words in a message.
_QUOTED = 300


def url_problems(url: str | None, key: str) -> list[str]:
    """Return a sentence if this is no address of a server.

    Args:
        url: the address.
        key: its config key.
    """
    parsed = urlparse(url or "")
    try:
        usable = parsed.scheme in ("http", "https") and bool(parsed.hostname) and parsed.port != 0
    except ValueError:
        usable = False
    if usable:
        return []
    given = "null" if url is None else repr(url)
    return [f"{key} is {given}; it must be the address of a server, such as http://127.0.0.1:8000"]


@final
class InferenceServer:
    """Asks a server; threads may share it.

    A new connection for each request: vLLM closes one after an error, which a kept connection would notice too late.

    Args:
        url: its address, without ``/v1``.
        timeout: seconds to wait for an answer.
        connections: most requests at a time; further ones wait.
    """

    def __init__(self, url: str, *, timeout: float, connections: int = 8) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(KEY_VARIABLE)
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=0),
            # A proxy of the environment is for the outside; a server of one's own is reached directly.
            trust_env=False,
        )
        self._timeout = timeout

    def get(self, path: str, **query: str | int | bool) -> Any:
        """Return the JSON of an answer. Raises LostServerError and RefusedError."""
        return self._ask("GET", path, query, None, min(self._timeout, CONNECT_SECONDS))

    def post(self, path: str, body: Mapping[str, Any] | None = None, **query: str | int | bool) -> Any:
        """Return the JSON of an answer; None if it has none. Raises LostServerError and RefusedError."""
        return self._ask("POST", path, query, body, self._timeout)

    def is_healthy(self) -> bool:
        """Return True if the server says that it can work."""
        try:
            self.get("/health")
        except (LostServerError, RefusedError):
            return False
        return True

    def _ask(
        self, method: str, path: str, query: Mapping[str, Any], body: Mapping[str, Any] | None, timeout: float
    ) -> Any:
        try:
            answer = self._client.request(
                method,
                path,
                params=query,
                json=body,
                timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=None),
            )
        except httpx.TimeoutException:
            raise LostServerError(f"the server {self.url} did not answer {path} within {timeout:g} s") from None
        except httpx.TransportError as error:
            why = str(error) or type(error).__name__
            raise LostServerError(f"the server {self.url} can't be reached ({path}: {why})") from None
        if answer.status_code in _GONE:
            raise LostServerError(f"the server {self.url} can't be reached ({path}: status {answer.status_code})")
        if answer.is_error:
            raise RefusedError(
                f"the server {self.url} refused {path} with status {answer.status_code}: {_said(answer)}",
                answer.status_code,
            )
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError:
            raise RefusedError(
                f"the server {self.url} answered {path} with something that is not JSON: {answer.text[:_QUOTED]!r}",
                answer.status_code,
            ) from None


def _said(answer: httpx.Response) -> str:
    """Return the server's reason in its own words; OpenAI's format has them in ``error.message``."""
    try:
        content = answer.json()
    except ValueError:
        return answer.text[:_QUOTED] or answer.reason_phrase
    error = content.get("error") if isinstance(content, dict) else None
    found = error.get("message") if isinstance(error, dict) else error
    return str(found or content)[:_QUOTED]
