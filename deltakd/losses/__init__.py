"""Loss formulas. They need only torch: no models, no trainer."""

from deltakd.losses.distillation import Distillation
from deltakd.losses.divergences import (
    AdaptiveKL,
    AlphaBeta,
    Divergence,
    ForwardKL,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SymmetricKL,
    ToDi,
    TotalVariation,
)
from deltakd.losses.dual_space import DualSpaceDistillation
from deltakd.losses.gated import GatedDeltaTarget, gated_delta_target
from deltakd.losses.matching import (
    DeltaMatching,
    DistillationPlusMatching,
    LogitMatching,
    Matching,
    RatioMatching,
)
from deltakd.losses.parallelogram import Parallelogram, SignedParallelogram
from deltakd.losses.policy_gradient import (
    PolicyGradient,
    agreeing_policy_gradient,
    extrapolated_policy_gradient,
    target_policy_gradient,
)
from deltakd.losses.preference import ResponsePreference
from deltakd.losses.scores import Score, TeacherShift, TowardsTarget
from deltakd.losses.sequence_kl import SequenceReverseKL
from deltakd.losses.sft import SupervisedFineTuning, cross_entropy
from deltakd.losses.span_kd import SpanDistillation
from deltakd.losses.span_shift import SpanShiftTarget, span_shift_target
from deltakd.losses.targets import (
    ShiftedTarget,
    Target,
    bilinear_target,
    delta_target,
    multi_teacher_target,
    shift_target,
    taid_target,
    teacher_target,
)
from deltakd.losses.treatments import Treatment
from deltakd.losses.uld import UniversalLogitDistillation

__all__ = [
    "AdaptiveKL",
    "AlphaBeta",
    "DeltaMatching",
    "Distillation",
    "DistillationPlusMatching",
    "Divergence",
    "DualSpaceDistillation",
    "ForwardKL",
    "GatedDeltaTarget",
    "JensenShannon",
    "LogitMSE",
    "LogitMatching",
    "Matching",
    "Parallelogram",
    "PolicyGradient",
    "RatioMatching",
    "ResponsePreference",
    "ReverseKL",
    "Score",
    "SequenceReverseKL",
    "ShiftedTarget",
    "SignedParallelogram",
    "SkewForwardKL",
    "SkewReverseKL",
    "SpanDistillation",
    "SpanShiftTarget",
    "SupervisedFineTuning",
    "SymmetricKL",
    "Target",
    "TeacherShift",
    "ToDi",
    "TotalVariation",
    "TowardsTarget",
    "Treatment",
    "UniversalLogitDistillation",
    "agreeing_policy_gradient",
    "bilinear_target",
    "cross_entropy",
    "delta_target",
    "extrapolated_policy_gradient",
    "gated_delta_target",
    "multi_teacher_target",
    "shift_target",
    "span_shift_target",
    "taid_target",
    "target_policy_gradient",
    "teacher_target",
]
