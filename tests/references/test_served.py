"""A cache filled by a server's log-probs: the same numbers as from the loaded teacher, and what is refused."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deltakd.cache import make_cache
from deltakd.config.build import make_settings
from deltakd.config.compose import compose_config
from deltakd.io.errors import ConfigError, LostServerError, ServerError
from deltakd.references.store import MANIFEST, CacheStore
from deltakd.training.run import run_training
from tests.rollouts.fake_vllm import FakeSglang, FakeVllm, serving
from tests.rollouts.vllm_process import vllm_server
from tests.tiny import World, save_model

STORE = ("reference.store=topk", "reference.k=16", "reference.dtype=float32")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Far from uniform, so that errors would show."""
    return save_model(tmp_path_factory.mktemp("served") / "teacher", seed=3, width=24, initializer_range=0.4)


@pytest.fixture
def fake(teacher: Path) -> Iterator[FakeVllm]:
    with serving(teacher) as server:
        server.longest = 200
        yield server


def cache_of(world: World, path: Path, url: str, *more: str, loss: str = "kd") -> dict[str, Any]:
    chosen = [f"reference.path={path}", f"reference.url={url}", *STORE, "data.limit=12", *more]
    return make_cache([o for o in world.overrides(path, loss, *chosen) if not o.startswith("model.teacher")])


def shards(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("shard_*.safetensors")):
        found |= {f"{file.name}.{name}": value for name, value in load_file(file).items()}
    return found


def test_a_served_teacher_fills_the_cache_that_the_loaded_one_fills(
    world: World, fake: FakeVllm, teacher: Path, tmp_path: Path
) -> None:
    """Row for row and token for token; only the order of a support's tokens of equal probability is free."""
    summary = cache_of(world, tmp_path / "served", fake.url)
    loaded = [f"model.teacher.path={teacher}", f"reference.path={tmp_path / 'loaded'}", *STORE, "data.limit=12"]
    make_cache(world.overrides(tmp_path / "loaded", "kd", *loaded))
    served, own = shards(tmp_path / "served"), shards(tmp_path / "loaded")
    assert served.keys() == own.keys()
    for name, value in own.items():
        if name.endswith((".teacher", ".support")):
            torch.testing.assert_close(served[name].double(), value.double(), rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(served[name], value)
    assert summary["k"] == 16
    assert summary["models"]["teacher"]["elsewhere"] == "served"


def test_a_training_reads_it_as_any_cache(world: World, fake: FakeVllm, tmp_path: Path) -> None:
    """No teacher is named; and a second call of the cache has nothing left to ask."""
    cache_of(world, tmp_path / "cache", fake.url, "data.limit=40")
    asked = len(fake.bodies("/v1/completions"))
    cache_of(world, tmp_path / "cache", fake.url, "data.limit=40")
    assert len(fake.bodies("/v1/completions")) == asked
    chosen = ("reference=cached", f"reference.path={tmp_path / 'cache'}", "data.limit=40")
    overrides = [o for o in world.overrides(tmp_path / "run", "kd", *chosen) if not o.startswith("model.teacher")]
    run_training(make_settings(compose_config("train", overrides)), tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def changed(change: Callable[[list[Any]], Any]) -> Callable[[list[Any]], list[Any]]:
    """Change a row's entries in place, or replace them."""

    def edited(entries: list[Any]) -> list[Any]:
        return change(entries) or entries

    return edited


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entries: entries[:-1], r"was sent \d+ tokens, and answers \d+ positions"),
        (lambda entries: [None, *entries[1:-1][::-1], entries[-1]], "the positions are shifted"),
        (
            lambda entries: [None, *({**one, "5": {"logprob": 0.5}} for one in entries[1:])],
            "above 0 or not a number: 0.5",
        ),
        (
            lambda entries: [None, *({token: {"logprob": -0.1} for token in one} for one in entries[1:])],
            "the probabilities of 16 tokens add up to",
        ),
        (
            lambda entries: [None, *(dict(list(one.items())[:9]) for one in entries[1:])],
            "9 tokens have log-probs, and reference.k=16 were asked for",
        ),
        (
            lambda entries: [None, *({**one, "300": {"logprob": -1.0}} for one in entries[1:])],
            "token 300 is beyond the tokenizer's 300 tokens",
        ),
        (lambda entries: [None] * len(entries), "no log-probs are there"),
    ],
)
def test_log_probs_that_do_not_fit_are_refused(
    world: World, fake: FakeVllm, tmp_path: Path, change: Callable[[list[Any]], list[Any]], said: str
) -> None:
    fake.edited = change
    with pytest.raises(ServerError, match=said):
        cache_of(world, tmp_path / "cache", fake.url)
    assert not (tmp_path / "cache" / MANIFEST).exists() or not CacheStore.open(tmp_path / "cache").manifest.shards


def test_a_server_that_cuts_log_probs_at_20_says_how_to_start_it(world: World, fake: FakeVllm, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="max allowed: 20; start it with --max-logprobs 64"):
        cache_of(world, tmp_path / "cache", fake.url, "reference.k=64")


def test_a_server_that_is_lost_leaves_whole_shards_and_the_same_command_goes_on(
    world: World, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltakd.references.fill.SHARD_ROWS", 4)

    def die(number: int) -> None:
        if number >= 9:
            raise ConnectionResetError

    fake.before = die
    with pytest.raises(LostServerError, match=f"the server {fake.url} can't be reached"):
        cache_of(world, tmp_path / "cache", fake.url)
    kept = CacheStore.open(tmp_path / "cache").manifest.shards
    assert kept
    fake.before = lambda number: None
    summary = cache_of(world, tmp_path / "cache", fake.url)
    assert summary["rows"] > sum(shard.rows for shard in kept)


@pytest.mark.parametrize(
    ("loss", "options", "said"),
    [
        ("delta_kd", (), "without a raw partner it gives kd, not delta"),
        ("kd", ("reference.store=hidden",), "give reference.store=topk reference.k=20"),
        ("kd", ("reference.k=null",), "give reference.store=topk reference.k=20"),
        (
            "kd",
            ("loss.temperature=2",),
            "loss.temperature is 2, and log-probs of reference.url are those at temperature 1",
        ),
        ("kd", ("reference.raw_url=http://127.0.0.1:2",), "the loss does not read teacher_raw"),
        ("delta_kd", ("reference.raw_url=there",), "reference.raw_url is 'there'; it must be the address of a server"),
        ("delta_kd", ("reference.url=null", "reference.raw_url=http://127.0.0.1:2"), "reference.url is null"),
        ("kd", ("reference.url=there",), "reference.url is 'there'; it must be the address of a server"),
    ],
)
def test_what_a_server_can_not_give_is_said_before_it_is_asked(
    world: World, tmp_path: Path, loss: str, options: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        cache_of(world, tmp_path / "cache", "http://127.0.0.1:1", *options, loss=loss)
    assert said in str(caught.value)


def test_another_tokenizer_or_too_little_room_is_refused(world: World, fake: FakeVllm, tmp_path: Path) -> None:
    fake.longest = 120
    fake.tokenizer = type("Other", (), {"__call__": lambda self, text, **_: {"input_ids": [1, 2, 3]}})()
    with pytest.raises(ValueError, match=r"another tokenizer.*start it with --max-model-len 121"):
        cache_of(world, tmp_path / "cache", fake.url)


def test_a_served_sglang_teacher_fills_the_same_cache_as_vllm(
    world: World, fake: FakeVllm, teacher: Path, tmp_path: Path
) -> None:
    cache_of(world, tmp_path / "vllm", fake.url)
    with serving(teacher, kind=FakeSglang) as sglang:
        sglang.longest = 200
        cache_of(world, tmp_path / "sglang", sglang.url)
        assert "/v1/completions" not in sglang.paths()
        sglang.edited = lambda top: top[:-1]
        with pytest.raises(ServerError, match="they don't belong to the row"):
            cache_of(world, tmp_path / "cut", sglang.url)
        with pytest.raises(ValueError, match=r"reference\.raw_url: SGLang scores one list of tokens at all positions"):
            delta_cache_of(world, tmp_path / "raw", fake.url, sglang.url)
    ours, theirs = shards(tmp_path / "sglang"), shards(tmp_path / "vllm")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].double(), value.double(), rtol=1e-5, atol=1e-5)


def delta_cache_of(world: World, path: Path, url: str, raw_url: str, *more: str) -> dict[str, Any]:
    """Teacher and raw teacher are served; the raw student is loaded."""
    chosen = [f"reference.path={path}", f"reference.url={url}", f"reference.raw_url={raw_url}", *STORE]
    chosen += ["reference.k=8", "data.limit=12", *more]
    return make_cache([o for o in world.overrides(path, "delta_kd", *chosen) if not o.startswith("model.teacher")])


@pytest.fixture
def raw(world: World) -> Iterator[FakeVllm]:
    with serving(world.root / "teacher_raw") as server:
        server.longest = 200
        yield server


def test_a_served_raw_teacher_is_asked_at_the_teachers_tokens_and_gives_delta(
    world: World, fake: FakeVllm, raw: FakeVllm, teacher: Path, tmp_path: Path
) -> None:
    """The oracle: the loaded models' log-probs of the whole vocabulary."""
    delta_cache_of(world, tmp_path / "served", fake.url, raw.url)
    whole = (f"model.teacher.path={teacher}", f"reference.path={tmp_path / 'loaded'}", *STORE, "reference.k=300")
    make_cache(world.overrides(tmp_path / "loaded", "delta_kd", *whole, "data.limit=12"))
    served, own = shards(tmp_path / "served"), shards(tmp_path / "loaded")
    assert served.keys() == own.keys()
    for name, support_NK in served.items():
        if not name.endswith(".support"):
            continue
        shard = name.removesuffix(".support")
        assert torch.equal(served[f"{shard}.row_keys"], own[f"{shard}.row_keys"])
        order_NV = own[name].long().argsort(1)
        for role in ("teacher", "teacher_raw", "student_raw"):
            kept_NK = own[f"{shard}.{role}"].gather(1, order_NV).gather(1, support_NK.long())
            rest_N1 = torch.log1p(-kept_NK.double().exp().sum(1, keepdim=True)).float()
            expected = torch.cat([kept_NK, rest_N1], dim=1)
            torch.testing.assert_close(served[f"{shard}.{role}"], expected, rtol=1e-4, atol=1e-4)
    manifest = CacheStore.open(tmp_path / "served").manifest.content["models"]
    assert manifest["teacher_raw"]["elsewhere"] == "served"
    assert manifest["student_raw"]["sha256"]


def test_a_delta_loss_trains_from_two_servers(world: World, fake: FakeVllm, raw: FakeVllm, tmp_path: Path) -> None:
    delta_cache_of(world, tmp_path / "cache", fake.url, raw.url, "data.limit=40")
    chosen = ("reference=cached", f"reference.path={tmp_path / 'cache'}", "data.limit=40")
    overrides = [o for o in world.overrides(tmp_path / "run", "delta_kd", *chosen) if not o.startswith("model.teacher")]
    run_training(make_settings(compose_config("train", overrides)), tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, {"detail": "Not Found"}), "start it with --enable-scale-out, which needs vLLM 0.32 or newer"),
        (
            (400, {"error": {"message": "prompt_logprob_token_ids requires the V2 model runner", "code": 400}}),
            "load the raw teacher here",
        ),
        (
            (400, {"error": {"message": "which is greater than max allowed: 4", "code": 400}}),
            "start it with --max-logprobs 8",
        ),
        ((200, {"choices": []}), "answers without prompt_token_id_logprobs"),
        ((200, {"prompt_token_id_logprobs": "AAAA"}), "answers without prompt_token_id_logprobs"),
    ],
)
def test_a_raw_server_that_can_not_score_tokens_says_what_to_do(
    world: World, fake: FakeVllm, raw: FakeVllm, tmp_path: Path, answer: Any, said: str
) -> None:
    raw.refuses_to_score = answer
    with pytest.raises(ServerError, match=said):
        delta_cache_of(world, tmp_path / "cache", fake.url, raw.url)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda values: values[:, :-1], "they don't belong to the row"),
        (lambda values: np.where(values < 0, 0.5, values), "a log-prob is above 0 or not a number: 0.5"),
        (lambda values: np.where(values < 0, -0.1, values), "the probabilities of 8 tokens add up to"),
        (lambda values: np.full_like(values, np.nan), "a log-prob is above 0 or not a number: nan"),
    ],
)
def test_scores_that_do_not_fit_are_refused(
    world: World, fake: FakeVllm, raw: FakeVllm, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    raw.scored = change
    with pytest.raises(ServerError, match=said):
        delta_cache_of(world, tmp_path / "cache", fake.url, raw.url)


def test_a_cache_of_one_server_is_not_filled_up_by_another_source(
    world: World, fake: FakeVllm, teacher: Path, tmp_path: Path
) -> None:
    cache_of(world, tmp_path / "cache", fake.url)
    with pytest.raises(ConfigError, match=r"reference\.k is 8, but the cache"):
        cache_of(world, tmp_path / "cache", fake.url, "data.limit=20", "reference.k=8")
    loaded = [f"model.teacher.path={teacher}", f"reference.path={tmp_path / 'loaded'}", *STORE, "data.limit=12"]
    make_cache(world.overrides(tmp_path / "loaded", "kd", *loaded))
    with pytest.raises(ConfigError, match="the source of the teacher's log-probs is served, but the cache"):
        cache_of(world, tmp_path / "loaded", fake.url, "data.limit=20")


@pytest.mark.slow
def test_a_real_vllm_server_gives_the_log_probs_of_the_loaded_teacher(world: World, tmp_path: Path) -> None:
    teacher = save_model(
        tmp_path / "teacher", seed=3, width=64, family="llama", head_dim=32, initializer_range=0.3,
        tie_word_embeddings=False,
    )  # fmt: skip
    options = ("--max-logprobs", "16", "--max-model-len", "128", "--enable-scale-out")
    with vllm_server(teacher, tmp_path / "server.log", *options) as server:
        cache_of(world, tmp_path / "served", server.url)
        with pytest.raises(ServerError, match=r"needs Triton .* or load the raw teacher here"):
            delta_cache_of(world, tmp_path / "delta", server.url, server.url, "data.limit=2")
    loaded = [f"model.teacher.path={teacher}", f"reference.path={tmp_path / 'loaded'}", *STORE, "data.limit=12"]
    make_cache(world.overrides(tmp_path / "loaded", "kd", *loaded))
    served, own = shards(tmp_path / "served"), shards(tmp_path / "loaded")
    assert served.keys() == own.keys()
    for name, value in own.items():
        if name.endswith(".teacher"):
            torch.testing.assert_close(served[name], value, rtol=1e-3, atol=1e-3)
