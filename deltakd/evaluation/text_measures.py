"""Diversity, length and repetition of generated texts; no model needed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deltakd.evaluation.protocol import STRIP
from deltakd.evaluation.scoring import stripped

#: A word: a run of letters, digits and underscores, or any other single visible character.
_WORD = re.compile(r"\w+|[^\w\s]")
#: Lengths n of distinct-n.
DISTINCT = (1, 2, 4)
REPETITION = 4
TEXT_MEASURES = (*(f"distinct_{n}" for n in DISTINCT), "length_ratio", f"repetition_{REPETITION}")


def words(text: str) -> list[str]:
    """Return the text's words and punctuation marks in lower case, independent of the model's tokenizer.

    In scripts without spaces each run of characters is one word.
    """
    return _WORD.findall(text.lower())


def text_measures(records_by_seed: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Measure answers under each sampling seed, and average over seeds.

    Args:
        records_by_seed: sampling seed -> records with ``output`` and ``reference`` (a list of texts); parts that their
            ``protocol`` strips are not measured.

    Returns:
        The TEXT_MEASURES. ``distinct_n`` (per cent): see ``distinct``, over all answers. ``length_ratio``: words of all
        answers over words of their references (mean of several references). ``repetition_4`` (per cent): mean of
        ``repetition`` over answers.

    Raises:
        ValueError: there are no records.
    """
    if not records_by_seed or not all(records_by_seed.values()):
        raise ValueError(f"Seeds {sorted(records_by_seed)} were given, not all with records: nothing to measure.")
    of_seeds = [_measures_of(records) for records in records_by_seed.values()]
    return {name: sum(of[name] for of in of_seeds) / len(of_seeds) for name in TEXT_MEASURES}


def _measures_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    strip = records[0].get("protocol", {}).get(STRIP)
    answers = [words(stripped(record["output"], strip)) for record in records]
    references = [[len(words(stripped(text, strip))) for text in record["reference"]] for record in records]
    wanted = sum(sum(lengths) / len(lengths) for lengths in references if lengths)
    measures = {f"distinct_{n}": 100 * distinct(answers, n) for n in DISTINCT}
    measures["length_ratio"] = sum(map(len, answers)) / wanted if wanted else 0.0
    repeated = [repetition(answer, REPETITION) for answer in answers]
    return measures | {f"repetition_{REPETITION}": 100 * sum(repeated) / len(repeated)}


def distinct(answers: Iterable[Sequence[str]], n: int) -> float:
    """Return distinct n-grams over all n-grams of the answers, from 0 to 1; no n-gram spans two answers.

    This is Dist-n of MiniLLM (arXiv 2306.08543), after Li et al. (arXiv 1510.03055), who divide by the number of words
    (the same for n = 1). It falls with the number of answers: compare it on equal sets only.
    """
    counts = Counter(gram for answer in answers for gram in _ngrams(answer, n))
    return len(counts) / counts.total() if counts else 0.0


def repetition(answer: Sequence[str], n: int) -> float:
    """Return the share of an answer's n-grams that occurred in it before: 1 − distinct / all, from 0 to 1.

    This is seq-rep-n of Welleck et al. (arXiv 1908.04319); 0 for an answer of fewer than n words.
    """
    grams = _ngrams(answer, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(answer: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(answer[at : at + n]) for at in range(len(answer) - n + 1)]
