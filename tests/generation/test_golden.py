from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer

from deltakd.evaluation import score

from . import golden_file

RECORDS = golden_file.read()
AGAIN = "if that was meant, `python -m tests.generation.golden_file` makes the golden file again"


@pytest.mark.parametrize("case", golden_file.CASES)
def test_golden_generations_are_reproduced(case: str) -> None:
    golden = [record for record in RECORDS if record["case"] == case]
    records = golden_file.generate_case(case, [record["row_id"] for record in golden], golden_file.model())
    for record, wanted in zip(records, golden, strict=True):
        assert {k: v for k, v in record.items() if not k.startswith("rouge")} == {
            k: v for k, v in wanted.items() if not k.startswith("rouge")
        }, AGAIN
        assert [record[k] for k in ("rouge1", "rouge2", "rougeL")] == pytest.approx(
            [wanted[k] for k in ("rouge1", "rouge2", "rougeL")], abs=1e-4
        ), AGAIN


def test_recorded_generations_score_as_googles_package_scores_them() -> None:
    assert len(RECORDS) == 50
    assert len({record["output"] for record in RECORDS}) > 30
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    ours = score([record["output"] for record in RECORDS], [record["reference"] for record in RECORDS])
    for record, scores in zip(RECORDS, ours, strict=True):
        theirs = scorer.score_multi(record["reference"], record["output"])
        wanted = {key: 100 * value.fmeasure for key, value in theirs.items()}
        assert {key: scores[key] for key in wanted} == pytest.approx(wanted, abs=1e-4)
        assert {key: record[key] for key in wanted} == pytest.approx(wanted, abs=1e-4)
