"""As much of a W&B server, on the loopback interface, as `wandb sweep`, `wandb agent` and the runs of a grid need."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY, SWEEP = "someone", "sweep001"


class WandbServer:
    """What the commands sent, and the answers to them.

    Args:
        count: how many runs of the grid an agent is given before it is told to exit.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.config: dict[str, Any] = {}
        self.operations: list[str] = []
        self.given: dict[str, dict[str, Any]] = {}
        #: Run id -> rows of its history, in the order of arrival.
        self.history: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.exit_codes: dict[str, int] = {}
        self.upserts: dict[str, dict[str, Any]] = defaultdict(dict)
        self.lock = threading.Lock()
        self.url = ""

    def query(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer one GraphQL operation."""
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = match[1] if match else ""
        self.operations.append(operation)
        answer = getattr(self, f"on_{operation}", None)
        if answer is None:
            return {"errors": [{"message": f"{operation} is unknown to this server"}]}
        return {"data": answer(variables)}

    def on_Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        teams: dict[str, Any] = {"edges": []}
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": teams}}

    def on_UpsertSweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.config = yaml.safe_load(variables["config"])
        sweep = {"name": SWEEP, "project": self._project(variables["projectName"])}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def on_SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = {"id": SWEEP, "name": SWEEP, "state": "RUNNING", "config": yaml.safe_dump(self.config)}
        return {"project": {"sweep": {**sweep, "runs": {"edges": []}}}}

    def on_CreateAgent(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent1"}}}

    def on_Heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        commands = [] if json.loads(variables["runState"]) else [self._next_command()]
        return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": json.dumps(commands)}}

    def on_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        # No run has been here before.
        return {"model": {**self._project(variables["project"]), "bucket": None}}

    def on_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        self.upserts[name] |= {key: value for key, value in variables.items() if value is not None}
        bucket = {"id": name, "name": name, "displayName": name, "sweepName": variables.get("sweep")}
        project = self._project(variables.get("project") or "deltakd")
        return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}

    def on_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def stream(self, run: str, content: dict[str, Any]) -> None:
        """Take in a request to a run's file_stream."""
        for line in content.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            self.history[run].append(json.loads(line))
        if content.get("complete"):
            self.exit_codes[run] = content["exitcode"]

    def _next_command(self) -> dict[str, Any]:
        if len(self.given) == self.count:
            return {"type": "exit"}
        names = list(self.config["parameters"])
        grid = list(itertools.product(*(self.config["parameters"][name]["values"] for name in names)))
        args = {k: {"value": v} for k, v in zip(names, grid[len(self.given)], strict=True)}
        run_id = f"run{len(self.given)}"
        self.given[run_id] = {name: arg["value"] for name, arg in args.items()}
        return {"type": "run", "run_id": run_id, "program": self.config["program"], "args": args}

    def _project(self, name: str) -> dict[str, Any]:
        return {"id": "1", "name": name, "entity": {"id": "1", "name": ENTITY}}


@contextmanager
def serve(count: int) -> Iterator[WandbServer]:
    """Serve on a free port of the loopback interface."""
    state = WandbServer(count)

    class Handler(BaseHTTPRequestHandler):
        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _answer(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = self._body()
            answer: dict[str, Any] = {}
            with state.lock:
                if self.path.endswith("/file_stream"):
                    state.stream(self.path.split("/")[-2], json.loads(body))
                elif self.path.endswith("/graphql"):
                    request = json.loads(body)
                    answer = state.query(request["query"], request.get("variables") or {})
            # What else clients send (reports of how they are used) is taken and forgotten.
            self._answer(answer)

        def do_PUT(self) -> None:
            self._body()
            self._answer({})

        def do_GET(self) -> None:
            self._answer({})

        def log_message(self, *args: Any) -> None:
            """Keep requests off the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
