from __future__ import annotations

from pathlib import Path

import pytest

from deltakd.data import OverlapSearch, find_overlaps, read_rows
from deltakd.data.sources import overlap
from deltakd.data.sources.overlap import overlapping
from deltakd.data.sources.rows import Row
from deltakd.data.sources.tasks import GENERIC_INPUTS

LONG = "Write a letter to the mayor of a small town in which you ask for more benches beside the river, and say why"


def pairs(asked: list[Row], others: list[Row]) -> list[tuple[int, int, bool]]:
    return [(o.row_id, o.other_id, o.exact) for o in find_overlaps(asked, others)]


def test_exact_and_near_duplicates_are_found_by_their_words() -> None:
    asked = [Row(0, "Who wrote Emma?"), Row(1, LONG), Row(2, "Who wrote Ivanhoe?"), Row(3, "Explain.", "How bees fly")]
    others = [
        Row(10, "who wrote *Emma*"),
        Row(11, LONG.replace("small", "large")),  # its shingles are 13 of 23
        Row(12, LONG + " today"),
        Row(13, "Explain.", "how bees fly [3]"),
    ]
    assert pairs(asked, others) == [(0, 10, True), (1, 12, False), (3, 13, True)]
    assert overlapping(others, asked) == {0, 2, 3}


def test_the_best_of_several_is_named() -> None:
    assert pairs([Row(0, LONG)], [Row(7, LONG + " today"), Row(8, LONG.upper()), Row(9, LONG)]) == [(0, 8, True)]


def test_what_only_looks_alike_is_no_duplicate() -> None:
    passage = "The river rises in the hills and flows past nine towns until it meets the sea"
    assert pairs([Row(0, "Summarise this.", passage)], [Row(1, "Summarise this.", "Another text entirely")]) == []
    assert pairs([Row(0, "Who?", passage)], [Row(1, "Where does the river rise?", passage)]) == []
    assert pairs([Row(0, LONG + " by 3 May")], [Row(1, LONG + " by 4 May")]) == []
    assert pairs([Row(0, LONG, passage + " by 3")], [Row(1, LONG, passage + " by 4")]) == []
    assert pairs([Row(0, LONG, passage + " by 3")], [Row(1, LONG, passage + " by 3!")]) == [(0, 1, True)]
    assert pairs([Row(0, "Name four rivers")], [Row(1, "Name five rivers")]) == []


def test_a_question_without_its_passage_is_the_same_unless_it_is_generic() -> None:
    asked = [Row(0, "What is Linux?", "Linux is a kernel"), Row(1, "Finish this story.", "Once upon a time")]
    others = [Row(2, "What is Linux?"), Row(3, "Finish this story.")]
    many = [Row(10 + n, "Finish this story.", f"story {n}") for n in range(GENERIC_INPUTS)]
    assert pairs(asked, others) == [(0, 2, False), (1, 3, False)]
    assert pairs(asked, [*others, *many]) == [(0, 2, False)]


def test_whole_prompts_are_compared_by_what_stands_in_their_frame() -> None:
    frame = "Below is an instruction.\n\n### Instruction:\nWhat is Linux?\n\n### Input:\nA kernel\n\n### Response:\n"
    assert pairs([Row(0, prompt=frame)], [Row(1, "What is Linux?", "a kernel")]) == [(0, 1, True)]


def test_generic_instructions_are_known_in_a_frame_too() -> None:
    start = "Below is an instruction.\n\n### Instruction:\nFinish this story."
    framed = [
        Row(10 + n, prompt=f"{start}\n\n### Input:\nstory {n}\n\n### Response:\n") for n in range(GENERIC_INPUTS + 1)
    ]
    assert pairs([Row(0, "Finish this story.", "Once upon a time")], [Row(1, "Finish this story.")]) == [(0, 1, False)]
    assert pairs([Row(0, "Finish this story.")], framed) == []


def test_minillms_split_of_dolly_and_the_whole_of_dolly(shared_dir: Path) -> None:
    test = read_rows(str(shared_dir / "data" / "dolly" / "minillm_dolly_test.jsonl.gz"))
    source = str(shared_dir / "data" / "dolly" / "databricks-dolly-15k.jsonl.gz")
    split = read_rows(source, subset=str(shared_dir / "data" / "dolly" / "minillm_split.json#train"))
    found = find_overlaps(test, split)
    assert [(o.row_id, o.exact) for o in found] == [(40, False), (183, False), (238, False), (246, False)]
    whole = find_overlaps(test, read_rows(source))
    assert (sum(o.exact for o in whole), len(whole)) == (494, 500)


def chat(*contents: str, system: str = "") -> tuple[dict[str, str], ...]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    return tuple([{"role": "system", "content": system}] * bool(system) + turns)


def test_a_frame_that_is_not_alpacas_makes_no_near_duplicates() -> None:
    frame = "You are a careful assistant who answers in one short sentence and never says more than was asked of you . "
    rows = [Row(n, prompt=f"[INST] {frame * 3} What is made in {city}? [/INST]") for n, city in enumerate("abcdefghij")]
    assert pairs(rows[:5], rows[5:]) == []
    assert pairs(rows[:5], [*rows[5:], Row(20, prompt=rows[2].prompt)]) == [(2, 20, True)]


def test_conversations_are_compared_by_their_last_question_and_what_precedes_it() -> None:
    asked = [Row(0, messages=chat("Hi", "Hello", "What is Linux?", "A kernel"))]
    assert pairs(asked, [Row(1, messages=chat("Hi", "Hello", "Who wrote Emma?", "Jane Austen"))]) == []
    assert pairs(asked, [Row(1, messages=chat("hi", "Hello!", "What is Linux?", "Another answer"))]) == [(0, 1, True)]
    assert pairs(asked, [Row(1, messages=chat("Bye", "Why?", "What is Linux?", "A kernel"))]) == []
    asked = [Row(0, "Who wrote Emma?")]
    assert pairs(asked, [Row(1, messages=chat("Who wrote Emma?", "Austen", system="Be brief."))]) == [(0, 1, False)]


def test_text_without_spaces_is_compared_by_its_characters() -> None:
    question = "请写一封信给小镇的镇长,请求在河边多放几张长椅,并说明为什么这对镇上的老人和孩子都很重要"
    other = "请写一首诗献给远方的朋友,描述秋天的山林和飘落的红叶,并表达你对他长久的思念和真诚的祝福"
    assert pairs([Row(0, question)], [Row(1, question + "吗"), Row(2, other)]) == [(0, 1, False)]
    assert pairs([Row(0, "東京は何曜日ですか")], [Row(1, "東京は何月ですか")]) == []
    thai = "เขียนจดหมายถึงนายกเทศมนตรีเพื่อขอม้านั่งเพิ่มริมแม่น้ำ"
    assert pairs([Row(0, thai)], [Row(1, thai + "ค")]) == [(0, 1, False)]


def test_overlaps_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, others = [Row(0, LONG), Row(1, "Who wrote Emma?")], [Row(7, LONG + " today")]
    found = find_overlaps(asked, others)
    assert OverlapSearch(others, tmp_path).overlaps(asked) == found != []
    monkeypatch.setattr(overlap, "_Search", None)
    assert OverlapSearch(others, tmp_path).overlaps(asked) == found
    with pytest.raises(TypeError):
        OverlapSearch([*others, Row(8, "Who wrote Emma?")], tmp_path).overlaps(asked)


def test_sets_that_are_compared_one_after_the_other_do_not_count_for_each_other() -> None:
    stem = " ".join(f"stem{n}" for n in range(20))
    others = [Row(n, f"{stem} end{n}", "given") for n in range(4)]
    asked = [[Row(0, f"{stem} end1", "given")], [Row(n, f"{stem} last{n}", f"text {n}") for n in range(9)]] * 2
    search = OverlapSearch(others)
    assert [search.overlaps(rows) for rows in asked] == [find_overlaps(rows, others) for rows in asked]
    assert search.overlaps(asked[0]) != []
