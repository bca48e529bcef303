"""Measures of generated texts that need no model: how diverse, how long, how repetitive."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: What is counted: runs of letters, digits and underscores, and each other visible character by itself.
_WORD = re.compile(r"\w+|[^\w\s]")
#: Lengths of the n-grams of which distinct-n is given.
DISTINCT = (1, 2, 4)
REPETITION = 4
TEXT_MEASURES = (*(f"distinct_{n}" for n in DISTINCT), "length_ratio", f"repetition_{REPETITION}")


def words(text: str) -> list[str]:
    """The text's words and punctuation marks in lower case, whatever the model's tokenizer makes of it.

    Models of different tokenizers are so counted alike. Scripts without spaces have one word a run of characters.
    """
    return _WORD.findall(text.lower())


def text_measures(records_by_seed: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Measure answers; each figure is made under each sampling seed, then averaged over seeds.

    Args:
        records_by_seed: sampling seed -> records with ``output`` and ``reference`` (a list of texts).

    Returns:
        The TEXT_MEASURES. ``distinct_n`` (per cent): see ``distinct``, over all answers. ``length_ratio``: words of all
        answers over words of their references, of several references the mean. ``repetition_4`` (per cent): see
        ``repetition``, mean over answers.

    Raises:
        ValueError: there are no records.
    """
    if not records_by_seed or not all(records_by_seed.values()):
        raise ValueError(f"Seeds {sorted(records_by_seed)} were given, not all with records: nothing to measure.")
    of_seeds = [_measures_of(records) for records in records_by_seed.values()]
    return {name: sum(of[name] for of in of_seeds) / len(of_seeds) for name in TEXT_MEASURES}


def _measures_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    answers = [words(record["output"]) for record in records]
    references = [[len(words(text)) for text in record["reference"]] for record in records]
    wanted = sum(sum(lengths) / len(lengths) for lengths in references if lengths)
    measures = {f"distinct_{n}": 100 * distinct(answers, n) for n in DISTINCT}
    measures["length_ratio"] = sum(map(len, answers)) / wanted if wanted else 0.0
    repeated = [repetition(answer, REPETITION) for answer in answers]
    return measures | {f"repetition_{REPETITION}": 100 * sum(repeated) / len(repeated)}


def distinct(answers: Iterable[Sequence[str]], n: int) -> float:
    """Different n-grams over n-grams of all answers, from 0 to 1; no n-gram crosses from one answer to the next.

    After Li et al. (arXiv 1510.03055), who divide by the number of words, which for n = 1 is the same; divided by the
    number of n-grams it is the Dist-n of MiniLLM (arXiv 2306.08543). It falls with the number of answers: compare it
    on equal sets alone.
    """
    counts = Counter(gram for answer in answers for gram in _ngrams(answer, n))
    return len(counts) / counts.total() if counts else 0.0


def repetition(answer: Sequence[str], n: int) -> float:
    """Share of an answer's n-grams that stood in it before: 1 − different / all, from 0 to 1.

    This is seq-rep-n of Welleck et al. (arXiv 1908.04319). An answer of fewer than n words repeats nothing.
    """
    grams = _ngrams(answer, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(answer: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(answer[at : at + n]) for at in range(len(answer) - n + 1)]
