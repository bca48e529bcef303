"""Sampling from a mixture of two models, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltakd.generation import Decoding
from deltakd.generation.generator import Sampled, sample
from deltakd.generation.model_step import Mixture, mixed_log_probs
from deltakd.generation.noise import NoiseKey

from .tiny_models import PAD, make_model

PROMPTS = [[4, 5, 6], [7], [8, 9, 10, 11, 12], [5, 5]]


def drawn(
    mixture: Mixture | None, own: torch.nn.Module, batch_size: int = 8, answers: int = 3, **options: object
) -> list[list[Sampled]]:
    keys = [[NoiseKey(1, row, 0, number) for number in range(answers)] for row in range(len(PROMPTS))]
    decoding = Decoding(max_new_tokens=7, **options)  # type: ignore[arg-type]
    return sample(
        own, PROMPTS, keys, decoding=decoding, batch_size=batch_size, eos_ids=frozenset({1}), vocab_size=24,
        pad_id=PAD, mixture=mixture,
    )  # fmt: skip


def two_models(*families: str) -> list[PreTrainedModel]:
    """Models that are far from uniform, and from each other."""
    made = [make_model(family, vocab=24).eval() for family in families]
    for model in made:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(8)
    return made


def probabilities(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1, :24].double().softmax(-1)


@pytest.mark.parametrize("families", [("gpt2", "llama"), ("llama", "gemma2")])
def test_a_batch_of_any_size_gives_the_same_samples(families: tuple[str, str]) -> None:
    own, other = two_models(*families)
    mixture = Mixture(other, 0.4)
    whole = drawn(mixture, own)
    for batch_size in (1, 3, 5):
        assert drawn(mixture, own, batch_size) == whole
    assert whole != drawn(None, own)


def test_a_model_mixed_with_itself_is_itself() -> None:
    own = make_model("gpt2", vocab=24).eval()
    assert drawn(Mixture(own, 0.3), own) == drawn(None, own)


def test_greedy_decoding_takes_the_likeliest_token_of_the_mixture() -> None:
    own, other = two_models("gpt2", "llama")
    found = drawn(Mixture(other, 0.45), own, answers=1, do_sample=False)
    for prompt, (answer,) in zip(PROMPTS, found, strict=True):
        for place, token in enumerate(answer.tokens):
            text = [*prompt, *answer.tokens[:place]]
            mixed = 0.55 * probabilities(own, text) + 0.45 * probabilities(other, text)
            assert token == int(mixed.argmax())


def test_tokens_come_with_the_probabilities_of_the_mixture() -> None:
    own, other = two_models("gpt2", "llama")
    count = 4000
    keys = [[NoiseKey(1, 0, 0, number) for number in range(count)]]
    (answers,) = sample(
        own, PROMPTS[:1], keys, decoding=Decoding(max_new_tokens=1), batch_size=count, eos_ids=frozenset(),
        vocab_size=24, pad_id=PAD, mixture=Mixture(other, 0.3),
    )  # fmt: skip
    found = np.bincount([answer.tokens[0] for answer in answers], minlength=24)
    expected = count * (0.7 * probabilities(own, PROMPTS[0]) + 0.3 * probabilities(other, PROMPTS[0])).numpy()
    frequent = expected > 5
    chi_square = float(((found - expected)[frequent] ** 2 / expected[frequent]).sum())
    # 23 degrees of freedom at most: a value above 50 has a probability below 0.001.
    assert chi_square < 50
    for alone in (own, other):
        wrong = count * probabilities(alone, PROMPTS[0]).numpy()
        assert float(((found - wrong)[frequent] ** 2 / wrong[frequent]).sum()) > 100


def test_log_probs_of_a_mixture_against_numpy() -> None:
    own, other = (torch.randn(6, dtype=torch.float64).log_softmax(-1) for _ in "ab")
    own[2], other[2], other[3] = -torch.inf, -torch.inf, -torch.inf
    with np.errstate(divide="ignore"):
        expected = np.log(0.8 * np.exp(own.numpy()) + 0.2 * np.exp(other.numpy()))
    np.testing.assert_allclose(mixed_log_probs(own, other, 0.2).numpy(), expected, rtol=1e-12)
