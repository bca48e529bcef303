from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deltakd.evaluation import EvaluationSet
from deltakd.evaluation import answers as evaluating
from deltakd.evaluation.answers import evaluate_sets
from deltakd.evaluation.settings import EvaluationSettings
from deltakd.generation import Decoding
from tests.generation.tiny_models import make_model, make_tokenizer

TOKENIZER = make_tokenizer()


@pytest.mark.parametrize("do_sample", [True, False])
def test_only_seeds_without_a_file_are_answered_and_together(
    do_sample: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["What is it?", "Say so:", "Go"]
    ids = [TOKENIZER(prompt)["input_ids"] for prompt in prompts]
    toy = EvaluationSet("toy", [4, 7, 9], prompts, ids, [("it is it",), ("so",), ("gone",)])
    decoding = Decoding(do_sample=do_sample, max_new_tokens=6)
    evaluation = EvaluationSettings(
        sets={}, limit=None, seeds=[3, 1, 2], batch_size=4, decoding=decoding, val_limit=1, generate=True
    )
    model = make_model("gpt2", vocab=len(TOKENIZER))
    asked: list[list[int]] = []
    answer = evaluating.answer
    monkeypatch.setattr(
        evaluating,
        "answer",
        lambda *given: asked.append(list(given[4])) or answer(*given),  # type: ignore[func-returns-value]
    )

    def evaluate(seeds: list[int]) -> dict[str, float]:
        return evaluate_sets(model, TOKENIZER, [toy], replace(evaluation, seeds=seeds), len(TOKENIZER), tmp_path, False)

    metrics = evaluate([3, 1, 2])
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(files) == [f"toy_seed{seed}.jsonl" for seed in (1, 2, 3)]
    (tmp_path / "toy_seed3.jsonl").unlink()
    (tmp_path / "toy_seed2.jsonl").unlink()
    assert evaluate([3, 1, 2]) == metrics
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    evaluate([3, 1, 2])
    # Greedy answers are copied from the seed that is there.
    assert asked == ([[3, 1, 2], [3, 2]] if do_sample else [[3, 1, 2]])
