"""Generation with noise per row, ROUGE and exact match, and the protocol that joins them."""

from deltakd.evaluation.decoding import Decoding
from deltakd.evaluation.generation import generate
from deltakd.evaluation.protocol import EvaluationSet, answer_set, end_tokens, evaluate_set, matches, summarise
from deltakd.evaluation.scoring import METRICS, score
from deltakd.evaluation.storage import read_generations, write_generations

__all__ = [
    "METRICS",
    "Decoding",
    "EvaluationSet",
    "answer_set",
    "end_tokens",
    "evaluate_set",
    "generate",
    "matches",
    "read_generations",
    "score",
    "summarise",
    "write_generations",
]
