"""Architectures beyond attention: state-space models and hybrids work or are refused by name; mixtures of experts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltakd.data import Encoded, collate
from deltakd.generation import Decoding, generate
from deltakd.io.run_directory import RunDirectory
from deltakd.kernels import chunked_loss
from deltakd.losses import SupervisedFineTuning
from deltakd.models import LanguageModel, LoraSpec
from deltakd.models.experts import balance_warning
from deltakd.models.lora import add_lora, merged
from deltakd.models.recurrence import check_recurrence
from tests.tiny import save_model

V = 40
_BASE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "head_dim": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA2 = {"n_groups": 1, "chunk_size": 8}
KINDS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "expand": 2, **_MAMBA2},
    "falcon_mamba": {"state_size": 4},
    "jamba": {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
              "expert_layer_period": 2, "use_mamba_kernels": False},
    "zamba2": {"mamba_d_state": 4, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "chunk_size": 8,
               "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
               "num_mem_blocks": 1, "adapter_rank": 4, "attention_head_dim": 16, "use_mamba_kernels": False},
    "bamba": {"mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
              "attn_layer_indices": [1]},
    "nemotron_h": {"ssm_state_size": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, **_MAMBA2,
                   "layers_block_type": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 32},
    "qwen3_next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, **_HYBRID,
                   "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
                   "shared_expert_intermediate_size": 8},
}  # fmt: skip
ROWS = [[7, 3, 9], [5, 6, 2, 8, 11, 30, 4, 12, 13], [20, 21, 22, 23, 24]]


def build(kind: str, **options: Any) -> Any:
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Libraries warn of fast kernels that are not installed.
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **(_BASE | KINDS.get(kind, {}) | options))
        model = AutoModelForCausalLM.from_config(config).eval()
    # At their initial size a tiny model's layers hardly change the embedding.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(2.0)
    return model


def loss_and_gradients(model: LanguageModel, rows: list[list[int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    examples = [Encoded(row, [-100, *row[1:]], i) for i, row in enumerate(rows)]
    batch = collate(examples, 1, 0, 0)
    model.zero_grad()
    total, _ = chunked_loss(SupervisedFineTuning(), {"student": model(batch)}, batch.labels_N)
    total.backward()
    return total.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrent_model_trains_and_answers_in_padded_batches(kind: str) -> None:
    """The summed loss and its gradients are those of the rows alone, and so are greedy answers."""
    hf = build(kind)
    model = LanguageModel(hf, V)
    assert model.keeps_a_state
    check_recurrence("student", model)
    model.train()
    together, gradients = loss_and_gradients(model, ROWS)
    alone = [loss_and_gradients(model, [row]) for row in ROWS]
    torch.testing.assert_close(together, sum(total for total, _ in alone), rtol=1e-5, atol=1e-4)
    for name, gradient in gradients.items():
        expected = sum(found.get(name, torch.zeros_like(gradient)) for _, found in alone)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)

    options: Any = {"decoding": Decoding(do_sample=False, max_new_tokens=6), "seeds": [0], "eos_ids": frozenset()}
    answers = generate(hf, ROWS, [0, 1, 2], batch_size=3, vocab_size=V, pad_id=0, **options)[0]
    model.eval()
    for prompt, answer in zip(ROWS, answers, strict=True):
        row = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                row.append(int(hf(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        assert row[len(prompt) :] == answer


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_counts(kind: str) -> None:
    """Each gets a gradient in training, and the merged model says what the adapted one says."""
    adapted = add_lora(build(kind), LoraSpec())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    model = LanguageModel(adapted, V).train()
    _, gradients = loss_and_gradients(model, ROWS)
    experts = {n for n, p in model.named_parameters() if p.requires_grad and ".experts." in n}
    assert {n for n, p in model.named_parameters() if p.requires_grad} - experts <= gradients.keys()
    ids = torch.tensor(ROWS[1:2])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(adapted)(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_would_not_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"would not count: dt_proj \(state-space kernels read its weight past"):
        add_lora(build("mamba"), LoraSpec(target_modules=["in_proj", "dt_proj"]))
    with pytest.raises(ValueError, match=r"q_proj.*its matrix is shared by several layers"):
        add_lora(build("zamba2"), LoraSpec(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("rwkv", {"attention_hidden_size": 32, "context_length": 64}, "takes neither past_key_values nor cache_params"),
        ("recurrent_gemma", {"lru_width": 32, "num_hidden_layers": 3}, "does not return its cache"),
        ("xlstm", {"hidden_size": 128, "num_heads": 4, "num_blocks": 2}, "padding on the left"),
        ("minimax", {"num_local_experts": 2, "block_size": 8, **_HYBRID}, "a step of MiniMaxForCausalLM from its cach"),
    ],
)
def test_a_recurrent_model_that_would_be_wrong_is_refused(kind: str, options: dict[str, Any], reason: str) -> None:
    model = LanguageModel(build(kind, **options), V)
    model.check_head()
    with pytest.raises(ValueError, match=rf"model\.student: .*{reason}.*use another architecture"):
        check_recurrence("student", model)


def test_a_state_space_run_from_start_to_export(train: Callable[..., RunDirectory], tmp_path: Path) -> None:
    """LoRA on a Mamba student, its raw self as a reference, two micro-batches a step, answers, the export's check."""
    sizes: dict[str, Any] = {"family": "mamba", "state_size": 4, "width": 32}
    paths = {role: save_model(tmp_path / role, seed=i, **sizes) for i, role in enumerate(("s", "teacher", "raw"))}
    models = [
        f"model.{r}.path={paths[p]}" for r, p in (("student", "s"), ("teacher", "teacher"), ("teacher_raw", "raw"))
    ]
    more = ["model/lora=default", "trainer.accumulate_grad_batches=2", "evaluation=default", "evaluation.val_limit=3"]
    summary = train("delta_kd", *models, *more, "trainer.max_steps=3").read_summary()
    assert summary["meta"]["steps"] == 3
    assert "val/rougeL" in summary


def test_what_balances_experts_is_named(caplog: pytest.LogCaptureFixture) -> None:
    mixture = AutoConfig.for_model("mixtral", num_local_experts=4, router_aux_loss_coef=0.02)
    assert "mixture of 4 experts" in str(balance_warning(mixture))
    assert "router_aux_loss_coef=0.02" in str(balance_warning(mixture))
    assert "128 experts" in str(balance_warning(AutoConfig.for_model("gpt_oss", num_local_experts=128)))
    assert "256 experts" in str(balance_warning(AutoConfig.for_model("deepseek_v3", n_routed_experts=256)))
    assert balance_warning(AutoConfig.for_model("llama")) is None
    assert balance_warning(AutoConfig.for_model("jamba", num_experts=1)) is None


def test_a_mixture_is_warned_of_in_the_log(
    train: Callable[..., RunDirectory], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_model(tmp_path / "mixture", seed=0, family="mixtral", num_local_experts=2, num_experts_per_tok=1)
    with caplog.at_level(logging.WARNING):
        train("sft", f"model.student.path={path}", "trainer.max_steps=1")
    assert "The student is a mixture of 2 experts" in caplog.text
