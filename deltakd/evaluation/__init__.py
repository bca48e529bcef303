"""Generation with noise per row, scorers of answers, and the protocol that joins them."""

from deltakd.evaluation.decoding import Decoding
from deltakd.evaluation.generation import generate
from deltakd.evaluation.protocol import EvaluationSet, answer_set, end_tokens, evaluate_set, matches, scored, summarise
from deltakd.evaluation.scoring import MAIN_METRICS, METRIC_TITLES, METRICS, SCORERS, main_metric, score
from deltakd.evaluation.storage import read_generations, write_generations

__all__ = [
    "MAIN_METRICS",
    "METRICS",
    "METRIC_TITLES",
    "SCORERS",
    "Decoding",
    "EvaluationSet",
    "answer_set",
    "end_tokens",
    "evaluate_set",
    "generate",
    "main_metric",
    "matches",
    "read_generations",
    "score",
    "scored",
    "summarise",
    "write_generations",
]
