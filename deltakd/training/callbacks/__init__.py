"""Callbacks around the training step: validation, checkpoints, log, signals, lifeline, progress bar, rollouts."""

from deltakd.training.callbacks.checkpoints import Checkpoints
from deltakd.training.callbacks.progress_bar import TrainingProgress
from deltakd.training.callbacks.rank_watch import Lifeline
from deltakd.training.callbacks.rollout_log import RolloutLog
from deltakd.training.callbacks.signals import StopOnSignal
from deltakd.training.callbacks.stream_end import StreamEnd
from deltakd.training.callbacks.student_share import ShareAfterValidation
from deltakd.training.callbacks.training_log import TrainingLog
from deltakd.training.callbacks.validation import Validation

__all__ = [
    "Checkpoints",
    "Lifeline",
    "RolloutLog",
    "ShareAfterValidation",
    "StopOnSignal",
    "StreamEnd",
    "TrainingLog",
    "TrainingProgress",
    "Validation",
]
