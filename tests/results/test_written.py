"""The responses of on-policy runs in a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deltakd.config.compose import CONF_DIR
from deltakd.config.loss_names import read_losses
from deltakd.results.methods import Method, make_methods
from deltakd.results.page import make_page, render
from deltakd.results.reading import find_runs
from deltakd.results.tables import make_comparisons
from deltakd.results.written import RESPONSES, responses_of
from deltakd.rollouts.samples import write_samples
from tests.results.fake import write_run
from tests.results.test_page import EVIL, parsed


def record(row: int, output: str = "Said.", finished: bool = True, prompt: str = "Ask?\n") -> dict[str, Any]:
    return {"row_id": row, "prompt": prompt, "output": output, "output_tokens": 3, "finished": finished}


def write_responses(run: Path, steps: Sequence[int], count: int = 2, **changes: Any) -> None:
    for step in steps:
        write_samples(run, step, [record(row, finished=row == 0) | changes for row in range(count)])


def methods_of(folder: Path) -> list[Method]:
    return make_methods(find_runs([str(folder)]).runs, read_losses(CONF_DIR / "loss"), [])


def test_each_run_shows_its_first_and_last_steps_and_some_between(tmp_path: Path) -> None:
    write_run(tmp_path / "off", "sft")
    for seed in (1, 2):
        write_run(tmp_path / f"on{seed}", "kd", seed)
        write_responses(tmp_path / f"on{seed}", range(10, 10 * seed * 5, 10), count=RESPONSES + 3)
    found, problems = responses_of(methods_of(tmp_path))
    assert problems == []
    assert [(run.label, run.seed, run.kept) for run in found] == [("kd", 1, 4), ("kd", 2, 9)]
    assert [[step.number for step in run.steps] for run in found] == [[10, 20, 30, 40], [10, 40, 60, 90]]
    for step in found[0].steps:
        assert (len(step.responses), step.finished, step.kept) == (RESPONSES, 1, RESPONSES + 3)


@pytest.mark.parametrize("line", ["{", "[]", '{"row_id": 1, "prompt": "x"}'])
def test_damaged_responses_are_named_and_left_out(tmp_path: Path, line: str) -> None:
    for name in ("good", "bad"):
        write_run(tmp_path / name, {"good": "kd", "bad": "sft"}[name])
        write_responses(tmp_path / name, [10])
    (tmp_path / "bad" / "rollouts" / "step_00000010.jsonl").write_text(line + "\n")
    found, (problem,) = responses_of(methods_of(tmp_path))
    assert [run.label for run in found] == ["kd"]
    assert f"{tmp_path / 'bad'}: the responses of its student can't be read" in problem


def test_the_page_shows_prompts_responses_and_whether_they_finished_as_text(tmp_path: Path) -> None:
    write_run(tmp_path / "on", "kd")
    write_samples(tmp_path / "on", 10, [record(7, EVIL, False, f"Ask {EVIL}"), record(8, "  ", True)])
    methods = methods_of(tmp_path)
    page = make_page("t", methods, make_comparisons(methods, None, mixed=False), {}, [], "do")
    shown = parsed(render(page))
    sections = {attributes["id"] for tag, attributes in shown.tags if tag == "section"}
    assert "responses" in sections
    assert f"Ask {EVIL}" in shown.text
    assert shown.text.count(EVIL) == 2
    for said in ("row 7not finished, 3 tokens", "row 8finished, 3 tokens", "1 of 2 finished", "empty"):
        assert said in shown.text
    assert [tag for tag, _ in shown.tags if tag == "script"] == ["script"]
    assert not [tag for tag, _ in shown.tags if tag == "img"]


def test_runs_on_given_responses_have_no_such_section(tmp_path: Path) -> None:
    write_run(tmp_path / "off", "sft")
    methods = methods_of(tmp_path)
    page = make_page("t", methods, make_comparisons(methods, None, mixed=False), {}, [], "do")
    assert 'id="responses"' not in render(page)
