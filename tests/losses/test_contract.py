"""What a loss says of itself: defaults of the base class, answers composed from the parts, plug-ins of users."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from deltakd.kernels import chunked_loss
from deltakd.losses import (
    AlphaBeta,
    DeltaMatching,
    Distillation,
    DistillationPlusMatching,
    Divergence,
    ForwardKL,
    JensenShannon,
    LogitMatching,
    LogitMSE,
    Matching,
    Parallelogram,
    RatioMatching,
    ReverseKL,
    Target,
    TotalVariation,
    Treatment,
    delta_target,
    gated_delta_target,
    teacher_target,
)
from deltakd.types import Gate, Head, LinearKL, Loss, LossOutput, MixtureKL, require_kind
from tests.losses.by_name import loss_named

CLIPPED = Treatment(clip=2.0)
ALIKE = "weighs all tokens of the vocabulary alike"
TREATED = "a treatment of a shift acts on single tokens at temperature 1"
RATIO = "a ratio of two models is compared on plausible tokens one by one"


class Squared(Loss):
    """One property and one method: all that a user's loss needs."""

    requires = frozenset({"teacher"})

    def __call__(self, logits: Mapping[str, Tensor], labels: Tensor) -> LossOutput:
        return LossOutput((logits["student"] - logits["teacher"]).square().sum(-1))


class Total(Divergence):
    name = "total"

    def __call__(self, log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
        return (log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1)


class Halved(Target):
    requires = frozenset({"teacher"})

    def __call__(self, logits: Mapping[str, Tensor]) -> Tensor:
        return logits["teacher"].detach() / 2


class Apart(Matching):
    name = "apart"
    requires = frozenset({"teacher"})

    def __call__(self, logits: Mapping[str, Tensor], log_student_NV: Tensor, temperature: float) -> Tensor:
        return (log_student_NV - logits["teacher"].log_softmax(-1)).square().sum(-1)


def heads(role_count: int = 2) -> dict[str, Head]:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    roles = ("student", "teacher", "teacher_raw", "student_raw")[:role_count]
    return {role: Head(draw(5, 3).requires_grad_(role == "student"), draw(7, 3)) for role in roles}


def test_a_loss_of_your_own_has_an_answer_to_everything() -> None:
    loss = Squared()
    assert loss.schedules == {}
    assert loss.fused_form is None
    assert loss.temperature == 1.0
    assert [loss.needs_whole_vocabulary, loss.needs_whole_sequences, loss.needs_alignment] == [False] * 3


def test_a_loss_of_your_own_goes_through_the_kernel() -> None:
    given, labels = heads(), torch.zeros(5, dtype=torch.int64)
    total, parts = chunked_loss(Squared(), given, labels, chunk_size=2)
    student, teacher = given["student"], given["teacher"]
    expected = (student.hidden @ student.weight.T - teacher.hidden @ teacher.weight.T).square().sum()
    torch.testing.assert_close(total, expected)
    assert parts == {}
    ours, theirs = (torch.autograd.grad(value, student.hidden)[0] for value in (total, expected))
    torch.testing.assert_close(ours, theirs)


def test_parts_of_your_own_are_parts_like_others() -> None:
    z = {role: head.logits() for role, head in heads().items()}
    labels = torch.zeros(5, dtype=torch.int64)
    p, q = (z["teacher"] / 2).softmax(-1), z["student"].softmax(-1)
    output = Distillation(Halved(), Total(), ce_weight=0.0)(z, labels)
    torch.testing.assert_close(output.per_token, (p - q).abs().sum(-1))
    assert set(output.parts) == {"ce", "total"}
    loss = Distillation(Halved(), ForwardKL())
    assert loss.requires == {"teacher"}
    assert loss.fused_form is None
    assert not loss.needs_whole_vocabulary
    matching = DeltaMatching(Apart(), ce_weight=0.0)
    expected = (z["student"].log_softmax(-1) - z["teacher"].log_softmax(-1)).square().sum(-1)
    torch.testing.assert_close(matching(z, labels).per_token, expected)
    assert matching.requires == {"teacher"}


def test_an_untreated_target_under_a_kl_has_a_fused_form() -> None:
    loss = Distillation(delta_target(0.25), ForwardKL(), 2.0, 0.3, temperature_squared=True)
    coefficients = {"teacher": 1.0, "student_raw": 0.25, "teacher_raw": -0.25}
    assert loss.fused_form == LinearKL(coefficients, 2.0, 0.3, 4.0, "forward_kl")
    assert Distillation(delta_target(0.25, CLIPPED), ForwardKL()).fused_form is None
    reverse = Distillation(delta_target(0.25), ReverseKL()).fused_form
    assert reverse == LinearKL(coefficients, 1.0, 0.5, 1.0, "reverse_kl", reverse=True)
    jsd = Distillation(delta_target(0.25), JensenShannon(0.1)).fused_form
    assert jsd == LinearKL(coefficients, 1.0, 0.5, 1.0, "jsd", mixture=MixtureKL(0.1, 0.9, 0.1))
    assert Distillation(delta_target(0.25), TotalVariation()).fused_form is None
    gated = Distillation(gated_delta_target(0.25, 2.0), ForwardKL()).fused_form
    gate = Gate(2.0, "teacher", "teacher_raw", {"student_raw": 0.25, "teacher_raw": -0.25}, "delta_gate")
    assert gated == LinearKL({"teacher": 1.0}, 1.0, 0.5, gate=gate)
    assert gated.kind == "gated"
    assert Distillation(gated_delta_target(0.0), ForwardKL()).fused_form == LinearKL({"teacher": 1.0}, 1.0, 0.5)
    # λ = 1 is SFT, whatever the rest.
    assert Distillation(delta_target(0.25, CLIPPED), ReverseKL(), ce_weight=1.0).fused_form is not None


@pytest.mark.parametrize(
    ("loss", "reasons"),
    [
        (Distillation(teacher_target(), LogitMSE()), [f"LogitMSE {ALIKE}"]),
        (Distillation(teacher_target(), AlphaBeta(0, 0)), [f"AlphaBeta {ALIKE}"]),
        (Distillation(teacher_target(), AlphaBeta(0, 1)), []),
        (Distillation(delta_target(1.0, CLIPPED), LogitMSE()), [TREATED, f"LogitMSE {ALIKE}"]),
        (Distillation(delta_target(1.0, CLIPPED), LogitMSE(), ce_weight=1.0), []),
        (Distillation(delta_target(0.0, CLIPPED), ForwardKL()), []),
        (Parallelogram({"teacher": 1.0}, ForwardKL(), treatment=CLIPPED), []),
        (Parallelogram({"teacher": 1.0, "shift": 1.0}, ForwardKL(), treatment=CLIPPED), [TREATED]),
        (DeltaMatching(RatioMatching()), [RATIO]),
        (DistillationPlusMatching(LogitMSE(), RatioMatching()), [f"LogitMSE {ALIKE}", RATIO]),
        (DistillationPlusMatching(ForwardKL(), RatioMatching(), 0.0), []),
        (DeltaMatching(LogitMatching("uniform")), [f"a logit matching with weighting=uniform {ALIKE}"]),
        (
            DeltaMatching(LogitMatching(treatment=CLIPPED), temperature=2.0),
            ["a logit matching needs log-probs at temperature 1, and loss.temperature is 2", TREATED],
        ),
    ],
)
def test_a_loss_needs_the_whole_vocabulary_for_the_reasons_of_its_parts(loss: Loss, reasons: list[str]) -> None:
    assert list(loss.whole_vocabulary_reasons) == reasons
    assert loss.needs_whole_vocabulary == bool(reasons)


def plain_function(logits: Any, labels: Any) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: require_kind(Squared, Loss, "loss"), r"^loss is the class tests\.\S+\.Squared, not a deltakd\.types"),
        (lambda: require_kind(plain_function, Loss, "loss"), r"loss is the function tests\.\S+\.plain_function, not"),
        (
            lambda: require_kind(Total(), Loss, "loss"),
            r"loss is an object of tests\.\S+\.Total, not a deltakd\.types\.losses\.Loss; name one that is "
            r"ready-made, or a subclass of Loss as its _target_",
        ),
        (
            lambda: Distillation("delta", ForwardKL()),
            r"loss\.target is 'delta', not a deltakd\.losses\.targets\.Target",
        ),
        (lambda: Distillation(teacher_target(), None), r"loss\.divergence is None, not a .*\.Divergence"),
        (
            lambda: Parallelogram({"teacher": 1.0}, Halved()),
            r"loss\.divergence is an object of tests\.\S+\.Halved, not",
        ),
        (lambda: DeltaMatching({"to": "teacher"}), r"loss\.matching is \{'to': 'teacher'\}, not a .*\.Matching"),
        (lambda: DistillationPlusMatching(ForwardKL(), Total()), r"loss\.matching is an object of tests\.\S+\.Total"),
    ],
)
def test_what_is_no_plug_in_is_named_with_what_to_do(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_without_its_property_or_method_cannot_be_made() -> None:
    class Unfinished(Loss):
        requires = frozenset({"teacher"})

    with pytest.raises(TypeError, match=r"abstract class Unfinished .*__call__"):
        Unfinished()  # type: ignore[abstract]


@pytest.mark.parametrize("name", ["delta_kd", "delta_shift", "parallel_logit", "parallel_ratio", "parallelogram"])
def test_a_treatment_has_to_be_one(name: str) -> None:
    key = {"delta": "target__treatment", "parallel": "matching__treatment"}.get(name.split("_")[0], "treatment")
    with pytest.raises(Exception, match=r"treatment is \{.*\}, not a deltakd\.losses\.treatments\.Treatment"):
        loss_named(name, **{f"{key}___target_": "builtins.dict"})
