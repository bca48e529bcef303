"""Handing weights over: names and values of a checkpoint, and the order of NCCL's protocol."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.cuda import nccl
from transformers import AutoModelForCausalLM

from deltakd.io.errors import RefusedError
from deltakd.io.inference_server import InferenceServer
from deltakd.models import LanguageModel
from deltakd.models.checkpoint_weights import checkpoint_weights
from deltakd.models.lora import merged
from deltakd.rollouts import weight_transfer
from deltakd.rollouts.weight_transfer import FilesTransfer, NcclTransfer
from tests.rollouts.fake_vllm import FakeVllm, serving
from tests.tiny import World, save_model


@pytest.fixture
def fake(world: World) -> Iterator[FakeVllm]:
    with serving(world.root / "student_raw") as server:
        yield server


def test_a_checkpoint_names_the_weights(world: World) -> None:
    path = world.root / "student_raw"
    model = LanguageModel(AutoModelForCausalLM.from_pretrained(path), 300)
    found, stored = checkpoint_weights(model), load_file(path / "model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_is_merged_as_in_the_export(tmp_path: Path, family: str) -> None:
    path = save_model(tmp_path / family, seed=1, family=family)
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path),
        LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2", init_lora_weights=False),
    )
    found = checkpoint_weights(LanguageModel(adapted, 300))
    expected = {name: value for name, value in merged(adapted).state_dict().items() if name in found}
    assert found.keys() == load_file(path / "model.safetensors").keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_files_have_the_server_s_dtype_and_are_removed(fake: FakeVllm, tmp_path: Path, world: World) -> None:
    seen: dict[str, torch.Tensor] = {}
    original = fake.answer_collective_rpc

    def keep(body: dict[str, Any]) -> Any:
        for file in Path(body["kwargs"]["weights_path"]).glob("*.safetensors"):
            seen.update(load_file(file))
        return original(body)

    fake.answer_collective_rpc = keep  # type: ignore[method-assign]
    model = LanguageModel(AutoModelForCausalLM.from_pretrained(world.root / "student_raw"), 300)
    weights = checkpoint_weights(model)
    server = InferenceServer(fake.url, timeout=10)
    FilesTransfer(server, tmp_path / "weights").send(weights, torch.bfloat16, "7")
    assert seen.keys() == weights.keys()
    assert {value.dtype for value in seen.values()} == {torch.bfloat16}
    assert fake.version == "7"
    assert not (tmp_path / "weights").exists()


def test_weights_larger_than_a_file_take_several(
    fake: FakeVllm, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_transfer, "SHARD_BYTES", 4000)
    counts: list[int] = []
    original = fake.answer_collective_rpc

    def count(body: dict[str, Any]) -> Any:
        counts.append(len(list(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))))
        return original(body)

    fake.answer_collective_rpc = count  # type: ignore[method-assign]
    other: Any = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "other", seed=8))
    FilesTransfer(InferenceServer(fake.url, timeout=10), tmp_path / "weights").send(
        checkpoint_weights(LanguageModel(other, 300)), None, "1"
    )
    assert counts[0] > 3
    for name, value in other.state_dict().items():
        assert torch.equal(fake.model.state_dict()[name], value)


def test_a_folder_that_the_server_does_not_see_is_named(fake: FakeVllm, tmp_path: Path) -> None:
    fake.answer_collective_rpc = lambda body: (500, {"error": {"message": "Cannot find any model weights"}})  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match=r"must see this folder under the same path \(rollout\.vllm\.weights_dir\)"):
        FilesTransfer(InferenceServer(fake.url, timeout=10), tmp_path / "w").send({"a": torch.ones(1)}, None, "1")


class _Stream:
    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand-ins for NCCL and CUDA streams; what they were asked, in order."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(nccl, "unique_id", lambda: bytes(range(128)))
    monkeypatch.setattr(nccl, "init_rank", lambda size, uid, rank: asked.append(("init", size, uid, rank)) or "group")
    monkeypatch.setattr(nccl, "all_reduce", lambda inputs, comms: asked.append(("warm up", inputs[0].shape, comms)))
    monkeypatch.setattr(
        nccl, "broadcast", lambda inputs, comms: asked.append(("broadcast", inputs[0].clone(), comms[0]))
    )
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", _Stream)
    return asked


def test_nccl_s_ranks_meet_warm_up_and_get_the_weights_in_the_announced_order(
    fake: FakeVllm, gpu: list[tuple[Any, ...]]
) -> None:
    """The order and the fields that vLLM 0.32's worker expects (``NCCLWeightTransferInitInfo``, ``...UpdateInfo``)."""
    for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        setattr(fake, f"answer_{name}", lambda body: (200, {"message": "ok"}))
    transfer = NcclTransfer(InferenceServer(fake.url, timeout=10), torch.device("cpu"))
    transfer.connect()
    [info] = [body["init_info"] for body in fake.bodies("/init_weight_transfer_engine")]
    assert base64.b64decode(info.pop("nccl_unique_id_b64")) == bytes(range(128))
    assert info == {"rank_offset": 1, "world_size": 2, "packed": False}
    assert gpu == [("init", 2, bytes(range(128)), 0), ("warm up", torch.Size([1]), ["group"])]
    gpu.clear()
    weights = {"b": torch.ones(2, 3).t(), "a": torch.arange(2), "c": torch.zeros(1, dtype=torch.float16)}
    transfer.send(weights, torch.bfloat16, "9")
    assert fake.paths()[-3:] == ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    [update] = [body["update_info"] for body in fake.bodies("/update_weights")]
    assert update == {
        "names": ["b", "a", "c"],
        "dtype_names": ["bfloat16", "int64", "bfloat16"],
        "shapes": [[3, 2], [2], [1]],
    }
    assert [tuple(sent.shape) for _, sent, _ in gpu] == [(3, 2), (2,), (1,)]
    assert all(sent.is_contiguous() for _, sent, _ in gpu)
    assert [str(sent.dtype).removeprefix("torch.") for _, sent, _ in gpu] == update["dtype_names"]
    assert fake.bodies("/finish_weight_update") == [{"weight_version": "9"}]


def test_a_refused_transfer_does_not_wait_for_nccl(
    fake: FakeVllm, gpu: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's end never joins, so ours would wait for ever."""
    wait = torch.multiprocessing.get_context("fork").Event()
    monkeypatch.setattr(nccl, "init_rank", lambda *_: wait.wait())
    fake.answer_init_weight_transfer_engine = lambda body: (500, {"error": {"message": "not configured"}})  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match="not configured"):
        NcclTransfer(InferenceServer(fake.url, timeout=10), torch.device("cpu")).connect()
    wait.set()


def test_our_end_that_fails_is_told(
    fake: FakeVllm, gpu: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("NCCL Error 5: Duplicate GPU detected")

    monkeypatch.setattr(nccl, "init_rank", fail)
    fake.answer_init_weight_transfer_engine = lambda body: (200, {})  # type: ignore[attr-defined]
    with pytest.raises(RefusedError, match="Duplicate GPU detected"):
        NcclTransfer(InferenceServer(fake.url, timeout=10), torch.device("cpu")).connect()
