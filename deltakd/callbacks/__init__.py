"""What happens around the training step: validation, checkpoints, throughput, signals, the progress bar."""

from deltakd.callbacks.checkpoints import Checkpoints
from deltakd.callbacks.lifeline import Lifeline
from deltakd.callbacks.progress import ProgressBar
from deltakd.callbacks.signals import StopOnSignal, Stopped
from deltakd.callbacks.training_log import TrainingLog
from deltakd.callbacks.validation import Validation

__all__ = [
    "Checkpoints",
    "Lifeline",
    "ProgressBar",
    "StopOnSignal",
    "Stopped",
    "TrainingLog",
    "Validation",
]
