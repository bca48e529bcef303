"""The same against a real vLLM server on a loopback address (slow; it needs an environment of its own)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from deltakd.generation.noise import NoiseKey
from deltakd.io.errors import LostServerError, ServerError
from deltakd.io.run_directory import RunDirectory
from deltakd.rollouts.responses import Response
from deltakd.rollouts.vllm_server import Completions
from deltakd.rollouts.weight_transfer import FilesTransfer
from tests.rollouts.test_vllm_engine import column
from tests.rollouts.vllm_process import VllmProcess, vllm_server
from tests.tiny import save_model

Train = Callable[..., RunDirectory]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llamas with the smallest heads that vLLM knows on CPUs, and an output embedding of their own."""
    root = tmp_path_factory.mktemp("llamas")
    for role, seed, spread in (("student", 1, 0.1), ("teacher", 3, 0.4)):
        save_model(
            root / role, seed=seed, width=64, family="llama", head_dim=32, initializer_range=spread,
            tie_word_embeddings=False,
        )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[VllmProcess]:
    with vllm_server(models / "student", models / "server.log") as served:
        yield served


def on_server(server: VllmProcess, models: Path, *more: str) -> list[str]:
    return [
        "rollout=student",
        "rollout.engine=vllm",
        f"rollout.vllm.url={server.url}",
        "rollout.vllm.wait=0",
        "rollout.decoding.max_new_tokens=12",
        f"model.student.path={models / 'student'}",
        f"model.teacher.path={models / 'teacher'}",
        "loss.ce_weight=0",
        "data.val=null",
        "optim.lr=0.02",
        "trainer.max_steps=8",
        *more,
    ]


def test_the_server_writes_with_the_student_as_it_learns(train: Train, server: VllmProcess, models: Path) -> None:
    run = train("kd_reverse", *on_server(server, models))
    gaps, losses = column(run.path, "rollout/logprob_gap"), column(run.path, "train/reverse_kl")
    assert len(gaps) == 8
    assert max(gaps) < 1e-4
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_an_adapter_reaches_the_server(train: Train, server: VllmProcess, models: Path) -> None:
    lora = "model.lora={r: 8, alpha: 32, target_modules: [q_proj, v_proj, down_proj]}"
    run = train("kd_reverse", *on_server(server, models, lora, "trainer.max_steps=4"))
    assert max(column(run.path, "rollout/logprob_gap")) < 1e-4


def test_the_check_fails_if_weights_are_not_sent(
    train: Train, server: VllmProcess, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a run that taught the server other weights, and without a hand-over, the gap is large at once."""
    train("kd_reverse", *on_server(server, models, "optim.lr=0.1", "trainer.max_steps=4"), name="before")

    def send(self: FilesTransfer, weights: object, dtype: object, version: str) -> None:
        self._server.post("/update_weight_version", {"new_version": version})

    monkeypatch.setattr(FilesTransfer, "send", send)
    with pytest.raises(ServerError, match=r"rollout/logprob_gap is (0\.[1-9]|[1-9])"):
        train("kd_reverse", *on_server(server, models), name="after")


def test_equal_seeds_write_equal_responses(train: Train, server: VllmProcess, models: Path) -> None:
    one, two = (train("kd_reverse", *on_server(server, models), name=name) for name in ("one", "two"))
    assert column(one.path, "rollout/response_length") == column(two.path, "rollout/response_length")
    assert column(one.path, "train/loss") == pytest.approx(column(two.path, "train/loss"), rel=1e-4)


def test_a_killed_server_stops_the_run_and_another_one_lets_it_go_on(
    train: Train, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a round: once the run stops with its state saved, once it waits for the next server."""
    with vllm_server(models / "student", models / "second.log") as server:
        chosen = on_server(server, models, "trainer.max_steps=4", "rollout.per_prompt=4", "data.batch_size=16")
        whole = train("kd_reverse", *chosen, name="whole")
        with monkeypatch.context() as patch:
            _kill_at(patch, server, 2 * 16 + 5)
            with pytest.raises(LostServerError, match="did not come back within"):
                train("kd_reverse", *chosen, name="stopped")
        saved = torch.load(tmp_path / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["global_step"] == 2
        server.start()
        server.wait()
        stopped = train("kd_reverse", *chosen, "resume=true", name="stopped")
        with monkeypatch.context() as patch:
            _kill_at(patch, server, 2 * 16 + 5, again=True)
            waiting = train("kd_reverse", *chosen, "rollout.vllm.wait=300", name="waiting")
    assert "Waiting for it (rollout.vllm.wait=300 s)" in caplog.text
    for run in (stopped, waiting):
        assert column(run.path, "train/loss") == pytest.approx(column(whole.path, "train/loss"), rel=1e-3)


def _kill_at(patch: pytest.MonkeyPatch, server: VllmProcess, request: int, again: bool = False) -> None:
    """Kill the server before a request (and start another one)."""
    original = Completions.answer
    numbers = itertools.count()

    def answer(self: Completions, prompt: Sequence[int], key: NoiseKey) -> Response:
        if next(numbers) == request:
            server.kill()
            if again:
                server.start()
        return original(self, prompt, key)

    patch.setattr(Completions, "answer", answer)
