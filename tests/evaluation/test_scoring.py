from __future__ import annotations

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from deltakd.evaluation import METRICS, SCORERS, find_scorer, score
from deltakd.evaluation.scoring import THINK_BLOCKS, stripped
from deltakd.evaluation.words import ascii_words, unicode_words

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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Москва — столица, 42!", ["москва", "столица", "42"]),
        ("Ὀδυσσεὺς ΣΟΦΟΣ", ["ὀδυσσεὺς", "σοφος"]),
        ("مرحبا، العالم ٢٣", ["مرحبا", "العالم", "٢٣"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("東京へ2024年", ["東", "京", "へ", "2024", "年"]),
        ("ภาษาไทย", ["ภ", "า", "ษ", "า", "ไ", "ท", "ย"]),
        ("ที่นี่ 5", ["ที่", "นี่", "5"]),
        ("GPT2是模型", ["gpt2", "是", "模", "型"]),
        ("Cafe\u0301 café", ["café", "café"]),
        ("snake_case don't", ["snake", "case", "don", "t"]),
        ("\u0301… — \U0001f600", []),
    ],
)
def test_words_of_all_scripts(text: str, words: list[str]) -> None:
    assert unicode_words(text) == words


def test_words_of_ascii_text_are_those_of_published_numbers() -> None:
    predictions, references = corpus(60)
    texts = [text.encode("ascii", "ignore").decode() for text in [*predictions, *(r[0] for r in references)]]
    for text in texts:
        assert unicode_words(text) == ascii_words(text)
    pairs = texts[:60], [[text] for text in texts[60:]]
    assert score(*pairs, rouge_tokenizer="unicode") == score(*pairs)


class Spaces:
    """Texts of known words with single spaces between them."""

    def tokenize(self, text: str) -> list[str]:
        return text.split(" ") if text else []


def test_rouge_in_other_scripts_agrees_with_googles_package_on_the_same_words() -> None:
    # Words that a stemmer would cut if it took their endings for English.
    words = ["бегать", "бегали", "кошки", "кошка", "χαρά", "यह", "में", "शहर", "привет", "москва"]
    rng = random.Random(7)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Spaces())
    for _ in range(40):
        prediction, *refs = ([*rng.choices(words, k=rng.randint(1, 12))] for _ in range(3))
        theirs = scorer.score_multi([" ".join(ref) for ref in refs], " ".join(prediction))
        ours = score(["— ".join(prediction).title()], [[", ".join(ref) + "!" for ref in refs]], "rouge", "unicode")[0]
        for key, value in theirs.items():
            assert ours[key] / 100 == pytest.approx(value.fmeasure, abs=1e-6), (key, prediction, refs)


def test_the_default_words_are_latin_and_what_is_recorded_says_which_they_are() -> None:
    text = "Москва — столица"
    assert score([text], [[text]])[0]["rougeL"] == 0
    assert score([text], [[text]], rouge_tokenizer="unicode")[0]["rougeL"] == 100
    default, unicode = find_scorer("rouge").description, find_scorer("rouge", "unicode").description
    assert "runs of a-z and 0-9" in default
    assert "letters and digits of all scripts" in unicode
    for description in (default, unicode):
        assert "case and punctuation kept (the scripts of MiniLLM and of Natural Instructions lower-case" in description
    assert find_scorer("final_number", "unicode") is SCORERS["final_number"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>\n\n</think>\n\n42", "42"),
        ("<think>7 + 5\nis 12</think>12 <think>sure</think>!", "12 !"),
        ("so it is 12\n</think>\n\n12", "12"),
        ("12 <think>is it", "12 "),
        ("no thought", "no thought"),
        ("a < b, b > c", "a < b, b > c"),
    ],
)
def test_blocks_of_reasoning_are_stripped_whole_or_not_closed_or_opened_by_the_prompt(text: str, left: str) -> None:
    assert stripped(text, THINK_BLOCKS) == left
    assert stripped(text, None) == text


def test_an_empty_block_of_reasoning_costs_no_score_on_either_side() -> None:
    answer, empty = "Paris is the capital", "<think>\n\n</think>\n\n"
    raw = score([empty + answer], [[answer]])[0]
    assert raw["rougeL"] == pytest.approx(80)
    assert raw["exact_match"] == 0
    for prediction, reference in ((empty + answer, answer), (answer, empty + answer)):
        scores = score([prediction], [[reference]], strip=THINK_BLOCKS)[0]
        assert (scores["rougeL"], scores["exact_match"]) == (100, 100)
    numbers = score(["<think>#### 7</think>\n#### 12"], [["#### 12"]], "final_number", strip=THINK_BLOCKS)[0]
    assert numbers["final_number"] == 100
    assert score(["<think>#### 7</think>\n#### 12"], [["#### 12"]], "final_number")[0]["final_number"] == 0
