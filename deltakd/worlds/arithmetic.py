"""Short stories that ask for several steps of arithmetic, with worked answers that end in ``#### n``.

A problem is a first number and two to four operations. Its story puts each operation in words; its answer works them
out one by one. Problems, not wordings, are dealt to the splits: neither the training rows nor the raw text, which tells
the same kind of story without questions, ever work out the numbers of a held-out story.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltakd.worlds.facts import ANSWER_START, SEPARATOR
from deltakd.worlds.made_files import write_made_files

FORMAT_VERSION = 1
MANIFEST = "arithmetic.json"
FILES = ("pretrain.txt", "pretrain_val.txt", "train.jsonl", "val.jsonl", "test.jsonl")
#: The largest number in any story or answer.
LARGEST = 30
#: Number of operations in a problem.
STEPS = range(2, 5)

NAMES = ("Ada", "Ben", "Cleo", "Dov", "Ema", "Finn", "Gia", "Hal", "Ida", "Jon", "Kim", "Leo")
THINGS = ("apples", "beads", "books", "cards", "coins", "eggs", "nuts", "pens", "shells", "stamps")
#: A story's wordings of each operation: {who} holds the number before it; {other}, if named, holds the result.
SENTENCES = {
    "+": (
        "{who} finds {n} more.",
        "{who} buys {n} more.",
        "{who} is given {n} more.",
        "{other} has {n} more than {who}.",
    ),
    "-": (
        "{who} loses {n}.",
        "{who} sells {n}.",
        "{who} gives away {n}.",
        "{other} has {n} fewer than {who}.",
    ),
    "*": ("{other} has {n} times as many as {who}.", "The number that {who} has grows to {n} times as many."),
}
#: How raw text states the result of an operation.
REMARKS = ("{a} {sign} {b} = {c}.", "That makes {c}.", "Now there are {c}.")


@dataclass(frozen=True)
class Problem:
    """A first number, and (sign, number) for each operation: ``+``, ``-`` or ``*``."""

    start: int
    operations: tuple[tuple[str, int], ...]

    def values(self) -> list[int]:
        """Return the first number, then the result of each operation."""
        values = [self.start]
        for sign, n in self.operations:
            last = values[-1]
            values.append(last + n if sign == "+" else last - n if sign == "-" else last * n)
        return values


def draw_problem(rng: random.Random) -> Problem:
    """Draw a problem in which every value is from 1 to ``LARGEST``."""
    start = rng.randint(2, 12)
    value, operations = start, []
    for _ in range(rng.choice(STEPS)):
        choices = [("+", n) for n in range(1, 10) if value + n <= LARGEST]
        choices += [("-", n) for n in range(1, 10) if value - n >= 1]
        # Counted twice, so that the few products are not drowned by sums and differences.
        choices += [("*", n) for n in (2, 3) if value * n <= LARGEST] * 2
        sign, n = rng.choice(choices)
        operations.append((sign, n))
        value = value + n if sign == "+" else value - n if sign == "-" else value * n
    return Problem(start, tuple(operations))


def worked(problem: Problem) -> str:
    """Return the answer: every step, then the last value after ``####``."""
    values = problem.values()
    steps = [f"{a} {sign} {n} = {c}." for a, c, (sign, n) in zip(values, values[1:], problem.operations, strict=False)]
    return " ".join([*steps, f"#### {values[-1]}"])


def _told(problem: Problem, rng: random.Random) -> tuple[list[str], str, str]:
    """Return the story's sentences, the last holder, and the thing held."""
    who, thing = rng.choice(NAMES), rng.choice(THINGS)
    sentences = [f"{who} has {problem.start} {thing}."]
    for sign, n in problem.operations:
        form = rng.choice(SENTENCES[sign])
        other = rng.choice([name for name in NAMES if name != who])
        sentences.append(form.format(who=who, other=other, n=n))
        who = other if "{other}" in form else who
    return sentences, who, thing


def story(problem: Problem, rng: random.Random) -> str:
    """Tell the problem in words, with its question."""
    sentences, who, thing = _told(problem, rng)
    return " ".join([*sentences, f"How many {thing} does {who} have?"])


def _document(problem: Problem, rng: random.Random) -> str:
    """Tell the problem as raw text: worked out along the way, without a question."""
    sentences, who, thing = _told(problem, rng)
    values = problem.values()
    parts = sentences[:1]
    for i, (sign, n) in enumerate(problem.operations):
        remark = rng.choice(REMARKS).format(a=values[i], sign=sign, b=n, c=values[i + 1])
        parts += [sentences[i + 1], remark]
    return " ".join([*parts, f"In the end {who} has {values[-1]} {thing}."])


def _rows(problems: Sequence[Problem], rng: random.Random, split: str) -> str:
    rows = []
    for problem in problems:
        answer = ANSWER_START + worked(problem)
        output: str | list[str] = answer if split == "train" else [answer]
        rows.append({"instruction": story(problem, rng), "output": output, "steps": len(problem.operations)})
    return "".join(json.dumps(row) + "\n" for row in rows)


def _documents(problems: Sequence[Problem], rng: random.Random) -> str:
    return f"\n{SEPARATOR}\n".join(_document(problem, rng) for problem in problems) + "\n"


def write_arithmetic(
    directory: str | Path,
    *,
    seed: int = 0,
    documents: int = 12000,
    train_rows: int = 4000,
    val_rows: int = 200,
    test_rows: int = 400,
) -> dict[str, Path]:
    """Write raw text and rows, unless they already exist.

    Args:
        directory: created if missing; files there that were made with other arguments are overwritten.
        seed: for everything random; the same arguments give the same bytes.
        documents: number of documents in ``pretrain.txt``; ``pretrain_val.txt`` gets a fiftieth of it.
        train_rows: rows whose ``output`` is a string.
        val_rows, test_rows: rows whose ``output`` is a list of one string.

    Returns:
        File name (``FILES``) -> path.

    Raises:
        ValueError: an argument is out of range, or a file made with these arguments was edited since.
        OSError: the directory is not writable.
    """
    arguments = {"seed": seed, "documents": documents, "train_rows": train_rows}
    arguments |= {"val_rows": val_rows, "test_rows": test_rows}
    small = [name for name in list(arguments)[1:] if arguments[name] < 1]
    if small:
        raise ValueError(f"{', '.join(small)} must be at least 1")
    sizes = {
        "test.jsonl": test_rows,
        "val.jsonl": val_rows,
        "train.jsonl": train_rows,
        "pretrain_val.txt": -(-documents // 50),
        "pretrain.txt": documents,
    }

    def make() -> dict[str, str]:
        rng = random.Random(f"problems {seed}")
        drawn: dict[Problem, None] = {}
        while len(drawn) < sum(sizes.values()):
            drawn[draw_problem(rng)] = None
        problems, texts, at = list(drawn), {}, 0
        # Few short problems exist, so in the order drawn they would all be in the first files.
        rng.shuffle(problems)
        for name, size in sizes.items():
            own, words = problems[at : at + size], random.Random(f"{name} {seed}")
            at += size
            texts[name] = _documents(own, words) if name.endswith(".txt") else _rows(own, words, name.split(".")[0])
        return texts

    identity = {"arguments": arguments, "format_version": FORMAT_VERSION}
    return write_made_files(Path(directory), MANIFEST, identity, FILES, make)
