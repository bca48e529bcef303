"""Losses of two tokenizers: NumPy oracles, identities in float64, and what must not matter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from deltakd.kernels.aligned import aligned_loss
from deltakd.losses import (
    Distillation,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SpanDistillation,
    SpanShiftTarget,
    ToDi,
    Treatment,
    UniversalLogitDistillation,
    shift_target,
    teacher_target,
)
from deltakd.losses.carrying import Carrier
from deltakd.losses.uld import by_position
from deltakd.types import AlignedLogits, Loss, TokenMap
from tests.losses import oracles
from tests.losses import two_tokenizers as two
from tests.losses.two_tokenizers import World, equal_tokenizers, heads, world

SEEDS = range(4)
LOSSES: dict[str, Loss] = {
    "uld": UniversalLogitDistillation("span", 1.3, 0.2),
    "uld by position": UniversalLogitDistillation("position"),
    "span_kd": SpanDistillation(ForwardKL(), temperature=1.7, ce_weight=0.3),
    "span_kd last": SpanDistillation(JensenShannon(), "last", 0.6),
    "delta_span": Distillation(SpanShiftTarget(0.7), ForwardKL(), 1.4, 0.3),
    "delta_span treated": Distillation(SpanShiftTarget(1.0, Treatment("teacher_raw", 1.5, 0.05)), ToDi()),
}


def whole(loss: Loss, given: World) -> tuple[Tensor, Tensor]:
    """The sum of a loss and its gradient with respect to the student's logits."""
    logits = AlignedLogits(given.logits, {}, loss.aligned(given.tokens))
    total = loss(logits, given.labels).total
    return total.detach(), torch.autograd.grad(total, given.logits["student"])[0]


def test_the_toy_world_has_spans_of_every_kind() -> None:
    kinds = {(len(own), len(theirs)) for seed in SEEDS for own, theirs in world(seed).spans}
    assert {(1, 1), (1, 2), (2, 1), (2, 2)} <= kinds
    assert any(own > 2 for own, _ in kinds)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_uld_is_the_l1_distance_of_sorted_probabilities(seed: int, tau: float) -> None:
    given = world(seed)
    starts = [(own[0], theirs[0]) for own, theirs in given.spans]
    loss = UniversalLogitDistillation("span", tau, ce_weight=0.0)
    oracles.close(whole(loss, given)[0], np.float64(two.uld(given, starts, tau)))
    rows = [side.rows.tolist() for side in (given.tokens.student, given.tokens.other)]
    places = [[[i for i, row in enumerate(side) if row == b] for b in range(4)] for side in rows]
    positions = [pair for one, other in zip(*places, strict=True) for pair in zip(one, other, strict=False)]
    loss = UniversalLogitDistillation("position", tau, ce_weight=0.0)
    oracles.close(whole(loss, given)[0], np.float64(two.uld(given, positions, tau)))


def unnormalised_kl(log_p: oracles.Array, log_q: oracles.Array) -> oracles.Array:
    return oracles.forward_kl(log_p, log_q) - np.exp(log_p).sum(-1) + np.exp(log_q).sum(-1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("merge", "weight", "tau"), [("first", None, 1.0), ("last", 0.8, 1.5)])
def test_span_kd_is_a_kl_of_shared_tokens_and_the_distance_of_the_rest(
    seed: int, merge: str, weight: float | None, tau: float
) -> None:
    given = world(seed)
    kl, rest = two.span_kd(given, tau, merge, unnormalised_kl)
    w = 6 / 10 if weight is None else weight
    loss = SpanDistillation(ForwardKL(), merge, weight, tau, 0.25, temperature_squared=True)
    ce = oracles.cross_entropy(oracles.arrays(given.logits)["student"], given.labels.numpy()).sum()
    expected = oracles.mixed(ce, np.float64(w * kl + (1 - w) * rest), 0.25, tau, squared=True)
    oracles.close(whole(loss, given)[0], expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("merge", ["first", "last"])
def test_under_a_jsd_span_kd_is_gold(seed: int, merge: str) -> None:
    """GOLD's plain Σ P log(P/M) of probabilities that don't sum to 1: in a JSD what it leaves out cancels."""
    given = world(seed)
    jsd, rest = two.span_kd(given, 1.3, merge, lambda log_p, log_q: oracles.jsd(log_p, log_q, 0.3))
    loss = SpanDistillation(JensenShannon(0.3), merge, temperature=1.3, ce_weight=0.0)
    oracles.close(whole(loss, given)[0], np.float64(0.6 * jsd + 0.4 * rest))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_delta_span_adds_the_carried_shift_to_the_raw_student(seed: int, beta: float) -> None:
    given = world(seed)
    target = SpanShiftTarget(beta)(given.aligned)
    raw = oracles.log_softmax(oracles.arrays(given.logits)["student_raw"])
    expected = raw + beta * two.span_shift(given)
    np.testing.assert_allclose(target.log_softmax(-1).numpy(), oracles.log_softmax(expected), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_shifts_of_a_spans_labels_sum_to_the_shift_of_its_text(seed: int) -> None:
    given = world(seed)
    shift = SpanShiftTarget()(given.aligned) - given.logits["student_raw"].log_softmax(-1)
    on_labels = shift.gather(1, given.labels[:, None])[:, 0]
    teacher, raw = (given.logits[role].log_softmax(-1) for role in ("teacher", "teacher_raw"))
    theirs = (teacher - raw).gather(1, given.tokens.other.labels[:, None])[:, 0]
    for own, other in given.spans:
        # A label that is the whole span also stands for the teachers' longer tokens that begin with it.
        if len(own) > 1 or given.labels[own[0]] not in given.tokens.token_map.student_of_other:
            torch.testing.assert_close(on_labels[own].sum(), theirs[other].sum(), rtol=1e-9, atol=1e-9)
    unaligned = given.tokens.alignment.student_spans < 0
    assert unaligned.any()
    assert shift[unaligned].abs().max() < 1e-12


def test_probabilities_are_carried_whole() -> None:
    carrier = Carrier.of(two.token_map())
    p = torch.randn(5, 10, dtype=torch.float64).softmax(-1)
    carried = carrier.carried(p.log()).exp()
    goes_to = two.token_map().student_of_other
    assert (goes_to < 0).sum() == 1  # "d"
    expected = torch.zeros(5, 9, dtype=torch.float64).index_add(1, goes_to[goes_to >= 0], p[:, goes_to >= 0])
    torch.testing.assert_close(carried, expected)
    torch.testing.assert_close(carried.sum(-1), 1 - p[:, goes_to < 0].sum(-1))


EQUAL = [
    (SpanDistillation(ForwardKL(), temperature=1.7), Distillation(teacher_target(), ForwardKL(), 1.7)),
    (SpanDistillation(ReverseKL(), "last"), Distillation(teacher_target(), ReverseKL())),
    (Distillation(SpanShiftTarget(0.6), ForwardKL(), 2.0), Distillation(shift_target(0.6), ForwardKL(), 2.0)),
    (Distillation(SpanShiftTarget(1.4), ReverseKL()), Distillation(shift_target(1.4), ReverseKL())),
    *(
        (
            Distillation(SpanShiftTarget(0.8, treatment), ToDi()),
            Distillation(shift_target(0.8, treatment), ToDi()),
        )
        for treatment in (
            Treatment("teacher_raw", 1.0),
            Treatment(None, None, 0.1),
            Treatment("teacher", 2.0, 0.2, "student_raw"),
        )
    ),
]


@pytest.mark.parametrize(("loss", "same"), EQUAL)
def test_with_one_tokenizer_span_kd_is_kd_and_delta_span_is_delta_shift(loss: Loss, same: Loss) -> None:
    logits, labels = oracles.draw()
    aligned = equal_tokenizers(logits, labels)
    torch.testing.assert_close(loss(aligned, labels).per_token, same(logits, labels).per_token, rtol=1e-10, atol=1e-12)
    ours, theirs = oracles.gradient(loss, aligned, labels), oracles.gradient(same, logits, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_with_one_tokenizer_a_token_that_a_model_rules_out_gets_no_mass() -> None:
    logits, labels = oracles.draw()
    labels[:] = 3
    logits["teacher_raw"][:, 5] = -torch.inf
    target = SpanShiftTarget(0.6)(equal_tokenizers(logits, labels)).log_softmax(-1)
    torch.testing.assert_close(target, shift_target(0.6)(logits).log_softmax(-1))


@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("delta_span")])
@pytest.mark.parametrize("seed", SEEDS)
def test_labels_that_a_teacher_rules_out_leave_the_target_a_distribution(seed: int, name: str) -> None:
    given, loss = world(seed), LOSSES[name]
    assert isinstance(loss, Distillation)
    labels = given.tokens.other.labels
    for number, role in enumerate(("teacher", "teacher_raw")):
        given.logits[role][number::3, labels[number::3]] = -torch.inf
    target = loss.target(given.aligned)
    assert not target.isnan().any()
    assert torch.isfinite(target.logsumexp(-1)).all()


def test_at_delta_weight_0_delta_span_reads_the_raw_student_alone() -> None:
    loss = Distillation(SpanShiftTarget(0.0), ForwardKL())
    assert loss.requires == {"student_raw"}
    assert not loss.needs_alignment
    assert not loss.needs_whole_vocabulary
    assert loss.fused_form == Distillation(shift_target(0.0), ForwardKL()).fused_form
    logits, labels = oracles.draw()
    same = Distillation(shift_target(0.0), ForwardKL())
    torch.testing.assert_close(loss(logits, labels).per_token, same(logits, labels).per_token)


@pytest.mark.parametrize("seed", SEEDS)
def test_if_fine_tuning_changed_nothing_the_target_is_the_raw_student(seed: int) -> None:
    given = world(seed)
    given.logits["teacher_raw"] = given.logits["teacher"].clone()
    torch.testing.assert_close(
        SpanShiftTarget(1.7)(given.aligned).log_softmax(-1), given.logits["student_raw"].log_softmax(-1)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_a_vocabulary_changes_nothing(name: str) -> None:
    given, loss = world(1), LOSSES[name]
    total, gradient = whole(loss, given)
    own, theirs = torch.randperm(9), torch.randperm(10)

    def moved(ids: Tensor, order: Tensor) -> Tensor:
        return torch.where(ids >= 0, order.argsort()[ids], ids)

    old = given.tokens.token_map
    new = TokenMap(
        moved(old.student_shared, own),
        moved(old.other_shared, theirs),
        moved(old.student_of_other, own)[theirs],
        moved(old.other_of_student, theirs)[own],
    )
    tokens = replace(
        given.tokens,
        student=replace(given.tokens.student, labels=moved(given.tokens.student.labels, own)),
        other=replace(given.tokens.other, labels=moved(given.tokens.other.labels, theirs)),
        token_map=new,
    )
    logits = {
        role: z.detach()[:, theirs if role.startswith("teacher") else own].requires_grad_(role == "student")
        for role, z in given.logits.items()
    }
    again, gradient_again = whole(loss, World(logits, tokens, given.spans))
    torch.testing.assert_close(again, total)
    torch.testing.assert_close(gradient_again, gradient[:, own])


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_derivative_of_the_value_and_reach_the_student_alone(name: str) -> None:
    given, loss = world(2, rows=2, length=5), LOSSES[name]
    tokens = loss.aligned(given.tokens)
    for role, z in given.logits.items():
        z.requires_grad_(role != "student")
    references = {role: z for role, z in given.logits.items() if role != "student"}
    z_student = given.logits["student"].detach().requires_grad_()

    def total(z: Tensor) -> Tensor:
        return loss(AlignedLogits({**references, "student": z}, {}, tokens), given.labels).total

    found = torch.autograd.grad(total(z_student), [z_student, *references.values()], allow_unused=True)
    assert found[1:] == (None, None, None)
    if name != "delta_span treated":  # ToDi detaches a weight, so its value is not what its gradient differentiates
        direction = torch.randn_like(z_student)
        step = 1e-6
        moved = (total(z_student.detach() + step * direction) - total(z_student.detach() - step * direction)) / (
            2 * step
        )
        torch.testing.assert_close((found[0] * direction).sum(), moved, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_size", [1, 4, 1000])
def test_chunks_of_spans_give_the_whole_loss_and_its_gradients(name: str, chunk_size: int) -> None:
    given, loss = world(3), LOSSES[name]
    given_heads = heads(given)
    student = given_heads["student"]
    logits = AlignedLogits({r: h.logits() for r, h in given_heads.items()}, {}, loss.aligned(given.tokens))
    output = loss(logits, given.labels)
    total, parts = aligned_loss(loss, given_heads, given.tokens, chunk_size)
    torch.testing.assert_close(total, output.total)
    assert set(parts) == set(output.parts)
    for part, value in parts.items():
        torch.testing.assert_close(value, output.parts[part].detach().sum())
    ours = torch.autograd.grad(3 * total, [student.hidden, student.weight])
    theirs = torch.autograd.grad(3 * output.total, [student.hidden, student.weight])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    with torch.no_grad():
        torch.testing.assert_close(aligned_loss(loss, given_heads, given.tokens, chunk_size)[0], output.total)


def test_a_chunk_without_tokens_gives_the_student_a_gradient_of_zero() -> None:
    given = world(0, rows=0)
    student = heads(given)["student"]
    total, parts = aligned_loss(LOSSES["span_kd"], {**heads(given), "student": student}, given.tokens)
    assert total == 0
    assert parts == {}
    assert (torch.autograd.grad(total, student.weight)[0] == 0).all()


def test_responses_are_paired_by_position_up_to_the_end_of_the_shorter_one() -> None:
    paired = by_position(torch.tensor([0, 0, 0, 1, 3]), torch.tensor([0, 0, 1, 1, 2, 3]))
    assert paired.student_spans.tolist() == [0, 1, -1, 2, 3]
    assert paired.other_spans.tolist() == [0, 1, 2, -1, -1, 3]


def test_plain_logits_and_heads_of_the_wrong_side_are_refused() -> None:
    logits, labels = oracles.draw()
    with pytest.raises(ValueError, match=r"a loss of two tokenizers reads deltakd\.types\.AlignedLogits"):
        LOSSES["delta_span"](logits, labels)
    given = world(0)
    wrong = heads(given)
    wrong["teacher"] = wrong["student_raw"]
    with pytest.raises(ValueError, match="the head of teacher is over 77 tokens; its side has"):
        aligned_loss(LOSSES["span_kd"], wrong, given.tokens)
    with pytest.raises(ValueError, match=r"needs heads for \['teacher_raw'\]"):
        aligned_loss(LOSSES["delta_span"], {k: v for k, v in heads(given).items() if k != "teacher_raw"}, given.tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniversalLogitDistillation("bytes"), "loss.pairing is 'bytes'; allowed: position, span"),
        (lambda: SpanDistillation(ForwardKL(), "middle", 2.0), r"loss.merge is 'middle'; .*loss.shared_weight is 2.0"),
        (lambda: SpanShiftTarget(1.0, Treatment("teacher_2")), "reads teacher_2; allowed: student_raw, teacher"),
    ],
)
def test_settings_out_of_range_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_at_lambda_1_the_losses_need_no_alignment() -> None:
    assert all(loss.needs_alignment for loss in LOSSES.values())
    labels_only = Distillation(SpanShiftTarget(), ForwardKL(), ce_weight=1.0)
    assert not labels_only.needs_alignment
    assert not UniversalLogitDistillation(ce_weight=1.0).needs_alignment
