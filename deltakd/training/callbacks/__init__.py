"""Callbacks around the training step: validation, checkpoints, log, signals, lifeline, progress bar."""

from deltakd.training.callbacks.checkpoints import Checkpoints
from deltakd.training.callbacks.progress_bar import DisplayedTraining, ProgressBar
from deltakd.training.callbacks.rank_watch import Lifeline
from deltakd.training.callbacks.signals import StopOnSignal
from deltakd.training.callbacks.stream_end import StreamEnd
from deltakd.training.callbacks.training_log import TrainingLog
from deltakd.training.callbacks.validation import Validation

__all__ = [
    "Checkpoints",
    "DisplayedTraining",
    "Lifeline",
    "ProgressBar",
    "StopOnSignal",
    "StreamEnd",
    "TrainingLog",
    "Validation",
]
