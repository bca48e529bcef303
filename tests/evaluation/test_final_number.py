from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from deltakd.data import read_rows
from deltakd.evaluation import score, summarise
from deltakd.evaluation.final_number import expected_number, last_number, marked_number


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("She has 3.\n#### 1,234", "1234", "1234"),
        ("#### 18\n\nQuestion: and then?\n#### 7", "18", "7"),
        ("#### -7.50", "-7.5", "-7.5"),
        ("#### $18", "18", "18"),
        ("### 5 and ##### 6", None, "6"),
        ("#### none of them, 4", None, "4"),
        ("It costs $1,200.00.", None, "1200"),
        ("a loss of -$5", None, "-5"),
        ("a loss of $-5", None, "-5"),
        ("x = −3", None, "-3"),
        ("10-4 = 5-3", None, "3"),
        ("25%-30%.", None, "30"),
        ("about .5 %.", None, "0.5"),
        ("12,34", None, "34"),
        ("ten", None, None),
        ("", None, None),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, marked: str | None, last: str | None) -> None:
    assert marked_number(text) == (None if marked is None else Decimal(marked))
    assert last_number(text) == (None if last is None else Decimal(last))


def test_answers_are_scored_by_value_against_any_reference() -> None:
    predictions = ["so #### 18.0", "so it is 18.", "#### 17, or 18", "18 #### 2", "many"]
    rows = score(predictions, [["a\n#### 18"], ["#### 18"], ["#### 18"], ["18", "2"], ["1"]], "final_number")
    assert [row["final_number"] for row in rows] == [100, 0, 0, 100, 0]
    assert [row["final_number_lenient"] for row in rows] == [100, 100, 100, 100, 0]
    records = [{"row_id": at, "output_tokens": 1, **row} for at, row in enumerate(rows)]
    summary = summarise({10: records})
    assert summary["final_number"] == 40
    assert summary["final_number_stderr"] == pytest.approx(100 * np.sqrt(0.4 * 0.6 / 4))
    assert "rougeL" not in summary
    with pytest.raises(ValueError, match="the reference 'many' has no number"):
        score(["1"], [["many"]], "final_number")


def test_gsm8k_is_read_without_its_annotations_and_marked_as_its_authors_do(shared_dir: Path) -> None:
    rows = read_rows(str(shared_dir / "data" / "gsm8k" / "train.jsonl.gz"), strip_answers="<<[^<>]*>>", limit=500)
    assert "Natalia sold 48/2 = 24 clips in May." in rows[0].responses[0]
    assert not any("<<" in row.responses[0] or ">>" in row.responses[0] for row in rows)
    for row in rows:
        # The rule of grade-school-math's own script.
        theirs = re.search(r"#### (\-?[0-9\.\,]+)", row.responses[0])
        assert theirs is not None
        assert expected_number(row.responses[0]) == Decimal(theirs[1].replace(",", ""))
