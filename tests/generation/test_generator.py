from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from deltakd.generation import Decoding, generate, generator

from .tiny_models import EOS, FAMILIES, PAD, POSITIONS, VOCAB, make_model, make_prompts

PROMPTS = make_prompts(9)
ROW_IDS = [100 + 3 * i for i in range(len(PROMPTS))]
GREEDY = Decoding(do_sample=False, max_new_tokens=12)
SAMPLED = Decoding(max_new_tokens=12)


def run_seeds(
    model: nn.Module, prompts: list[list[int]], row_ids: list[int], seeds: list[int], **options: Any
) -> list[list[list[int]]]:
    settings = {
        "decoding": SAMPLED,
        "batch_size": 4,
        "eos_ids": frozenset({EOS}),
        "vocab_size": VOCAB,
        "pad_id": PAD,
        **options,
    }
    return generate(model, prompts, row_ids, seeds=seeds, **settings)


def run(
    model: nn.Module, prompts: list[list[int]], row_ids: list[int], seed: int = 10, **options: Any
) -> list[list[int]]:
    return run_seeds(model, prompts, row_ids, [seed], **options)[0]


def hf_greedy(model: PreTrainedModel, prompt: list[int], **options: Any) -> list[int]:
    """The same by transformers' own loop, a row at a time, so that nothing is padded."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    tokens = out[0, len(prompt) :].tolist()
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family: str) -> None:
    model = make_model(family)
    assert run(model, PROMPTS, ROW_IDS, decoding=GREEDY) == [
        hf_greedy(model, prompt, max_new_tokens=12) for prompt in PROMPTS
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(
    "decoding",
    [GREEDY, SAMPLED, Decoding(temperature=0.8, top_k=20, top_p=0.9, no_repeat_ngram_size=2, max_new_tokens=12)],
    ids=["greedy", "sampled", "warped"],
)
def test_batch_size_order_and_company_change_nothing(family: str, decoding: Decoding) -> None:
    model = make_model(family)
    # Many ends of text, so that rows leave at different times and batches are compacted.
    eos_ids = frozenset(range(1, VOCAB, 12))
    whole = run(model, PROMPTS, ROW_IDS, decoding=decoding, batch_size=8, eos_ids=eos_ids)
    for batch_size in (1, 3):
        assert run(model, PROMPTS, ROW_IDS, decoding=decoding, batch_size=batch_size, eos_ids=eos_ids) == whole
    backwards = run(model, PROMPTS[::-1], ROW_IDS[::-1], decoding=decoding, batch_size=3, eos_ids=eos_ids)
    assert backwards == whole[::-1]
    # Two processes would each take every other row.
    half = run(model, PROMPTS[1::2], ROW_IDS[1::2], decoding=decoding, batch_size=8, eos_ids=eos_ids)
    assert half == whole[1::2]
    assert len({len(answer) for answer in whole}) >= 3


def test_finished_rows_leave_the_batch_and_the_cache() -> None:
    model = make_model("llama")
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    answers = run(model, PROMPTS, ROW_IDS, batch_size=9, eos_ids=frozenset(range(1, VOCAB, 6)))
    assert sizes[0] == 9
    assert sizes[-1] < 5
    assert sum(sizes) < 9 * len(sizes)
    assert len(sizes) == min(12, max(len(answer) for answer in answers) + 1)


def test_a_cache_that_cannot_drop_rows_gives_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt2")
    eos_ids = frozenset(range(1, VOCAB, 6))
    compacted = run(model, PROMPTS, ROW_IDS, batch_size=9, eos_ids=eos_ids)
    monkeypatch.setattr(generator, "can_select", lambda cache: False)
    assert run(model, PROMPTS, ROW_IDS, batch_size=9, eos_ids=eos_ids) == compacted


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_seeds_that_share_a_prompt_answer_as_each_alone(family: str) -> None:
    # Batches smaller and larger than the seeds of a prompt; rows leave at different times, and new prompts take over.
    model = make_model(family)
    options: dict[str, Any] = {
        "eos_ids": frozenset(range(1, VOCAB, 12)),
        "decoding": Decoding(no_repeat_ngram_size=2, max_new_tokens=24),
    }
    seeds = [10, 20, 30]
    alone = [run(model, PROMPTS, ROW_IDS, seed, batch_size=9, **options) for seed in seeds]
    for batch_size in (2, 7):
        assert run_seeds(model, PROMPTS, ROW_IDS, seeds, batch_size=batch_size, **options) == alone


def test_a_prompt_is_run_once_and_the_batch_is_kept_full() -> None:
    model = make_model("llama")
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompts = make_prompts(30, shortest=3)
    answers = run_seeds(
        model, prompts, list(range(30)), [1, 2], batch_size=8, eos_ids=frozenset(range(1, VOCAB, 12)),
        decoding=Decoding(max_new_tokens=24),
    )  # fmt: skip
    assert sum(rows for rows, width in shapes if width > 1) == 30
    steps = [rows for rows, width in shapes if width == 1]
    assert max(steps) == 8
    # Every token but the first comes of a step, and so does the end of an answer.
    taken = sum(min(len(tokens), 23) for of_seed in answers for tokens in of_seed)
    assert taken > 0.75 * sum(steps)


def test_seeds_and_rows_differ() -> None:
    model = make_model("gpt2")
    same_prompt = [PROMPTS[0]] * 4
    first = run(model, same_prompt, [0, 1, 2, 3])
    assert len({tuple(answer) for answer in first}) == 4
    assert run(model, same_prompt, [0, 1, 2, 3], seed=11) != first
    assert run(model, same_prompt, [0, 1, 2, 3]) == first


def test_eos_ends_an_answer_and_is_removed() -> None:
    model = make_model("llama")
    free = run(model, PROMPTS[:1], [0], decoding=GREEDY, eos_ids=frozenset())[0]
    assert len(free) == 12
    stop = free[5]
    cut = run(model, PROMPTS[:1], [0], decoding=GREEDY, eos_ids=frozenset({stop}))[0]
    assert cut == free[: free.index(stop)]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_stop_at_the_last_position(family: str) -> None:
    model = make_model(family)
    long, short = list(range(2, 2 + POSITIONS - 5)), [5, 6, 7]
    # The long row ends after 5 tokens while the short ones keep the batch going past it.
    answers = run(
        model,
        [short, long, short],
        [0, 1, 2],
        decoding=Decoding(do_sample=False, max_new_tokens=20),
        eos_ids=frozenset(),
        batch_size=3,
    )
    assert [len(answer) for answer in answers] == [20, 5, 20]
    assert answers[0] == answers[2]


def test_prompts_that_cannot_be_continued_are_named() -> None:
    model = make_model("gpt2")
    with pytest.raises(ValueError, match="row 8 is empty"):
        run(model, [[5], []], [7, 8])
    with pytest.raises(ValueError, match="row 8 has 64 tokens, and the model has 64 positions"):
        run(model, [[5], [5] * POSITIONS], [7, 8])
    with pytest.raises(ValueError, match="2 prompts came with 1 row ids"):
        run(model, [[5], [6]], [7])
    with pytest.raises(ValueError, match="Row id -1"):
        run(model, [[5]], [-1])


def test_bad_options_are_reported_together() -> None:
    bad = Decoding(temperature=-1.0)
    with pytest.raises(ValueError, match=r"(?s)temperature is -1.0.*batch_size is 0.*seed is -3"):
        run(make_model("gpt2"), [[5]], [0], decoding=bad, batch_size=0, seed=-3)


def test_every_module_gets_its_own_training_mode_back() -> None:
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = run(model, PROMPTS, ROW_IDS)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert run(model, PROMPTS, ROW_IDS) == expected
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_logits_beyond_the_vocabulary_are_never_chosen() -> None:
    model = make_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[60:] *= 50
    answers = run(model, PROMPTS, ROW_IDS, vocab_size=60)
    assert max(token for answer in answers for token in answer) < 60
    with pytest.raises(ValueError, match="120 logits and the tokenizer 121 tokens"):
        run(model, PROMPTS, ROW_IDS, vocab_size=121)


def test_nan_logits_are_an_error_and_not_an_answer() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="NaN for row 5 after 0 new tokens"):
        run(model, [[3, 4]], [5])


def test_ngrams_count_the_prompt_but_not_the_padding() -> None:
    # With zero weights all logits are equal, and greedy decoding takes the lowest id that is not banned.
    model = make_model("gpt2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    decoding = Decoding(do_sample=False, no_repeat_ngram_size=2, max_new_tokens=4)
    prompts = [[9, 0, 0, 8, 0, 7, 6, 5], [0]]
    long, short = run(model, prompts, [0, 1], decoding=decoding, eos_ids=frozenset())
    assert long[0] == 0
    assert long[1] == 1  # (0, 0) is in the prompt
    assert short == [0, 1, 0, 2]  # pad id 0 fills the left, but (0, 0) first occurs in the answer
    for prompt, answer in zip(prompts, (long, short), strict=True):
        alone = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=4,
            no_repeat_ngram_size=2, eos_token_id=None,
        )  # fmt: skip
        assert alone[0, len(prompt) :].tolist() == answer


def test_progress_counts_finished_prompts() -> None:
    seen: list[int] = []
    run(make_model("gpt2"), PROMPTS, ROW_IDS, progress=seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == 9
    seen.clear()
    run_seeds(make_model("gpt2"), PROMPTS, ROW_IDS, [1, 2, 3], decoding=GREEDY, progress=seen.append)
    assert seen[-1] == 27


def test_no_prompts_give_no_answers() -> None:
    assert run(make_model("gpt2"), [], []) == []


def test_a_model_wrapped_by_peft_answers_like_the_model_inside() -> None:
    import peft

    model = make_model("gpt2")
    expected = run(model, PROMPTS, ROW_IDS)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert run(wrapped, PROMPTS, ROW_IDS) == expected


def test_half_precision_models_answer_too() -> None:
    answers = run(make_model("llama").to(torch.bfloat16), PROMPTS, ROW_IDS, eos_ids=frozenset())
    assert [len(answer) for answer in answers] == [12] * len(PROMPTS)
