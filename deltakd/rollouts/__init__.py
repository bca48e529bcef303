"""Rollouts: batches of responses that the student writes while it trains."""

from deltakd.rollouts.data import RolloutData
from deltakd.rollouts.settings import RolloutSettings

__all__ = ["RolloutData", "RolloutSettings"]
