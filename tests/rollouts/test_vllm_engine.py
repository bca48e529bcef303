"""Training on responses that a vLLM server writes: weights arrive, ids stay ids, failures are named and saved."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.generation.noise import NoiseKey
from deltakd.io.errors import ConfigError, LostServerError, ServerError
from deltakd.io.run_directory import RunDirectory
from deltakd.rollouts.vllm_server import seed_of
from deltakd.training.run import run_training
from tests.distributed.processes import on_ranks
from tests.rollouts.fake_vllm import FakeVllm, serving
from tests.tiny import World, save_model

Train = Callable[..., RunDirectory]


@pytest.fixture
def fake(world: World) -> Iterator[FakeVllm]:
    with serving(world.root / "student_raw") as server:
        yield server


@pytest.fixture(scope="session")
def sharp(world: World) -> list[str]:
    """A teacher that is far from uniform, so that the student moves far in a few steps."""
    path = save_model(world.root / "sharp_teacher", seed=3, width=24, initializer_range=0.4)
    return [f"model.teacher.path={path}"]


def on_server(fake: FakeVllm, *more: str) -> list[str]:
    return [
        "rollout=student",
        "rollout.engine=vllm",
        f"rollout.vllm.url={fake.url}",
        "rollout.vllm.wait=0",
        "trainer.max_steps=4",
        "rollout.decoding.max_new_tokens=6",
        "data.val=null",
        *more,
    ]


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_the_server_answers_with_the_weights_of_each_step(
    train: Train, fake: FakeVllm, sharp: list[str], world: World
) -> None:
    """At a large learning rate the gap stays at rounding, and the weights that the server has are no longer its own."""
    run = train("kd_reverse", *on_server(fake, *sharp, "optim.lr=0.05"))
    assert len(column(run.path, "rollout/logprob_gap")) == 4
    assert max(column(run.path, "rollout/logprob_gap")) < 1e-5
    first: Any = AutoModelForCausalLM.from_pretrained(world.root / "student_raw")
    moved = fake.model.transformer.wte.weight - first.transformer.wte.weight
    assert moved.abs().max() > 0.02
    assert fake.paths().count("/collective_rpc") == fake.paths().count("/reset_prefix_cache") == 4
    assert not (run.path / "server_weights").exists()


def test_a_server_that_keeps_its_old_weights_stops_the_run_with_its_state_saved(
    train: Train, fake: FakeVllm, sharp: list[str], tmp_path: Path
) -> None:
    fake.loads_weights = False
    with pytest.raises(ServerError, match=r"rollout/logprob_gap is .* above rollout\.vllm\.max_logprob_gap=0\.01"):
        train("kd_reverse", *on_server(fake, *sharp, "optim.lr=0.05", "rollout.vllm.max_logprob_gap=0.01"))
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] >= 1


def test_tokens_go_and_come_as_ids_with_every_option_named(train: Train, fake: FakeVllm) -> None:
    train("sft", *on_server(fake, "rollout.decoding.temperature=0.7", "rollout.decoding.top_p=0.9"))
    bodies = fake.bodies("/v1/completions")
    assert len(bodies) == 4 * 4
    for body in bodies:
        assert all(isinstance(token, int) for token in body["prompt"])
        assert body["max_tokens"] == 6
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.7, 0.9, 0, 0.0)
        assert body["repetition_penalty"] == 1.0
        assert body["ignore_eos"] is True
        assert body["stop_token_ids"] == [fake.tokenizer.eos_token_id]
        assert body["return_token_ids"] is True
    assert len({body["seed"] for body in bodies}) == len(bodies)


def test_seeds_belong_to_seed_row_step_and_response() -> None:
    keys = [NoiseKey(*each) for each in ((1, 0, 1, 0), (2, 0, 1, 0), (1, 1, 1, 0), (1, 0, 2, 0), (1, 0, 1, 1))]
    seeds = [seed_of(key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [seed_of(key) for key in keys]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_what_the_server_wrote_is_what_is_trained_on(train: Train, fake: FakeVllm) -> None:
    run = train("sft", *on_server(fake, "trainer.max_steps=1", "rollout.batch_size=1", "trainer.val_every_n_steps=1"))
    records = [json.loads(line) for line in (run.path / "rollouts" / "step_00000001.jsonl").read_text().splitlines()]
    asked = [fake.tokenizer.decode(body["prompt"]) for body in fake.bodies("/v1/completions")]
    assert [record["prompt"] for record in records] == asked


def test_a_server_with_sleep_mode_sleeps_while_the_student_trains(train: Train, fake: FakeVllm) -> None:
    fake.model_config["enable_sleep_mode"] = True
    train("sft", *on_server(fake, "trainer.max_steps=2", "rollout.batch_size=1"))
    steps = [
        f"{path}:{query.get('tags', query.get('level', ['']))[0]}"
        for path, query, _ in fake.asked
        if path in ("/wake_up", "/collective_rpc", "/reset_prefix_cache", "/sleep", "/v1/completions")
    ]
    round_ = ["/wake_up:weights", "/collective_rpc:", "/wake_up:kv_cache", "/reset_prefix_cache:"]
    round_ += ["/v1/completions:"] * 4 + ["/sleep:2"]
    # Asleep from the start: the models are loaded next.
    assert steps == ["/sleep:2", *round_, *round_]


def test_an_adapter_is_sent_merged(train: Train, fake: FakeVllm, sharp: list[str]) -> None:
    adapter = ("model.lora={r: 4, alpha: 8, target_modules: all-linear}", "optim.lr=0.05")
    run = train("kd_reverse", *on_server(fake, *sharp, *adapter))
    assert max(column(run.path, "rollout/logprob_gap")) < 1e-5
    exported = load_file(run.student / "model.safetensors")
    served = fake.model.state_dict()
    assert not any("lora" in name for name in served)
    # The server has the weights of the last round, one step before the student's last.
    name = "transformer.h.0.attn.c_attn.weight"
    raw = load_file(Path(fake.path) / "model.safetensors")[name]
    assert 0 < (exported[name] - served[name]).abs().max() < (exported[name] - raw).abs().max()


def test_a_server_that_comes_back_gets_the_weights_again_and_writes_the_same_responses(
    train: Train, fake: FakeVllm, sharp: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It dies in the middle of the third round, and starts again with its first weights; the run is the same."""
    whole = train("kd_reverse", *on_server(fake, *sharp, "optim.lr=0.05"), name="whole")
    first = {
        name: value.clone() for name, value in AutoModelForCausalLM.from_pretrained(fake.path).state_dict().items()
    }

    def die(number: int) -> None:
        if number == 16 + 10:
            fake.model.load_state_dict(first)
            fake.version = "default"
            raise ConnectionResetError

    fake.before = die
    parts = train("kd_reverse", *on_server(fake, *sharp, "optim.lr=0.05", "rollout.vllm.wait=30"), name="parts")
    assert column(parts.path, "train/loss") == column(whole.path, "train/loss")
    assert "of 4 responses of the round were there. Waiting for it (rollout.vllm.wait=30 s)" in caplog.text


def test_a_prefix_cache_that_is_not_emptied_is_waited_for(
    train: Train, fake: FakeVllm, sharp: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    fake.busy_resets = 1
    train("kd_reverse", *on_server(fake, *sharp, "trainer.max_steps=1", "rollout.vllm.wait=30"))
    assert "did not empty its prefix cache" in caplog.text
    assert fake.paths().count("/reset_prefix_cache") == 2


def test_a_server_that_stays_away_is_named_and_the_run_goes_on_from_there(
    train: Train, fake: FakeVllm, sharp: list[str], tmp_path: Path
) -> None:
    whole = train("kd_reverse", *on_server(fake, *sharp, "optim.lr=0.05"), name="whole")

    def die(number: int) -> None:
        if number >= 16 + 10:
            raise ConnectionResetError

    fake.before = die
    with pytest.raises(LostServerError, match=f"the server {fake.url} can't be reached .* did not come back within"):
        train("kd_reverse", *on_server(fake, *sharp, "optim.lr=0.05"), name="parts")
    saved = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    fake.before = lambda number: None
    parts = train("kd_reverse", *on_server(fake, *sharp, "optim.lr=0.05", "resume=true"), name="parts")
    assert column(parts.path, "train/loss") == column(whole.path, "train/loss")


def test_a_server_whose_weights_another_run_replaces_is_noticed(train: Train, fake: FakeVllm) -> None:
    def replace(number: int) -> None:
        fake.version = "of another run"

    fake.before = replace
    with pytest.raises(LostServerError, match="has other weights than it was given"):
        train("sft", *on_server(fake))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {"choices": [{"text": "x"}]}), "answers in another format"),
        ((400, {"error": {"message": "no logprobs here"}}), "status 400: no logprobs here"),
        ((500, {"error": {"message": "EngineCore encountered an issue."}}), "EngineCore encountered an issue"),
    ],
)
def test_answers_that_are_none_stop_the_run(train: Train, fake: FakeVllm, answer: Any, said: str) -> None:
    fake.before = lambda number: answer
    with pytest.raises(ServerError, match=said):
        train("sft", *on_server(fake))


def test_log_probs_of_the_server_weigh_later_steps_of_a_round(train: Train, fake: FakeVllm, sharp: list[str]) -> None:
    run = train("opd", *on_server(fake, *sharp, "rollout.every=2"))
    assert len(fake.bodies("/collective_rpc")) == 2
    assert np.isfinite(column(run.path, "train/loss")).all()


def refusal(train: Train, fake: FakeVllm, *options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        train("sft", *on_server(fake, *options))
    assert "/collective_rpc" not in fake.paths()
    return str(caught.value)


def test_a_server_that_is_not_there_is_said_before_anything_is_loaded(train: Train, fake: FakeVllm) -> None:
    fake.close()
    said = refusal(train, fake)
    assert f"the server {fake.url} can't be reached" in said
    assert "start it: VLLM_SERVER_DEV_MODE=1 vllm serve" in said


def test_a_server_that_does_not_fit_is_refused_by_name(train: Train, fake: FakeVllm, world: World) -> None:
    fake.path = str(world.root / "teacher")
    fake.longest = 64
    fake.tokenizer = type("Other", (), {"__call__": lambda self, text, **_: {"input_ids": [1, 2, 3]}})()
    fake.model_config["logprobs_mode"] = "processed_logprobs"
    fake.worker = "vllm.v1.worker.cpu_worker.CPUWorker"
    said = refusal(train, fake, "rollout.vllm.transfer=nccl")
    assert "hidden_size 24 there, 16 here" in said
    assert "has another tokenizer: it cuts a probe text into 3 tokens" in said
    assert "holds 64 tokens of prompt and response together, and data.max_length is 120" in said
    assert "start it without --logprobs-mode" in said
    assert "was started without it; start it with --weight-transfer-config" in said
    assert "packs the output embedding once" in said


def test_a_server_without_development_routes_is_refused(train: Train, fake: FakeVllm) -> None:
    fake.development = False
    assert "has no development routes" in refusal(train, fake)


def test_another_model_name_is_refused_with_those_that_are_served(train: Train, fake: FakeVllm) -> None:
    said = refusal(train, fake, "rollout.vllm.model=llama")
    assert f"rollout.vllm.model is 'llama', and the server {fake.url} serves served" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("rollout.vllm.url=null",), "rollout.vllm.url is null; it must be the address of a server"),
        (("rollout.vllm.url=localhost:8000",), "rollout.vllm.url is 'localhost:8000'"),
        (("rollout.vllm.weights_dir=here",), "it must be an absolute path"),
        (("rollout.decoding.no_repeat_ngram_size=3",), "vLLM knows no ban of n-grams"),
        (("rollout.source=mixture",), "a vLLM server holds one model"),
        (("rollout.vllm.wait=-1",), "rollout.vllm.wait is -1"),
        (("rollout.vllm.transfer=ray",), "rollout.vllm.transfer is 'ray'"),
        (("rollout.engine=sglang",), "rollout.engine is 'sglang'"),
        (("+model.student.quantization={load_in_4bit: true}",), "the server would answer with another student"),
    ],
)
def test_what_the_config_shows_is_said_without_a_server(
    world: World, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    chosen = ("rollout=student", "rollout.engine=vllm", "rollout.vllm.url=http://127.0.0.1:1", *options)
    with pytest.raises(ConfigError) as caught:
        make_settings(compose_config("train", world.overrides(tmp_path / "run", "sft", *chosen)))
    assert said in str(caught.value)


def _run(overrides: list[str], directory: Path) -> str:
    try:
        run_training(make_settings(compose_config("train", overrides)), directory)
    except LostServerError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "deepspeed_zero3"])
def test_two_processes_get_the_responses_of_one(
    fake: FakeVllm, sharp: list[str], world: World, tmp_path: Path, strategy: str
) -> None:
    """And when the server is gone, both stop with one saved state."""
    student = save_model(tmp_path / "plain", seed=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    common = on_server(fake, *sharp, f"model.student.path={student}", "optim.lr=0.001", "optim.eps=1e-4")
    common += ["trainer.accelerator=cpu", "trainer.max_steps=4"]
    runs = {}
    for ranks, chosen in ((1, []), (2, [f"strategy={strategy}"])):
        runs[ranks] = tmp_path / str(ranks)
        sizes = [f"trainer.devices={ranks}", f"data.batch_size={8 // ranks}"]
        overrides = world.overrides(runs[ranks], "kd_reverse", *common, *sizes, *chosen)
        assert on_ranks(ranks, _run, overrides, runs[ranks]) == [""] * ranks
    for name in ("train/loss", "rollout/response_length"):
        assert column(runs[2], name) == pytest.approx(column(runs[1], name), rel=1e-5)
    assert max(column(runs[2], "rollout/logprob_gap")) < 1e-5

    def die(number: int) -> None:
        if number >= 2 * 4 * 8 + 2 * 8 + 3:
            raise ConnectionResetError

    fake.before = die
    gone = tmp_path / "gone"
    sizes = ["trainer.devices=2", "data.batch_size=4", f"strategy={strategy}"]
    said = on_ranks(2, _run, world.overrides(gone, "kd_reverse", *common, *sizes), gone)
    assert all("did not come back within rollout.vllm.wait=0 s" in one for one in said)
    assert (gone / "checkpoints" / "last.ckpt").exists()
