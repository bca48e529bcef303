"""Dual-space distillation: a NumPy oracle, chunks, and the projectors that are trained with the student."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.kernels import aligned_loss
from deltakd.losses import DualSpaceDistillation, ForwardKL, ReverseKL
from deltakd.losses.projectors import Projectors
from deltakd.types import AlignedTokens, Alignment, Head
from tests.losses import oracles
from tests.losses import two_tokenizers as two
from tests.losses.two_tokenizers import World, heads, world


def prepared(given: World, alignment: str = "attention", **options: object) -> DualSpaceDistillation:
    loss = DualSpaceDistillation(ForwardKL(), alignment, temperature=1.6, **options)  # type: ignore[arg-type]
    loss.prepare(heads(given), given.tokens.token_map, seed=3)
    return loss


def values(
    loss: DualSpaceDistillation, given: World, size: int = 1000
) -> tuple[Tensor, dict[str, float], list[Tensor]]:
    """The sum, its parts, and the gradients of hidden states, head and projectors."""
    given_heads = heads(given)
    total, parts = aligned_loss(loss, given_heads, given.tokens, size)
    assert loss.trainable is not None
    trained = [given_heads["student"].hidden, given_heads["student"].weight, *loss.trainable.parameters()]
    gradients = torch.autograd.grad(total, trained)
    return total.detach(), {name: float(value) for name, value in parts.items()}, list(gradients)


@pytest.mark.parametrize("seed", range(3))
def test_attention_is_dskd_row_by_row(seed: int) -> None:
    given = world(seed)
    loss = prepared(given, ce_weight=0.2)
    total, parts, _ = values(loss, given)
    assert loss.trainable is not None
    projectors = {name: p.detach().numpy() for name, p in loss.trainable.named_parameters()}
    expected = two.dual_space(given, heads(given), projectors, 1.6)
    ce = oracles.cross_entropy(heads(given)["student"].logits().detach().numpy(), given.labels.numpy()).sum()
    assert parts == pytest.approx({**expected, "ce": ce})
    kept = sum(value for name, value in expected.items() if name != "projected_agreement")
    assert total.item() == pytest.approx(0.2 * ce + 0.8 * kept)


@pytest.mark.parametrize("seed", range(3))
def test_exact_alignment_compares_spans_of_one_token_where_the_teachers_best_token_is_shared(seed: int) -> None:
    given = world(seed)
    loss, given_heads = prepared(given, "exact"), heads(given)
    _, parts, _ = values(loss, given)
    student, teacher = given_heads["student"], given_heads["teacher"]
    assert isinstance(loss.trainable, Projectors)
    shared = dict(
        zip(
            *(t.tolist() for t in (given.tokens.token_map.other_shared, given.tokens.token_map.student_shared)),
            strict=True,
        )
    )
    expected = dict.fromkeys(("projected_ce", "student_space", "teacher_space", "projected_agreement"), 0.0)
    for own, theirs in given.spans:
        if len(own) != 1 or len(theirs) != 1:
            continue
        (i,), (j,) = own, theirs
        z_t = teacher.rows(j, j + 1).logits().detach()
        best = shared.get(int(z_t.argmax()))
        if best is None:
            continue
        of_teacher = replace(student, hidden=loss.trainable.t2s(teacher.hidden[j : j + 1])).logits().detach().numpy()
        of_student = replace(teacher, hidden=loss.trainable.s2t(student.hidden[i : i + 1])).logits().detach().numpy()
        z_s = student.rows(i, i + 1).logits().detach().numpy()
        log = lambda z: oracles.log_softmax(np.asarray(z) / 1.6)  # noqa: E731
        expected["projected_ce"] += float(oracles.cross_entropy(of_teacher, np.array([best]))[0])
        expected["teacher_space"] += float(oracles.forward_kl(log(z_t), log(of_student))[0])
        if int(of_teacher.argmax()) == best:
            expected["projected_agreement"] += 1
            expected["student_space"] += float(oracles.forward_kl(log(of_teacher), log(z_s))[0])
    assert {name: parts[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("alignment", ["attention", "exact"])
@pytest.mark.parametrize("size", [1, 5])
def test_chunks_change_nothing_and_gradients_are_derivatives(alignment: str, size: int) -> None:
    given = world(4)
    loss = prepared(given, alignment)
    total, parts, gradients = values(loss, given)
    again, parts_again, gradients_again = values(loss, given, size)
    torch.testing.assert_close(again, total)
    assert parts_again == pytest.approx(parts)
    for one, two_ in zip(gradients, gradients_again, strict=True):
        torch.testing.assert_close(one, two_)
    # Every projector learns; the agreement and the frozen sides give no gradient, so only projectors are differenced.
    assert loss.trainable is not None
    for number, p in enumerate(loss.trainable.parameters()):
        direction, step = torch.randn_like(p), 1e-6
        sums = []
        for sign in (1, -1):
            moved = copy.deepcopy(loss)
            assert moved.trainable is not None
            with torch.no_grad():
                list(moved.trainable.parameters())[number].add_(sign * step * direction)
                values_at = aligned_loss(moved, heads(given), given.tokens)[1]
            # The projected teacher is detached where the student matches it.
            sums.append(0.5 * (values_at["projected_ce"] + values_at["teacher_space"]))
        slope = (sums[0] - sums[1]) / (2 * step)
        torch.testing.assert_close((gradients[2 + number] * direction).sum(), slope, rtol=1e-5, atol=1e-6)
        assert gradients[2 + number].abs().max() > 0 or alignment == "exact"


def test_a_rows_loss_does_not_depend_on_the_rows_beside_it() -> None:
    given = world(2)
    loss, given_heads = prepared(given), heads(given)
    whole = aligned_loss(loss, given_heads, given.tokens)[0]
    sides = [given.tokens.student, given.tokens.other]
    total = torch.zeros((), dtype=torch.float64)
    for row in range(4):
        own, theirs = (torch.where(side.rows == row)[0] for side in sides)
        cut = [slice(int(side[0]), int(side[-1]) + 1) for side in (own, theirs)]
        tokens = given.tokens.part(*cut)
        assert isinstance(tokens, AlignedTokens)
        assert isinstance(tokens.alignment, Alignment)
        some = {
            role: head.rows(*((cut[1] if role.startswith("teacher") else cut[0]).indices(len(head))[:2]))
            for role, head in given_heads.items()
        }
        tokens = replace(
            tokens,
            student=replace(tokens.student, rows=tokens.student.rows * 0),
            other=replace(tokens.other, rows=tokens.other.rows * 0),
        )
        total = total + aligned_loss(loss, some, tokens)[0]
    torch.testing.assert_close(total, whole)


def test_projectors_depend_on_the_seed_alone() -> None:
    given = heads(world(0))
    one, same, other = (Projectors.made(given["student"], given["teacher"], True, seed) for seed in (5, 5, 6))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.t2s.weight, other.t2s.weight)
    assert one.t2s.weight.shape == (6, 7)
    assert one.query is not None
    assert one.query.weight.shape == (14, 12)
    assert Projectors.made(given["student"], given["teacher"], False, 5).query is None


def test_projectors_from_a_pseudo_inverse_keep_the_logits_of_shared_tokens() -> None:
    """Exactly where the shared tokens' embeddings of one model are a linear map of the other's."""
    given = world(0)
    token_map, given_heads = given.tokens.token_map, heads(given)
    teacher = given_heads["teacher"]
    narrow = torch.randn(9, 5, dtype=torch.float64)
    mixing = torch.randn(5, 7, dtype=torch.float64)
    wide = teacher.weight.clone()
    wide[token_map.other_shared] = narrow[token_map.student_shared] @ mixing
    student = Head(torch.randn(1, 5, dtype=torch.float64), narrow)
    teacher = Head(teacher.hidden, wide)
    projectors = Projectors.made(student, teacher, False, 0)
    projectors.start_from_pseudo_inverse(student, teacher, token_map)
    projected = projectors.to_student(teacher.hidden) @ narrow[token_map.student_shared].T
    torch.testing.assert_close(projected, teacher.hidden @ wide[token_map.other_shared].T, rtol=1e-6, atol=1e-6)
    z = student.hidden @ narrow[token_map.student_shared].T
    expected = torch.linalg.lstsq(wide[token_map.other_shared], z.T, driver="gelsd").solution
    torch.testing.assert_close(projectors.to_teacher(student.hidden), expected.T, rtol=1e-6, atol=1e-6)


def test_at_lambda_1_there_are_no_projectors() -> None:
    given = world(0)
    loss = DualSpaceDistillation(ReverseKL(), ce_weight=1.0)
    assert loss.prepare(heads(given), given.tokens.token_map, 0) is None
    assert loss.requires == frozenset()


def test_settings_out_of_range_are_named() -> None:
    message = r"loss.alignment is 'spans'; allowed: attention, exact; loss.projector_init is 'zeros'.*projector_lr is 0"
    with pytest.raises(ValueError, match=message):
        DualSpaceDistillation(ForwardKL(), "spans", "zeros", 0.0)
