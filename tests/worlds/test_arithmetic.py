"""The arithmetic stories, worked out again by a reader of the words alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deltakd.worlds.arithmetic import FILES, LARGEST, MANIFEST, SEPARATOR, write_arithmetic

SIZES = {"documents": 150, "train_rows": 80, "val_rows": 20, "test_rows": 40}
#: What a number in a sentence does to what there was before.
CLUES = {
    "+": r"(?:finds|buys|is given) (\d+) more\.|has (\d+) more than",
    "-": r"(?:loses|sells|gives away) (\d+)\.|has (\d+) fewer than",
    "*": r"has (\d+) times as many as|grows to (\d+) times as many\.",
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    write_arithmetic(folder, **SIZES)
    return folder


def read(directory: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / f"{split}.jsonl").read_text().splitlines()]


def read_story(text: str) -> tuple[tuple[int, ...], list[str], str]:
    """All numbers, the operations by their words, and who holds the last value."""
    sentences = re.findall(r"[^.?]+[.?]", text)
    first = re.fullmatch(r"(\w+) has (\d+) \w+\.", sentences[0].strip())
    assert first is not None
    who, numbers, signs = first[1], [int(first[2])], []
    for sentence in sentences[1:]:
        for sign, clue in CLUES.items():
            found = re.search(clue, sentence)
            if found:
                signs.append(sign)
                numbers.append(int(next(filter(None, found.groups()))))
                if " than " in sentence or " as many as " in sentence:
                    assert sentence.rstrip(".").split()[-1] == who
                    who = sentence.split()[0]
                else:
                    assert who in sentence.split()
    return tuple(numbers), signs, who


def problem_of(text: str) -> tuple[Any, ...]:
    numbers, signs, _ = read_story(text)
    return numbers, tuple(signs)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_step_is_right_and_follows_the_story(directory: Path, split: str) -> None:
    rows = read(directory, split)
    assert len(rows) == SIZES[f"{split}_rows"]
    for row in rows:
        numbers, signs, who = read_story(row["instruction"])
        assert row["instruction"].endswith(f"does {who} have?")
        answer = row["output"] if split == "train" else row["output"][0]
        steps, _, final = answer.rpartition(" #### ")
        value = numbers[0]
        worked = [step.rstrip(".").split() for step in steps.split(". ")]
        assert len(worked) == len(signs) == row["steps"] == len(numbers) - 1
        for (a, sign, b, equals, c), wanted, n in zip(worked, signs, numbers[1:], strict=True):
            assert (int(a), sign, int(b), equals) == (value, wanted, n, "=")
            value = {"+": value + n, "-": value - n, "*": value * n}[sign]
            assert int(c) == value
            assert 1 <= value <= LARGEST
        assert int(final) == value


def test_no_problem_is_in_two_files_or_twice_in_one(directory: Path) -> None:
    problems = [problem_of(row["instruction"]) for split in ("train", "val", "test") for row in read(directory, split)]
    for name in ("pretrain.txt", "pretrain_val.txt"):
        documents = (directory / name).read_text().split(SEPARATOR)
        # Remarks ("3 + 4 = 7.", "That makes 7.") tell results, which the reader of clues passes over.
        problems += [problem_of(document.strip()) for document in documents]
    assert len(set(problems)) == len(problems) == 150 + 3 + 80 + 20 + 40


def test_the_same_arguments_give_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    paths = write_arithmetic(tmp_path / "again", **SIZES)
    assert {name: path.read_bytes() for name, path in paths.items()} == {
        name: (directory / name).read_bytes() for name in FILES
    }
    write_arithmetic(tmp_path / "other", seed=1, **SIZES)
    assert all((tmp_path / "other" / name).read_bytes() != path.read_bytes() for name, path in paths.items())
    assert sorted(path.name for path in directory.iterdir()) == sorted((*FILES, MANIFEST))
    paths["val.jsonl"].write_text("")
    with pytest.raises(ValueError, match=r"val.jsonl in .* changed since written; delete arithmetic.json"):
        write_arithmetic(tmp_path / "again", **SIZES)
    with pytest.raises(ValueError, match="val_rows must be at least 1"):
        write_arithmetic(tmp_path, val_rows=0)
