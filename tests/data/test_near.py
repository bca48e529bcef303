from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from deltakd.data import find_overlaps
from deltakd.data.sources import near
from deltakd.data.sources.near import NEAR, Corpus, Words, common, words_of
from deltakd.data.sources.overlap import Overlap, overlapping
from deltakd.data.sources.rows import Row
from deltakd.data.sources.tasks import GENERIC_INPUTS


def grams(words: Words) -> set[Words]:
    return {words[at : at + 5] for at in range(len(words) - 4)}


def likeness(one: set[Words], other: set[Words]) -> float:
    return len(one & other) / len(one | other) if one | other else 0.0


def numerals(words: Words) -> list[str]:
    return [word for word in words if word.isdigit()]


def counted(texts: list[Words]) -> Counter[Words]:
    return Counter(gram for text in texts for gram in grams(text))


def by_definition(a: Words, b: Words, count: Counter[Words], texts: int) -> float | None:
    """The similarity of two of ``count`` texts by the definition, or None."""
    if a == b:
        return 1.0
    one, other = grams(a), grams(b)
    if numerals(a) != numerals(b) or likeness(one, other) < NEAR:
        return None
    rare = [{gram for gram in own if count[gram] <= common(texts)} for own in (one, other)]
    framed = any(2 * len(own & few) <= len(own) for own, few in zip((one, other), rare, strict=True))
    return likeness(one, other) if not framed or likeness(*rare) >= NEAR else None


def random_text(rng: np.random.Generator) -> str:
    """A text out of a few stems, framed or not, with an edit or none."""
    stems = np.random.default_rng(0).integers(0, 400, (40, 30))
    words = [f"w{word}" for word in stems[rng.integers(40)][: rng.choice([4, 27, 28, 29, 30])]]
    for _ in range(rng.integers(2)):
        words[rng.integers(len(words))] = f"w{rng.integers(60)}"
    frame = [f"f{word}" for word in range(60)]
    if rng.random() < 0.4:
        words = frame[: rng.integers(20, 60)] + words[: rng.integers(1, 12)]
    if rng.random() < 0.2:
        words.append(str(rng.integers(2)))
    return " ".join(words)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_what_the_definition_finds_and_nothing_else(
    seed: int, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    few, many = ([random_text(rng) for _ in range(count)] for count in (60, 100))
    if pieces:
        monkeypatch.setattr(near, "_TEXTS", 7)
        monkeypatch.setattr(near, "_SHINGLES", 50)
    different = list(dict.fromkeys(map(words_of, few + many)))
    count = counted(different)
    left, right = ({words_of(text) for text in texts} for texts in (few, many))
    every = {(a, b): by_definition(a, b, count, len(different)) for a in left for b in right}
    expected = {pair: similarity for pair, similarity in every.items() if similarity is not None}
    corpus = Corpus()
    corpus.add(random_text(rng) for _ in range(100))
    places = [corpus.add(few), corpus.add(text.upper() for text in many)]
    numbers, found = corpus.near(*places)
    words = dict(zip(numbers[np.concatenate(places)].tolist(), map(words_of, few + many), strict=True))
    assert {(words[a], words[b]): value for b, some in found.items() for a, value in some.items()} == expected
    assert any(similarity < 1 for similarity in expected.values())


@pytest.mark.parametrize("seed", range(4))
def test_overlaps_are_those_of_comparing_every_row_with_every_other(seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    instructions = [random_text(rng) for _ in range(25)]
    inputs = ["", "", *(random_text(rng) for _ in range(12))]

    def rows(count: int) -> list[Row]:
        return [Row(n, str(rng.choice(instructions)), str(rng.choice(inputs))) for n in rng.permutation(count).tolist()]

    asked, others = rows(50), rows(120)
    every = [*asked, *others]
    asks = list(dict.fromkeys(words_of(row.instruction) for row in every))
    counts = [counted(asks)]

    def meets(row: Row, rows: list[Row]) -> bool:
        a, alike = words_of(row.instruction), {words_of(other.instruction) for other in rows}
        return any(by_definition(a, b, counts[0], len(asks)) is not None for b in alike)

    met = [row for row in asked if meets(row, others)] + [row for row in others if meets(row, asked)]
    gives = list(dict.fromkeys([*(words_of(row.input) for row in met), ()]))
    counts.append(counted(gives))
    about: dict[Words, set[Words]] = {words: set() for words in asks}
    for row in every:
        about[words_of(row.instruction)].add(words_of(row.input))

    def same(one: Row, other: Row) -> tuple[bool, float] | None:
        a, b, x, y = map(words_of, (one.instruction, other.instruction, one.input, other.input))
        similarity = by_definition(a, b, counts[0], len(asks))
        generic = max(len(about[a]), len(about[b])) > GENERIC_INPUTS
        alike = by_definition(x, y, counts[1], len(gives)) is not None
        if similarity is None or not (alike or (not generic and () in (x, y))):
            return None
        return (a, x) == (b, y), similarity

    expected = []
    for one in asked:
        matches = [(match, -at) for at, other in enumerate(others) if (match := same(one, other))]
        if matches:
            (exact, similarity), at = max(matches)
            expected.append(Overlap(one.id, others[-at].id, similarity, exact))
    assert find_overlaps(asked, others) == expected
    assert 0 < len(expected) < len(asked)
    assert overlapping(others, asked) == {
        at for at, other in enumerate(others) if any(same(one, other) is not None for one in asked)
    }


def test_rows_that_share_a_frame_are_not_compared_with_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    similarity = near._Shingles.similarity
    monkeypatch.setattr(
        near._Shingles, "similarity", lambda self, a, b: compared.append((a, b)) or similarity(self, a, b)
    )
    frame = " ".join(f"frame{word}" for word in range(80))
    inline = [Row(n, f"{frame} city{n}") for n in range(3000)]
    apart = [Row(n, frame, " ".join(f"{word}of{n}" for word in range(30))) for n in range(3000)]
    for rows in (inline, apart):
        assert find_overlaps(rows[:1000], rows[1000:]) == []
    assert len(compared) <= 3000
