"""On-policy losses beside published code: TRL's GKD, G-OPD's actor in verl, MiniLLM's scripts.

Their formulas are written down here again, from the code named at each; where ours differ, the test says in what.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from deltakd.losses import SequenceReverseKL, teacher_target
from deltakd.types import Head, HeadLogits, Loss, TokenFacts
from tests.losses.by_name import loss_named

#: Responses, tokens of the longest, vocabulary.
B, T, V = 4, 6, 9
LENGTHS = torch.tensor([6, 3, 1, 4])
MASK_BT = torch.arange(T) < LENGTHS[:, None]
TOKENS = int(LENGTHS.sum())


def made(seed: int) -> Tensor:
    """Logits [B, T, V] float64."""
    return 2 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER, RAW, EARLIER = (made(seed) for seed in range(4))
LABELS_BT = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(4))
ROWS_N = torch.arange(B)[:, None].expand(B, T)[MASK_BT]


def log_probs(logits: Tensor) -> Tensor:
    """[B, T] nats of the labels."""
    return logits.log_softmax(-1).gather(-1, LABELS_BT[..., None]).squeeze(-1)


def mean_over_tokens(values_BT: Tensor) -> Tensor:
    return (values_BT * MASK_BT).sum() / MASK_BT.sum()


def ours(
    loss: Loss, references: Mapping[str, Tensor], facts: TokenFacts, tokens: int = TOKENS
) -> tuple[Tensor, Tensor]:
    """Value and gradient w.r.t. the student's logits of our loss over the responses, divided by ``tokens``."""
    student = STUDENT.clone().requires_grad_()
    eye = torch.eye(V, dtype=torch.float64)
    heads = {role: Head(logits[MASK_BT], eye) for role, logits in references.items()}
    output = loss(HeadLogits(student[MASK_BT], heads, facts), LABELS_BT[MASK_BT])
    value = output.per_token.sum() / tokens
    return value.detach(), torch.autograd.grad(value, student)[0]


# TRL 1.16: GKDTrainer.generalized_jsd_loss; DistillationTrainer has the same divergence in chunks.


def trl_divergence(student: Tensor, beta: float) -> Tensor:
    """[B, T]: the KL towards the mixture (1 − β) q + β p, weighted β from the teacher and 1 − β from the student."""
    log_q, log_p = student.log_softmax(-1), TEACHER.log_softmax(-1)
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = ((1 - beta) * log_q.exp() + beta * log_p.exp()).log()
    from_teacher, from_student = ((log_a.exp() * (log_a - log_m)).sum(-1) for log_a in (log_p, log_q))
    return beta * from_teacher + (1 - beta) * from_student


@pytest.mark.parametrize("tokens", [TOKENS, 37])
@pytest.mark.parametrize(
    ("beta", "name", "options"),
    [
        (0.0, "kd", {}),
        (1.0, "kd_reverse", {}),
        (0.5, "kd_jsd", {"divergence__beta": 0.5}),
        (0.3, "kd_jsd", {"divergence__beta": 0.3}),
    ],
)
def test_gkd_at_every_beta_is_a_loss_of_ours(beta: float, name: str, options: dict[str, float], tokens: int) -> None:
    """Divided by the step's trained tokens, in TRL ``num_items_in_batch``."""
    student = STUDENT.clone().requires_grad_()
    value = trl_divergence(student, beta)[MASK_BT].sum() / tokens
    (expected,) = torch.autograd.grad(value, student)
    found, gradient = ours(loss_named(name, ce_weight=0.0, **options), {"teacher": TEACHER}, TokenFacts(), tokens)
    torch.testing.assert_close(found, value.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


# G-OPD (github.com/RUCBM/G-OPD): verl/workers/actor/dp_actor.py, single teacher, and verl's clipped policy loss.


def gopd_advantage(log_pi: Tensor, log_p: Tensor, log_r: Tensor, scale: float) -> Tensor:
    """Minus the corrected reverse KL; [B, T] for the labels, or [B, T, V] for all tokens."""
    if scale == 1:
        return log_p - log_pi
    return -(log_pi - log_r - scale * (log_p - log_r))


def verl_policy_loss(log_pi_BT: Tensor, sampled_BT: Tensor, advantage_BT: Tensor) -> Tensor:
    """PPO's loss, its gain clipped at 1 ± 0.2; where the advantage is negative, its ratio counts as at most 3."""
    ratio_BT = (log_pi_BT - sampled_BT).clamp(-20, 20).exp()
    loss_BT = torch.maximum(-advantage_BT * ratio_BT, -advantage_BT * ratio_BT.clamp(0.8, 1.2))
    bounded_BT = torch.minimum(loss_BT, -3 * advantage_BT)
    return mean_over_tokens(bounded_BT.where(advantage_BT < 0, loss_BT))


@pytest.mark.parametrize("scale", [1.0, 1.25])
@pytest.mark.parametrize("reference", ["student_raw", "teacher_raw"])
def test_exopd_is_g_opd_minus_the_mean_of_its_advantage(reference: str, scale: float) -> None:
    """On fresh responses; the expected gradients, by enumeration of the labels, are equal."""
    student = STUDENT.clone().requires_grad_()
    log_pi = log_probs(student)
    advantage = gopd_advantage(log_pi.detach(), log_probs(TEACHER), log_probs(RAW), scale)
    (theirs,) = torch.autograd.grad(verl_policy_loss(log_pi, log_pi.detach(), advantage), student, retain_graph=True)
    log_q = STUDENT.log_softmax(-1)
    all_BTV = gopd_advantage(log_q, TEACHER.log_softmax(-1), RAW.log_softmax(-1), scale)
    mean_BT = (log_q.exp() * all_BTV).sum(-1)
    (of_mean,) = torch.autograd.grad(mean_over_tokens(mean_BT * log_pi), student)
    loss = loss_named("exopd", reference=reference, scale=scale)
    _, found = ours(loss, {"teacher": TEACHER, reference: RAW}, TokenFacts())
    torch.testing.assert_close(found, theirs + of_mean, rtol=0, atol=1e-14)
    # E[A ∇log π] with and without the mean: Σ_y q_y A_y (onehot_y − q).
    q_BTV = log_q.exp()
    expected, centred = (
        q_BTV * a_BTV - q_BTV * (q_BTV * a_BTV).sum(-1, keepdim=True)
        for a_BTV in (all_BTV, all_BTV - mean_BT[..., None])
    )
    torch.testing.assert_close(centred, expected, rtol=0, atol=1e-14)


def test_ratios_of_old_responses_are_clipped_as_in_verl_up_to_its_bound_of_three() -> None:
    """With our advantages, which read the student of now where G-OPD's read that of the sampling."""
    log_q = STUDENT.log_softmax(-1)
    all_BTV = gopd_advantage(log_q, TEACHER.log_softmax(-1), RAW.log_softmax(-1), 1.25)
    advantage_BT = log_probs(STUDENT) * 0 + all_BTV.gather(-1, LABELS_BT[..., None]).squeeze(-1)
    advantage_BT -= (log_q.exp() * all_BTV).sum(-1)
    ratio_BT = (log_probs(STUDENT) - log_probs(EARLIER)).exp()
    bounded_BT = MASK_BT & (ratio_BT > 3) & (advantage_BT < 0)
    assert bounded_BT.any()
    assert (MASK_BT & (ratio_BT < 0.8)).any()
    student = STUDENT.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(verl_policy_loss(log_probs(student), log_probs(EARLIER), advantage_BT), student)
    facts = TokenFacts(sampled_log_probs=log_probs(EARLIER)[MASK_BT])
    _, found = ours(loss_named("exopd"), {"teacher": TEACHER, "student_raw": RAW}, facts)
    torch.testing.assert_close(found[~bounded_BT], theirs[~bounded_BT], rtol=0, atol=1e-14)
    # Their gradient vanishes there: the student goes on to prefer what it should avoid. Ours pushes it away.
    assert not theirs[bounded_BT].any()
    assert found[bounded_BT].abs().sum(-1).min() > 1e-6


# MiniLLM (github.com/microsoft/LMOps): minillm/minillm/losses.py and sampler.py.


def minillm_advantages(gamma: float) -> tuple[Tensor, Tensor]:
    """[B, T]: rewards log p − log π, and their sums from each token on, divided by the tokens from there on."""
    rewards_BT = (log_probs(TEACHER) - log_probs(STUDENT)) * MASK_BT
    later_B, sums = torch.zeros(B, dtype=torch.float64), []
    for reward_B in rewards_BT.flip(1).unbind(1):
        later_B = reward_B + gamma * later_B
        sums.append(later_B)
    remaining_BT = (LENGTHS[:, None] - torch.arange(T)).clamp_min(1)
    return rewards_BT, torch.stack(sums[::-1], 1) / remaining_BT


def test_minillm_differs_from_the_authors_scripts_in_a_tokens_own_reward_alone() -> None:
    """At a discount of 1, without standardisation and without the language-modelling loss."""
    rewards_BT, theirs_BT = minillm_advantages(gamma=1.0)
    loss = SequenceReverseKL(teacher_target())
    weights_N = loss.sequence_weights(rewards_BT[MASK_BT], TokenFacts(ROWS_N))
    ours_BT = torch.zeros(B, T, dtype=torch.float64).masked_scatter(MASK_BT, weights_N)
    later_BT = (LENGTHS[:, None] - 1 - torch.arange(T)) * MASK_BT
    expected_BT = (rewards_BT + later_BT * ours_BT) / (later_BT + 1)
    torch.testing.assert_close(theirs_BT * MASK_BT, expected_BT, rtol=0, atol=1e-14)

    student = STUDENT.clone().requires_grad_()
    log_q, log_p = student.log_softmax(-1), TEACHER.log_softmax(-1)
    regulariser = mean_over_tokens((log_q.exp() * (log_q - log_p)).sum(-1))
    policy = -mean_over_tokens(theirs_BT * log_probs(student))
    (theirs,) = torch.autograd.grad(regulariser + policy, student)
    own = mean_over_tokens((theirs_BT - ours_BT) * log_probs(student))
    (of_own,) = torch.autograd.grad(own, student)
    _, found = ours(loss, {"teacher": TEACHER}, TokenFacts(rows=ROWS_N, weights=weights_N))
    torch.testing.assert_close(found, theirs + of_own, rtol=0, atol=1e-14)
