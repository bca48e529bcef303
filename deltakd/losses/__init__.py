"""Loss formulas: torch alone, no models, no trainer."""

from deltakd.losses.distillation import Distillation
from deltakd.losses.divergences import Divergence, ForwardKL
from deltakd.losses.sft import SupervisedFineTuning, cross_entropy
from deltakd.losses.targets import DeltaTarget, Target, TeacherTarget

__all__ = [
    "DeltaTarget",
    "Distillation",
    "Divergence",
    "ForwardKL",
    "SupervisedFineTuning",
    "Target",
    "TeacherTarget",
    "cross_entropy",
]
