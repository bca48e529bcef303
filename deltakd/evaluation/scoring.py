"""ROUGE and exact match of generated answers, row by row."""

from __future__ import annotations

from collections.abc import Sequence

from torchmetrics.functional.text.rouge import rouge_score

#: Named, because torchmetrics' default keys include rougeLsum, which downloads nltk data.
ROUGE_KEYS = ("rouge1", "rouge2", "rougeL")
METRICS = (*ROUGE_KEYS, "exact_match")


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Score each prediction against its best reference.

    ROUGE is the F-measure with Porter stemming (Lin 2004, torchmetrics' implementation), the best of the references
    **for each key by itself**, as ``rouge_score.RougeScorer.score_multi`` has it. Its tokens are runs of a–z and 0–9
    after lower-casing, so a text in another script scores 0. ``exact_match`` asks for equality, case and all, with
    any of the references once outer white space is stripped and inner white space is collapsed.

    Args:
        predictions: one text for each row; may be empty.
        references: at least one text for each row.

    Returns:
        For each row the METRICS, in percent (0 to 100).

    Raises:
        ValueError: if the lengths differ or a row has no reference.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions came with {len(references)} lists of references: give one list each."
        )
    return [_score_row(i, *pair) for i, pair in enumerate(zip(predictions, references, strict=True))]


def _score_row(index: int, prediction: str, references: Sequence[str]) -> dict[str, float]:
    if isinstance(references, str) or not references:
        raise ValueError(f"Row {index} came with the references {references!r}: give a list of one text or more.")
    rouge = rouge_score([prediction], [list(references)], accumulate="best", use_stemmer=True, rouge_keys=ROUGE_KEYS)
    scores = {key: 100 * float(rouge[f"{key}_fmeasure"]) for key in ROUGE_KEYS}
    wanted = {_collapsed(reference) for reference in references}
    scores["exact_match"] = 100.0 * (_collapsed(prediction) in wanted)
    return scores


def _collapsed(text: str) -> str:
    return " ".join(text.split())
