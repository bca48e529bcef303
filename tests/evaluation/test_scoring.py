from __future__ import annotations

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from deltakd.evaluation import METRICS, SCORERS, score

WORDS = """the The running runs ran happily happiness, cats cat's dog. 42 3.14 naïve café 東京 — -- state-of-the-art
\u00a0 \u2028 e-mail ponies flies died skis was İstanbul ﬁne \U0001f600 don't (x+y)=2 \n \t""".split(" ")  # noqa: SIM905


def corpus(count: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(5)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 25)))

    predictions = ["", "   ", "東京", "...", *(text() for _ in range(count - 4))]
    references = [[text() for _ in range(rng.randint(1, 4))] for _ in predictions]
    references[5], references[6] = [""], ["", text()]
    return predictions, references


def test_rouge_agrees_with_googles_package() -> None:
    predictions, references = corpus(100)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for prediction, refs, ours in zip(predictions, references, score(predictions, references), strict=True):
        theirs = scorer.score_multi(refs, prediction)
        for key, value in theirs.items():
            assert ours[key] / 100 == pytest.approx(value.fmeasure, abs=1e-6), (key, prediction, refs)


def test_each_key_takes_its_own_best_reference() -> None:
    # The first reference has all the words in disorder, the second few of them in order.
    (row,) = score(["a b c d"], [["d c b a", "a b x y"]])
    assert row == pytest.approx({"rouge1": 100, "rouge2": 100 / 3, "rougeL": 50, "exact_match": 0}, abs=1e-5)


def test_exact_match_forgives_white_space_only() -> None:
    predictions = [" two  words\n", "Two words", "two words.", "", "b"]
    references = [["two words"], ["two words"], ["two words"], [" "], ["a", "b"]]
    assert [row["exact_match"] for row in score(predictions, references)] == [100, 0, 0, 100, 100]


def test_every_row_has_every_metric() -> None:
    for name, scorer in SCORERS.items():
        assert tuple(score(["1"], [["1"]], name)[0]) == scorer.metrics
    assert {metric for scorer in SCORERS.values() for metric in scorer.metrics} == set(METRICS)
    assert score([], []) == []


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(ValueError, match="2 predictions came with 1 lists"):
        score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="Row 1 came with the references"):
        score(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="Row 0 came with the references 'text'"):
        score(["a"], ["text"])
