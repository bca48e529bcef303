"""A small server that speaks vLLM 0.32's HTTP, as recorded from the real one, around a model of transformers."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Answer = tuple[int, Any]


class FakeVllm:
    """Serves a model directory; tests replace its attributes and read ``asked``."""

    def __init__(self, path: Path, port: int = 0) -> None:
        self.path = str(path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.longest = 120
        self.most_log_probs = 20
        #: Changes the log-probs of given tokens; or the server says why it has none.
        self.scored: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] = lambda values: values
        self.refuses_to_score: Answer | None = None
        self.version = "default"
        self.loads_weights = True
        self.busy_resets = 0
        self.development = True
        self.model_config = {"dtype": "torch.float32", "logprobs_mode": "raw_logprobs", "enable_sleep_mode": False}
        self.worker = "vllm.v1.worker.gpu_worker.Worker"
        self.backend: str | None = None
        #: Called before each completion with the number of those before it; may raise ConnectionError, or answer.
        self.before: Callable[[int], Answer | None] = lambda number: None
        #: Changes the log-probs of a prompt.
        self.edited: Callable[[list[Any]], list[Any]] = lambda entries: entries
        #: (path, query, body) of every request, in order.
        self.asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._completions = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.asked]

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, _, body in self.asked if asked == path]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def _reply(self) -> None:
                parsed = urlparse(self.path)
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(content) if content else {}
                try:
                    status, answer = fake.answer(parsed.path, parse_qs(parsed.query), body)
                except ConnectionError:
                    # As a killed process: the connection ends without an answer.
                    self.close_connection = True
                    return
                said = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST = _reply  # noqa: N815

        return Handler

    def answer(self, path: str, query: dict[str, Any], body: dict[str, Any]) -> Answer:
        self.asked.append((path, query, body))
        found = getattr(self, "answer" + path.replace("/", "_"), None)
        is_ours = path in ("/health", "/tokenize") or path.startswith("/v1/")
        if found is None or not (self.development or is_ours):
            return 404, {"detail": "Not Found"}
        return found(body)

    def answer_health(self, body: dict[str, Any]) -> Answer:
        return 200, {}

    def answer_v1_models(self, body: dict[str, Any]) -> Answer:
        entry = {"id": "served", "owned_by": "vllm", "root": self.path, "parent": None, "max_model_len": self.longest}
        return 200, {"object": "list", "data": [entry, {"id": "adapter", "root": self.path, "parent": "served"}]}

    def answer_server_info(self, body: dict[str, Any]) -> Answer:
        transfer = None if self.backend is None else {"backend": self.backend}
        parts = {"model_config": self.model_config, "parallel_config": {"worker_cls": self.worker}}
        return 200, {"vllm_config": parts | {"weight_transfer_config": transfer}}

    def answer_tokenize(self, body: dict[str, Any]) -> Answer:
        tokens = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        return 200, {"count": len(tokens), "max_model_len": self.longest, "tokens": tokens, "token_strs": None}

    def answer_collective_rpc(self, body: dict[str, Any]) -> Answer:
        assert body["method"] == "reload_weights"
        files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
        if not files:
            return 500, {"error": {"message": "Worker failed with error 'Cannot find any model weights'", "code": 500}}
        if self.loads_weights:
            weights = {name: value for file in files for name, value in load_file(file).items()}
            with self._lock:
                missing, unexpected = self.model.load_state_dict(weights, strict=False)
                assert not unexpected
                assert all(name == "lm_head.weight" for name in missing)
        return 200, {"results": [None]}

    def answer_update_weight_version(self, body: dict[str, Any]) -> Answer:
        self.version = body["new_version"]
        return 200, {"success": True, "new_version": self.version}

    def answer_weight_info(self, body: dict[str, Any]) -> Answer:
        return 200, {"weight_version": self.version}

    def answer_get_world_size(self, body: dict[str, Any]) -> Answer:
        return 200, {"world_size": 1}

    def answer_reset_prefix_cache(self, body: dict[str, Any]) -> Answer:
        # Blocks that requests still hold are not freed.
        self.busy_resets -= 1
        return 200, {"success": self.busy_resets < 0}

    def answer_sleep(self, body: dict[str, Any]) -> Answer:
        return 200, {"status": "sleeping", "level": 2}

    def answer_wake_up(self, body: dict[str, Any]) -> Answer:
        return 200, {"status": "awake"}

    @torch.no_grad()
    def answer_v1_completions(self, body: dict[str, Any]) -> Answer:
        with self._lock:
            number, self._completions = self._completions, self._completions + 1
            replaced = self.before(number)
            if replaced is not None:
                return replaced
            if "prompt_logprobs" in body:
                return self._prompt_log_probs(body)
            if body["model"] != "served":
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
            draw = torch.Generator().manual_seed(body["seed"])
            tokens: list[int] = []
            log_probs: list[float] = []
            reason = "length"
            while len(tokens) < body["max_tokens"] and reason == "length":
                logits_V = self.model(torch.tensor([body["prompt"] + tokens])).logits[0, -1].float()
                raw_V = logits_V.log_softmax(-1)
                for unwanted, bias in body.get("logit_bias", {}).items():
                    logits_V[int(unwanted)] += bias
                heat = body["temperature"]
                chosen = int(logits_V.argmax())
                if heat:
                    chosen = int(torch.multinomial((logits_V / heat).softmax(-1), 1, generator=draw))
                tokens.append(chosen)
                log_probs.append(float(raw_V[chosen]))
                reason = "stop" if chosen in body["stop_token_ids"] else "length"
        choice = {
            "index": 0,
            "text": self.tokenizer.decode(tokens),
            "logprobs": {"token_logprobs": log_probs},
            "finish_reason": reason,
            "stop_reason": tokens[-1] if reason == "stop" else None,
            "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
        }
        return 200, {"object": "text_completion", "model": "served", "choices": [choice]}

    def _prompt_log_probs(self, body: dict[str, Any]) -> Answer:
        k, prompt = body["prompt_logprobs"], body["prompt"]
        if k > self.most_log_probs:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most_log_probs}"
            return 400, {"error": {"message": message, "code": 400}}
        log_probs_TV = self.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        entries: list[Any] = [None]
        for log_probs_V, token in zip(log_probs_TV, prompt[1:], strict=False):
            # The k most probable ones, and the token itself.
            kept = dict.fromkeys([token, *log_probs_V.topk(k).indices.tolist()])
            entries.append({str(one): {"logprob": float(log_probs_V[one]), "rank": 1} for one in kept})
        choice = {"text": "x", "prompt_logprobs": self.edited(entries), "prompt_token_ids": prompt, "token_ids": [1]}
        return 200, {"object": "text_completion", "choices": [choice]}

    @torch.no_grad()
    def answer_inference_v1_generate(self, body: dict[str, Any]) -> Answer:
        """Score given tokens; the array comes as an .npy file in base64."""
        if self.refuses_to_score is not None:
            return self.refuses_to_score
        asked, tokens = body["sampling_params"], body["token_ids"]
        ids, start = np.array(asked["prompt_logprob_token_ids"]), asked["prompt_logprob_start"]
        if ids.shape != (len(tokens) - 1 - start, ids.shape[1]):
            return 400, {"error": {"message": f"prompt_logprob_token_ids has {len(ids)} rows", "code": 400}}
        with self._lock:
            log_probs_TV = self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)[start:-1]
        values = log_probs_TV.gather(1, torch.from_numpy(ids).clamp(min=0)).numpy()
        content = io.BytesIO()
        np.save(content, self.scored(np.where(ids < 0, -np.inf, values).astype(np.float32)), allow_pickle=False)
        encoded = base64.b64encode(content.getvalue()).decode()
        return 200, {"request_id": "x", "choices": [{"token_ids": [1]}], "prompt_token_id_logprobs": encoded}


class FakeSglang(FakeVllm):
    """The same model behind SGLang's native ``/generate``, as its documentation has it."""

    def answer_v1_models(self, body: dict[str, Any]) -> Answer:
        entry = {"id": "served", "owned_by": "sglang", "root": self.path, "parent": None, "max_model_len": self.longest}
        return 200, {"object": "list", "data": [entry]}

    def answer_v1_completions(self, body: dict[str, Any]) -> Answer:
        return 404, {"detail": "Not Found"}

    @torch.no_grad()
    def answer_generate(self, body: dict[str, Any]) -> Answer:
        tokens, k = body["input_ids"], body["top_logprobs_num"]
        assert body["return_logprob"]
        assert body["logprob_start_len"] == 0
        with self._lock:
            log_probs_TV = self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        own: list[Any] = [[None, tokens[0], None]]
        top: list[Any] = [None]
        for log_probs_V, token in zip(log_probs_TV, tokens[1:], strict=False):
            own.append([float(log_probs_V[token]), token, None])
            top.append([[float(log_probs_V[one]), one, None] for one in log_probs_V.topk(k).indices.tolist()])
        meta = {"prompt_tokens": len(tokens), "input_token_logprobs": own, "input_top_logprobs": self.edited(top)}
        return 200, {"text": "x", "meta_info": meta}


@contextmanager
def serving(path: Path, port: int = 0, kind: type[FakeVllm] = FakeVllm) -> Iterator[FakeVllm]:
    fake = kind(path, port)
    try:
        yield fake
    finally:
        fake.close()
