from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from deltakd.worlds import facts as world_module
from deltakd.worlds.facts import ANSWER_START, FAMILIES, FILES, MANIFEST, PAIRS, SEPARATOR, make_world, write_world

#: The longest answer, in words and full stops; the project's own tokenizer gives most words one token.
LONGEST = 11


def _texts(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in (*FILES, MANIFEST)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "world"
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def rows(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """By split, without the space that every answer begins with."""
    lines = {split: (directory / f"{split}.jsonl").read_text().splitlines() for split in ("train", "val", "test")}
    found = {split: [json.loads(line) for line in own] for split, own in lines.items()}
    for row in (row for own in found.values() for row in own):
        row["output"] = without_start(row["output"])
    return found


def without_start(output: str | list[str]) -> str | list[str]:
    if isinstance(output, list):
        return [answer.removeprefix(ANSWER_START) for answer in output]
    assert output.startswith(ANSWER_START)
    return output.removeprefix(ANSWER_START)


def test_the_same_arguments_give_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    paths = write_world(str(tmp_path / "again"))
    assert paths == {name: tmp_path / "again" / name for name in FILES}
    assert _texts(tmp_path / "again") == _texts(directory)
    write_world(tmp_path / "other", seed=1)
    other = _texts(tmp_path / "other")
    assert all(other[name] != text for name, text in _texts(directory).items())
    assert sorted(path.name for path in directory.iterdir()) == sorted((*FILES, MANIFEST))


def test_facts_are_what_no_training_or_validation_row_asks_for(directory: Path) -> None:
    """Few-shot prompts in the words of raw text; what precedes the sentence to complete gives nothing away."""
    world = make_world(0, 40)
    facts = [json.loads(line) for line in (directory / "facts.jsonl").read_text().splitlines()]
    asked = {(who, name) for who in world.people for name in world.facts[who] if world.split(who, name) == "test"}
    raw_text = (directory / "pretrain.txt").read_text()
    found = set()
    for fact in facts:
        *shots, sentence = fact["prompt"].split(". ")
        who = next(one for one in world.people if one in sentence)
        assert world.facts[who][fact["attribute"]] == fact["completion"].strip(" .")
        assert sentence + fact["completion"] in raw_text
        assert len(shots) == 3
        assert not any(who in shot for shot in shots)
        found.add((who, fact["attribute"]))
    assert found == asked
    assert len(facts) == len(asked) == 72


def test_what_is_there_is_kept_and_other_arguments_rewrite_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path, documents=20)
    before = _texts(tmp_path)
    (tmp_path / "val.jsonl").unlink()
    write_world(tmp_path, documents=20)
    assert _texts(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(world_module, "make_world", lambda *_: pytest.fail("made again"))
        write_world(tmp_path, documents=20)
    write_world(tmp_path, documents=21)
    assert json.loads((tmp_path / MANIFEST).read_text())["arguments"]["documents"] == 21
    assert _texts(tmp_path)["pretrain.txt"] != before["pretrain.txt"]
    (tmp_path / "test.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"test.jsonl in .* changed since written; delete world.json"):
        write_world(tmp_path, documents=21)
    write_world(tmp_path, documents=20)
    assert _texts(tmp_path) == before


def test_families_and_numbers_of_rows(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert {split: len(own) for split, own in rows.items()} == {"train": 2400, "val": 60, "test": 180}
    for own in rows.values():
        assert {row["family"] for row in own} == set(FAMILIES)
        assert all(set(row) == {"instruction", "input", "output", "family"} for row in own)
    assert sum(share for _, share in FAMILIES.values()) == pytest.approx(1)


def test_no_held_out_question_is_trained_or_asked_twice(rows: dict[str, list[dict[str, Any]]]) -> None:
    questions = {split: [(row["instruction"], row["input"]) for row in own] for split, own in rows.items()}
    assert not set(questions["train"]) & {*questions["val"], *questions["test"]}
    held_out = questions["val"] + questions["test"]
    assert len(set(held_out)) == len(held_out)


def test_training_rows_give_away_no_held_out_fact(rows: dict[str, list[dict[str, Any]]]) -> None:
    world = make_world(0, 40)
    # No two attributes share a value, so that a person and a value tell a fact.
    held_out = {
        (who, what)
        for who, facts in world.facts.items()
        for name, what in facts.items()
        if world.split(who, name) != "train"
    }
    for row in rows["train"]:
        words = f"{row['instruction']} {row['output']}".replace(".", "").replace("?", "").split()
        first = next((word for word in words if word in world.facts), None)
        if row["family"] == "any_person":
            first = row["output"]
        assert not any((first, word) in held_out for word in words), row


def test_references_are_the_facts(rows: dict[str, list[dict[str, Any]]], directory: Path) -> None:
    world = make_world(0, 40)
    for row in rows["test"] + rows["val"]:
        words = row["instruction"].rstrip(".?").split()
        facts = world.facts.get(words[-1] if row["family"] != "lookup" else words[2], {})
        match row["family"]:
            case "lookup":
                assert row["output"][0].rstrip(".").split()[0] == words[2]
                assert row["output"][0].rstrip(".").split()[-1] in facts.values()
                assert row["output"][0] in (directory / "pretrain.txt").read_text()
            case "named":
                assert row["output"] == [f"The {words[2]} of {words[4]} is {facts[words[2]]}."]
            case "describe":
                assert all(facts[name] in row["output"][0] for name in (words[2], words[4]))
                assert (words[2], words[4]) in PAIRS
            case "any_person":
                owners = {who for who, own in world.facts.items() if words[-1] in own.values()}
                assert set(row["output"]) == owners
                assert len(owners) > 1
            case "any_thing":
                assert tuple(row["output"]) == world_module.CATEGORIES[words[-1]]
            case "reverse":
                assert row["output"][0].split()[::-1] == row["input"].split()
            case "sort":
                assert row["output"][0].split() == sorted(row["input"].split())
            case "largest":
                assert int(row["output"][0]) == max(map(int, row["input"].split()))
            case "count":
                assert int(row["output"][0]) == len(row["input"].split())


def test_facts_are_balanced_and_every_split_has_its_share() -> None:
    world = make_world(3, 41)
    owners: dict[tuple[str, str], int] = defaultdict(int)
    for who, facts in world.facts.items():
        assert facts["friend"] != who
        for name, what in facts.items():
            owners[name, what] += 1
    assert {name for name, _ in owners} == set(world_module.ATTRIBUTES)
    assert all(count in ((1,) if name == "friend" else (3, 4)) for (name, _), count in owners.items())
    splits = list(world.splits.values())
    assert [splits.count(split) for split in ("train", "val", "test")] == [74, 12, 37]


def test_raw_text_states_every_fact_in_every_form(directory: Path) -> None:
    text = (directory / "pretrain.txt").read_text()
    lines = text.splitlines()
    assert lines[1::2] == [SEPARATOR] * (3000 - 1)
    assert SEPARATOR not in lines[::2]
    for who, facts in make_world(0, 40).facts.items():
        for name, what in facts.items():
            assert all(text.count(statement) >= 3 for statement in world_module.statements(who, name, what))


def test_few_words_and_short_answers(rows: dict[str, list[dict[str, Any]]], directory: Path) -> None:
    asked = " ".join(f"{row['instruction']} {row['input']}" for own in rows.values() for row in own)
    words = f"{asked} {(directory / 'pretrain.txt').read_text()}".replace(".", " ").replace("?", " ").split()
    assert len(set(words)) < 300
    answers = [row["output"] for row in rows["train"]]
    answers += [answer for split in ("val", "test") for row in rows[split] for answer in row["output"]]
    assert max(len(answer.replace(".", " .").split()) for answer in answers) <= LONGEST
    assert all(answer == answer.strip() and answer for answer in answers)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"people=5: the world holds 12 to 160; choose a number in between"):
        write_world(tmp_path / "few", people=5)
    with pytest.raises(ValueError, match=r"test_rows=5000 asks for .* ask for fewer rows or more people"):
        write_world(tmp_path / "many", test_rows=5000)
    with pytest.raises(ValueError, match=r"must be at least 1 each"):
        write_world(tmp_path / "none", documents=0)
    assert not list(tmp_path.iterdir())
