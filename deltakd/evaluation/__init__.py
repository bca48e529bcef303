"""Evaluation: sets, protocol, scorers, and measures beyond scores of answers."""

from deltakd.evaluation.protocol import EvaluationSet, answer_set, by_task, evaluate_set, matches, scored, summarise
from deltakd.evaluation.scoring import (
    MAIN_METRICS,
    METRIC_TITLES,
    METRICS,
    SCORERS,
    find_scorer,
    main_metric,
    score,
)

__all__ = [
    "MAIN_METRICS",
    "METRICS",
    "METRIC_TITLES",
    "SCORERS",
    "EvaluationSet",
    "answer_set",
    "by_task",
    "evaluate_set",
    "find_scorer",
    "main_metric",
    "matches",
    "score",
    "scored",
    "summarise",
]
