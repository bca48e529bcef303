"""Score generated answers row by row: ROUGE and exact match, or the final number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchmetrics.functional.text.rouge import rouge_score

from deltakd.evaluation.final_number import final_number_scores

#: Explicit, because torchmetrics' default keys include rougeLsum, which downloads nltk data.
ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Scorer:
    """A way of scoring an answer against its references.

    Args:
        metrics: names of its metrics.
        main: the metric that stands for it in lists.
        description: recorded with results.
        score_row: (answer, references) -> each metric in per cent (0 to 100).
    """

    metrics: tuple[str, ...]
    main: str
    description: str
    score_row: Callable[[str, Sequence[str]], dict[str, float]]


def _rouge_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    rouge = rouge_score([prediction], [list(references)], accumulate="best", use_stemmer=True, rouge_keys=ROUGE_KEYS)
    scores = {key: 100 * float(rouge[f"{key}_fmeasure"]) for key in ROUGE_KEYS}
    wanted = {_collapsed(reference) for reference in references}
    scores["exact_match"] = 100.0 * (_collapsed(prediction) in wanted)
    return scores


def _collapsed(text: str) -> str:
    return " ".join(text.split())


#: Scorers by their name in ``evaluation.scorer``.
SCORERS: Mapping[str, Scorer] = {
    "rouge": Scorer(
        metrics=(*ROUGE_KEYS, "exact_match"),
        main="rougeL",
        description="ROUGE F-measure with Porter stemming, best of the references for each key, mean over rows x 100; "
        "exact match after white space is collapsed",
        score_row=_rouge_scores,
    ),
    "final_number": Scorer(
        metrics=("final_number", "final_number_lenient"),
        main="final_number",
        description="exact match of the number behind the first ####; lenient: of the last number in the answer",
        score_row=final_number_scores,
    ),
}

#: The metrics of all scorers; a row has those of one scorer.
METRICS = tuple(metric for scorer in SCORERS.values() for metric in scorer.metrics)

#: The metrics that stand for their scorers.
MAIN_METRICS = tuple(scorer.main for scorer in SCORERS.values())

#: Titles of the metrics that are shown to people.
METRIC_TITLES: Mapping[str, str] = {
    "rougeL": "ROUGE-L",
    "exact_match": "Exact match",
    "final_number": "Final number",
    "final_number_lenient": "Final number, lenient",
}


def main_metric(scored: Mapping[str, object]) -> str:
    """Return the metric that stands for a scored record.

    Raises:
        ValueError: it has none.
    """
    for scorer in SCORERS.values():
        if scorer.main in scored:
            return scorer.main
    raise ValueError(f"no score in a record with {', '.join(scored)}; there must be one of: {', '.join(METRICS)}")


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], scorer: str = "rouge"
) -> list[dict[str, float]]:
    """Score each prediction against its best reference.

    ROUGE is the F-measure with Porter stemming (Lin 2004, torchmetrics' implementation), the best of the references
    **for each key separately**, as in ``rouge_score.RougeScorer.score_multi``. Its tokens are runs of a–z and 0–9
    after lower-casing, so text in another script scores 0. ``exact_match`` requires case-sensitive equality with any of
    the references after stripping outer and collapsing inner white space. For the final number see the module
    ``final_number``.

    Args:
        predictions: one text for each row; may be empty.
        references: at least one text for each row.
        scorer: one of SCORERS.

    Returns:
        For each row the scorer's metrics, in per cent (0 to 100).

    Raises:
        ValueError: the lengths differ, or a row has no reference or one that can't be scored against.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions came with {len(references)} lists of references: give one list each."
        )
    score_row = SCORERS[scorer].score_row
    scored = []
    for index, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"Row {index} came with the references {texts!r}: give a list of one text or more.")
        scored.append(score_row(prediction, texts))
    return scored
