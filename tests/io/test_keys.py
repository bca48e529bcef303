"""What is said of a key at its field is found from there."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

from deltakd.data import InstructionData, TextData
from deltakd.evaluation.settings import EvaluationSettings
from deltakd.io.keys import Cache, Protocol, Resume, keys_with
from deltakd.training.settings import RESUME_POLICY, RunSettings


def test_keys_that_never_stop_a_resumption() -> None:
    assert set(keys_with(RunSettings, Resume.FREE)) == {
        "name", "run_dir", "resume", "logger",
        "trainer.enable_progress_bar", "trainer.log_every_n_steps", "trainer.profiler", "trainer.dry_run",
        "trainer.checkpoint_every_n_steps", "trainer.checkpoint_every_n_minutes",
        "reference.sharding", "reference.verify", "reference.remake", "reference.url", "reference.served_model",
        "reference.raw_url", "reference.served_raw_model", "reference.log_probs", "reference.ahead", "reference.wait_s",
        "reference.transport", "rollout.vllm", "rollout.static_cache",
        "evaluation.allow_overlap", "evaluation.static_cache", "evaluation.measures", "data.preview",
    }  # fmt: skip


def test_keys_that_may_differ_until_a_run_is_finished() -> None:
    assert set(keys_with(RunSettings, Resume.UNFINISHED)) == {
        "data.sets", "data.batch_size", "data.max_tokens_per_batch",
        "trainer.devices", "trainer.num_nodes", "trainer.threads",
        "evaluation.sets", "evaluation.limit", "evaluation.batch_size",
    }  # fmt: skip
    assert RESUME_POLICY.allows("evaluation.limit", finished=False)
    assert not RESUME_POLICY.allows("evaluation.limit", finished=True)
    assert RESUME_POLICY.allows("evaluation.measures.rows", finished=True)
    # Not "name", though it begins so.
    assert not RESUME_POLICY.allows("names", finished=False)
    assert not RESUME_POLICY.allows("optim.lr", finished=False)


def test_what_a_cache_does_not_depend_on() -> None:
    free = {"sets", "limit", "batch_size", "max_tokens_per_batch", "cache_dir", "prepare", "preview", "streaming"}
    free |= {"shuffle_buffer", "packing"}
    for kind in (InstructionData, TextData):
        assert set(keys_with(kind, Cache.FREE)) == free
        assert set(kind(train="x").identity) == {"kind", *(one.name for one in fields(kind))} - free


def test_what_a_protocol_fixes() -> None:
    fixed = {"limit", "seeds", "decoding", "scorer", "rouge_tokenizer", "strip", "template", "max_prompt_length"}
    assert set(keys_with(EvaluationSettings, Protocol.FIXED)) == fixed
    assert fixed < set(get_type_hints(EvaluationSettings))
