"""Score generated answers row by row: ROUGE and exact match, or the final number."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from deltakd.evaluation.final_number import expected_number, final_number_scores
from deltakd.evaluation.words import ascii_words, unicode_words

#: Explicit, because torchmetrics' default keys include rougeLsum, which downloads nltk data.
ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")

#: Values of ``evaluation.rouge_tokenizer``: the words of ``rouge_score``, or words of all scripts.
RougeTokenizer = Literal["default", "unicode"]

#: The default of ``evaluation.strip``: reasoning blocks, with the white space after them. If a template opens the block
#: in the prompt, the answer contains only its end. A block without an end extends to the end of the text: the model
#: used up its tokens before it answered.
THINK_BLOCKS = r"(?s)(?:\A(?:(?!<think>).)*</think>|<think>.*?(?:</think>|\Z))\s*"


def stripped(text: str, pattern: str | None) -> str:
    """Return the scored part of a text: without the pattern's matches; None matches nothing."""
    return text if pattern is None else re.sub(pattern, "", text)


@dataclass(frozen=True)
class Scorer:
    """A way of scoring an answer against its references.

    Args:
        metrics: names of its metrics.
        main: the metric that represents it in lists.
        description: recorded with results.
        score_row: (answer, references) -> each metric in per cent (0 to 100).
        reads: True if answers can be compared with the reference.
    """

    metrics: tuple[str, ...]
    main: str
    description: str
    score_row: Callable[[str, Sequence[str]], dict[str, float]]
    reads: Callable[[str], bool]


def _rouge_scores(
    prediction: str, references: Sequence[str], words: Callable[[str], list[str]] | None = None
) -> dict[str, float]:
    """ROUGE and exact match.

    Args:
        prediction: the answer.
        references: one or more.
        words: returns a text's lower-cased words; None: torchmetrics' own. Porter's rules only know a-z endings, so
            words of other scripts are never stemmed.
    """
    # Not at the top: torchmetrics imports SciPy and Matplotlib, and a config is checked by the scorers' names alone.
    from torchmetrics.functional.text.rouge import rouge_score

    rouge = rouge_score(
        [prediction],
        [list(references)],
        accumulate="best",
        use_stemmer=True,
        # torchmetrics' own normaliser would first drop everything except a-z and 0-9.
        normalizer=None if words is None else str,
        tokenizer=words,
        rouge_keys=ROUGE_KEYS,
    )
    scores = {key: 100 * float(rouge[f"{key}_fmeasure"]) for key in ROUGE_KEYS}
    wanted = {_collapsed(reference) for reference in references}
    scores["exact_match"] = 100.0 * (_collapsed(prediction) in wanted)
    return scores


def _collapsed(text: str) -> str:
    return " ".join(text.split())


#: The definition of exact match to record, since published protocols differ.
_EXACT_MATCH = (
    "exact match after white space is collapsed, case and punctuation kept (the scripts of MiniLLM and of Natural "
    "Instructions lower-case and drop punctuation first, so theirs is never below this one)"
)

#: Scorers by their name in ``evaluation.scorer``; ROUGE with the words of published numbers.
SCORERS: Mapping[str, Scorer] = {
    "rouge": Scorer(
        metrics=(*ROUGE_KEYS, "exact_match"),
        main="rougeL",
        description="ROUGE F-measure with Porter stemming, best of the references for each key, mean over rows x 100; "
        f"its words are runs of a-z and 0-9; {_EXACT_MATCH}",
        score_row=_rouge_scores,
        reads=lambda reference: bool(ascii_words(reference)),
    ),
    "final_number": Scorer(
        metrics=("final_number", "final_number_lenient"),
        main="final_number",
        description="exact match of the number behind the first ####; lenient: of the last number in the answer",
        score_row=final_number_scores,
        reads=lambda reference: expected_number(reference) is not None,
    ),
}


def find_scorer(name: str, rouge_tokenizer: str = "default") -> Scorer:
    """Return a scorer.

    Args:
        name: one of SCORERS.
        rouge_tokenizer: the words that ROUGE compares; other scorers ignore it.
    """
    found = SCORERS[name]
    if name != "rouge" or rouge_tokenizer == "default":
        return found
    return replace(
        found,
        description="ROUGE F-measure, best of the references for each key, mean over rows x 100; its words are runs of "
        "letters and digits of all scripts (single letters in scripts without spaces), English endings stemmed "
        f"(Porter): not the words of published numbers; {_EXACT_MATCH}",
        score_row=partial(_rouge_scores, words=unicode_words),
        reads=lambda reference: bool(unicode_words(reference)),
    )


#: The metrics of all scorers; a row has the metrics of one scorer.
METRICS = tuple(metric for scorer in SCORERS.values() for metric in scorer.metrics)

#: The metrics that represent their scorers.
MAIN_METRICS = tuple(scorer.main for scorer in SCORERS.values())

#: Titles of the metrics that are shown to people.
METRIC_TITLES: Mapping[str, str] = {
    "rougeL": "ROUGE-L",
    "exact_match": "Exact match",
    "final_number": "Final number",
    "final_number_lenient": "Final number, lenient",
}


def main_metric(scored: Mapping[str, object]) -> str:
    """Return the main metric of a scored record.

    Raises:
        ValueError: it has none.
    """
    for scorer in SCORERS.values():
        if scorer.main in scored:
            return scorer.main
    raise ValueError(f"no score in a record with {', '.join(scored)}; there must be one of: {', '.join(METRICS)}")


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    scorer: str = "rouge",
    rouge_tokenizer: str = "default",
    strip: str | None = None,
) -> list[dict[str, float]]:
    """Score each prediction against its best reference.

    ROUGE is the F-measure with Porter stemming (Lin 2004, torchmetrics' implementation), the best of the references
    **for each key separately**, as in ``rouge_score.RougeScorer.score_multi``. Its tokens are runs of a–z and 0–9
    after lower-casing, so text in another script scores 0; with ``rouge_tokenizer="unicode"`` they are those of
    ``unicode_words``. ``exact_match`` requires case-sensitive equality with any of the references after stripping outer
    and collapsing inner white space. For the final number see the module ``final_number``.

    Args:
        predictions: one text for each row; may be empty.
        references: at least one text for each row.
        scorer: one of SCORERS.
        rouge_tokenizer: ``default`` or ``unicode``.
        strip: a regular expression; its matches are removed from predictions and references.

    Returns:
        For each row the scorer's metrics, in per cent (0 to 100).

    Raises:
        ValueError: the lengths differ, or a row has no reference or one that can't be scored against.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions came with {len(references)} lists of references: give one list each."
        )
    score_row = find_scorer(scorer, rouge_tokenizer).score_row
    scored = []
    for index, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"Row {index} came with the references {texts!r}: give a list of one text or more.")
        scored.append(score_row(stripped(prediction, strip), [stripped(text, strip) for text in texts]))
    return scored
