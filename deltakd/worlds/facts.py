"""A small invented world to distil from scratch: raw text that states facts, rows that ask for them.

People have a home, a job, a pet, a food, a colour and a friend. The raw text states the facts in several forms. Facts
are dealt to the splits in pairs (home and job, ...): no training row gives away a fact that a validation or test row
asks for. Answering means remembering the raw text, so the size of a model matters.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from deltakd.worlds.made_files import write_made_files

FORMAT_VERSION = 2
#: The line between two documents of the raw text.
SEPARATOR = "<|endoftext|>"
#: Answers begin with a space: their first word then has the token that it has inside raw text, where the models have
#: met it. Prompt and answer are tokenised as one text, and the prompt ends in a line break.
ANSWER_START = " "
MANIFEST = "world.json"
FILES = ("pretrain.txt", "pretrain_val.txt", "train.jsonl", "val.jsonl", "test.jsonl", "facts.jsonl")
#: Sentences about other people before the one to complete, in ``facts.jsonl``.
SHOTS = 3
#: Each split's share of the facts (and of all other questions).
SPLITS = {"train": 0.6, "val": 0.1, "test": 0.3}
#: Lists drawn for each family that asks about lists; if there are more training rows than lists, rows repeat.
LISTS = 700


@dataclass(frozen=True)
class Attribute:
    """One thing to know about a person, and its wording in raw text and instructions."""

    #: Possible values; empty for the friend, who is a person.
    values: tuple[str, ...]
    verb: str
    participle: str
    question: str


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TOWNS = _words("Brell Costin Dunmar Fenwick Garlow Hestor Morvane Pellin Quist Rowden Selby Tavik")
JOBS = _words("baker cook doctor farmer judge lawyer miner nurse painter pilot sailor teacher")
PETS = _words("cat crab dog duck fox goat hen horse lizard mouse parrot snake")
FOODS = _words("beans bread cake cheese fish honey noodles pie porridge rice soup stew")
COLOURS = _words("black blue brown gold green grey pink purple red silver white yellow")
ATTRIBUTES = {
    "home": Attribute(TOWNS, "lives in", "living in", "Tell where {who} lives."),
    "job": Attribute(JOBS, "works as a", "working as a", "Tell what {who} works as."),
    "pet": Attribute(PETS, "keeps a", "keeping a", "Tell what {who} keeps."),
    "food": Attribute(FOODS, "eats", "eating", "Tell what {who} eats."),
    "colour": Attribute(COLOURS, "wears", "wearing", "Tell what {who} wears."),
    "friend": Attribute((), "walks with", "walking with", "Tell who {who} walks with."),
}
#: Facts that are described together and go to the same split.
PAIRS = (("home", "job"), ("pet", "food"), ("colour", "friend"))
CATEGORIES = {
    "fruit": _words("apple banana cherry fig grape lemon mango peach"),
    "tool": _words("axe chisel drill hammer pliers rake saw shovel"),
    "tree": _words("ash beech birch cedar elm maple pine willow"),
    "drink": _words("cider cocoa coffee juice lemonade milk tea water"),
    "vehicle": _words("bike boat bus car ship train truck van"),
    "instrument": _words("cello drum flute guitar harp horn piano violin"),
}
THINGS = CATEGORIES["fruit"] + CATEGORIES["tool"]
DIGITS = _words("0 1 2 3 4 5 6 7 8 9")
NAME_STARTS = _words("Bar Cor Del Fen Gal Hul Jor Kel Lin Mar Nor Pel Quin Ros Sar Tol Vin Wes Yan Zed")
NAME_ENDS = _words("bo da fi go ka lo mi nu")


@dataclass(frozen=True)
class World:
    """The people, their facts by person and attribute, and the split of each (person, pair of facts)."""

    people: tuple[str, ...]
    facts: dict[str, dict[str, str]]
    splits: dict[tuple[str, tuple[str, str]], str]

    def split(self, who: str, attribute: str) -> str:
        """Return the one split whose rows may give away or ask for this fact."""
        return next(self.splits[who, pair] for pair in PAIRS if attribute in pair)


@dataclass(frozen=True)
class Question:
    """An instruction with all its good answers, and its split."""

    split: str
    instruction: str
    answers: tuple[str, ...]
    input: str = ""


#: Yields all its questions about a world.
Family = Callable[[World, random.Random], Iterator[Question]]


def _deal(rng: random.Random, count: int) -> list[str]:
    """Return ``count`` names of splits in random order, each as often as its share."""
    val, test = round(SPLITS["val"] * count), round(SPLITS["test"] * count)
    return rng.sample(["val"] * val + ["test"] * test + ["train"] * (count - val - test), count)


def make_world(seed: int, people: int) -> World:
    """Invent the people and their facts; values are spread over people as evenly as possible.

    Raises:
        ValueError: there are more people than names, or too few people to use every value.
    """
    names = [start + end for start in NAME_STARTS for end in NAME_ENDS]
    if not 12 <= people <= len(names):
        raise ValueError(f"people={people}: the world holds 12 to {len(names)}; choose a number in between")
    rng = random.Random(f"world {seed}")
    chosen = tuple(rng.sample(names, people))
    facts: dict[str, dict[str, str]] = {who: {} for who in chosen}
    for name, attribute in ATTRIBUTES.items():
        ring = rng.sample(chosen, people)
        values = list(islice(cycle(attribute.values or ring[1:] + ring[:1]), people))  # nobody is their own friend
        for who, value in zip(ring, values, strict=True):
            facts[who][name] = value
    blocks = [(who, pair) for who in chosen for pair in PAIRS]
    return World(chosen, facts, dict(zip(blocks, _deal(rng, len(blocks)), strict=True)))


def statements(who: str, name: str, what: str) -> tuple[str, str, str]:
    """Return the sentences in which raw text states a fact."""
    verb, participle = ATTRIBUTES[name].verb, ATTRIBUTES[name].participle
    return f"{who} {verb} {what}.", f"The {name} of {who} is {what}.", f"One person {participle} {what} is {who}."


def _lookup(world: World, rng: random.Random) -> Iterator[Question]:
    """Ask for one attribute of a person by its verb."""
    for who, facts in world.facts.items():
        for name, what in facts.items():
            instruction = ATTRIBUTES[name].question.format(who=who)
            yield Question(world.split(who, name), instruction, statements(who, name, what)[:1])


def _named(world: World, rng: random.Random) -> Iterator[Question]:
    """Ask for one attribute of a person by its name."""
    for who, facts in world.facts.items():
        for name, what in facts.items():
            yield Question(world.split(who, name), f"Name the {name} of {who}.", statements(who, name, what)[1:2])


def describe(world: World, who: str, pair: tuple[str, str]) -> str:
    """State two facts about a person in one sentence."""
    first, second = (f"{ATTRIBUTES[name].verb} {world.facts[who][name]}" for name in pair)
    return f"{who} {first} and {second}."


def _describe(world: World, rng: random.Random) -> Iterator[Question]:
    """Ask for two facts about a person in one sentence."""
    for (who, pair), split in world.splits.items():
        yield Question(split, f"Describe the {pair[0]} and {pair[1]} of {who}.", (describe(world, who, pair),))


def _any_person(world: World, rng: random.Random) -> Iterator[Question]:
    """Ask for somebody with a given value: several good answers."""
    groups = [(name, what) for name, attribute in ATTRIBUTES.items() for what in attribute.values]
    for (name, what), split in zip(groups, _deal(rng, len(groups)), strict=True):
        owners = [who for who in world.people if world.facts[who][name] == what]
        if split == "train":  # a training row gives away no fact of another split
            owners = [who for who in owners if world.split(who, name) == "train"]
        for form in ("Who {}?", "Name someone who {}.") if owners else ():
            yield Question(split, form.format(f"{ATTRIBUTES[name].verb} {what}"), tuple(owners))


def _any_thing(world: World, rng: random.Random) -> Iterator[Question]:
    """Ask for a member of a category: several good answers."""
    forms = ("Name a {}.", "Give a kind of {}.", "Say a kind of {}.", "What is a kind of {}?")
    asked = [(form.format(kind), members) for kind, members in CATEGORIES.items() for form in forms]
    for (instruction, members), split in zip(asked, _deal(rng, len(asked)), strict=True):
        yield Question(split, instruction, members)


def _listed(instruction: str, words: tuple[str, ...], sizes: range, answer: Callable[[list[str]], str]) -> Family:
    """Make a family that asks about lists of distinct words."""

    def family(world: World, rng: random.Random) -> Iterator[Question]:
        drawn: dict[tuple[str, ...], None] = {}
        while len(drawn) < LISTS:
            drawn[tuple(rng.sample(words, rng.choice(sizes)))] = None
        for items, split in zip(drawn, _deal(rng, LISTS), strict=True):
            yield Question(split, instruction, (answer(list(items)),), " ".join(items))

    return family


#: The families of instructions, each with its share of the rows.
FAMILIES: dict[str, tuple[Family, float]] = {
    "lookup": (_lookup, 0.35),
    "named": (_named, 0.15),
    "describe": (_describe, 0.12),
    "any_person": (_any_person, 0.12),
    "any_thing": (_any_thing, 0.03),
    "reverse": (_listed("Reverse the numbers.", DIGITS, range(3, 4), lambda items: " ".join(items[::-1])), 0.07),
    "sort": (_listed("Sort the numbers.", DIGITS, range(3, 4), lambda items: " ".join(sorted(items))), 0.06),
    "largest": (_listed("Give the largest number.", DIGITS, range(3, 6), max), 0.05),
    "count": (_listed("Count the words.", THINGS, range(2, 5), lambda items: str(len(items))), 0.05),
}


def _person_document(world: World, rng: random.Random) -> str:
    """State all facts about one person, in any order and form, and a description."""
    who = rng.choice(world.people)
    names = rng.sample(list(ATTRIBUTES), len(ATTRIBUTES))
    sentences = [rng.choice(statements(who, name, world.facts[who][name])) for name in names]
    return " ".join([*sentences, describe(world, who, rng.choice(PAIRS))])


def _people_document(world: World, rng: random.Random) -> str:
    """State facts about different people, so that earlier sentences do not help with later ones."""
    sentences = []
    for who in rng.sample(world.people, 6):
        name = rng.choice(list(ATTRIBUTES))
        forms = statements(who, name, world.facts[who][name])
        sentences.append(rng.choice((*forms, describe(world, who, rng.choice(PAIRS)))))
    return " ".join(sentences)


def _list_document(world: World, rng: random.Random) -> str:
    """State what the remaining families ask for."""
    kind = rng.choice(list(CATEGORIES))
    words, digits = rng.sample(THINGS, rng.randint(2, 4)), rng.sample(DIGITS, 3)
    sentences = [
        f"One kind of {kind} is {rng.choice(CATEGORIES[kind])}.",
        f"The numbers {' '.join(digits)} reverse to {' '.join(digits[::-1])}.",
        f"The numbers {' '.join(digits)} sort to {' '.join(sorted(digits))}.",
        f"The words {' '.join(words)} count to {len(words)}.",
        f"The largest of {' '.join(digits)} is {max(digits)}.",
    ]
    rng.shuffle(sentences)
    return " ".join(sentences)


def _documents(world: World, rng: random.Random, count: int) -> str:
    """Write raw text: on average three documents in five about one person, one about several, one of lists."""
    makers = rng.choices((_person_document, _people_document, _list_document), (0.6, 0.2, 0.2), k=count)
    return f"\n{SEPARATOR}\n".join(make(world, rng) for make in makers) + "\n"


def _facts(world: World, seed: int) -> str:
    """Return few-shot prompts in the words of raw text, one for each fact that no training or validation row asks for.

    Each completes a sentence of the raw text; three about other people, with facts of the training rows, precede it.
    """
    rng = random.Random(f"facts {seed}")
    lines = []
    for name in ATTRIBUTES:
        told = [who for who in world.people if world.split(who, name) == "train"]
        for who in world.people:
            if world.split(who, name) != "test":
                continue
            form = rng.randrange(2)  # the third begins with the value
            shots = [statements(one, name, world.facts[one][name])[form] for one in rng.sample(told, SHOTS)]
            sentence, what = statements(who, name, world.facts[who][name])[form], world.facts[who][name]
            prompt = " ".join([*shots, sentence.removesuffix(f" {what}.")])
            lines.append(json.dumps({"prompt": prompt, "completion": f" {what}.", "attribute": name}) + "\n")
    return "".join(lines)


def _rows(world: World, seed: int, counts: dict[str, int]) -> dict[str, str]:
    """Return each split's file as JSON lines: training rows have one answer, the others all good answers."""
    rows: dict[str, list[dict[str, object]]] = {split: [] for split in SPLITS}
    quotas = {split: {name: int(share * counts[split]) for name, (_, share) in FAMILIES.items()} for split in SPLITS}
    for split, quota in quotas.items():
        quota["lookup"] += counts[split] - sum(quota.values())  # the rounding remainder
    for family, (make, _) in FAMILIES.items():
        rng = random.Random(f"{family} {seed}")
        pools: dict[str, list[Question]] = defaultdict(list)
        for question in make(world, rng):
            pools[question.split].append(question)
        for split, pool in pools.items():
            rng.shuffle(pool)
            wanted = quotas[split][family]
            if split != "train" and wanted > len(pool):
                raise ValueError(
                    f"{split}_rows={counts[split]} asks for {wanted} questions of the family {family!r}, which has "
                    f"{len(pool)} there; ask for fewer rows or more people"
                )
            for question in islice(cycle(pool), wanted):
                answers = [ANSWER_START + answer for answer in question.answers]
                output = rng.choice(answers) if split == "train" else answers
                texts = {"instruction": question.instruction, "input": question.input}
                rows[split].append({**texts, "output": output, "family": family})
    for split, own in rows.items():
        random.Random(f"{split} rows {seed}").shuffle(own)
    return {f"{split}.jsonl": "".join(json.dumps(row) + "\n" for row in own) for split, own in rows.items()}


def write_world(
    directory: str | Path,
    *,
    seed: int = 0,
    people: int = 40,
    documents: int = 3000,
    train_rows: int = 2400,
    val_rows: int = 60,
    test_rows: int = 180,
) -> dict[str, Path]:
    """Write the raw text and instruction rows of one invented world, unless they already exist.

    Args:
        directory: created if missing; files there that were made with other arguments are overwritten.
        seed: for everything random; the same arguments give the same bytes.
        people: number of people; each has six facts.
        documents: number of documents in ``pretrain.txt``; ``pretrain_val.txt`` gets a twentieth of it, freshly drawn.
        train_rows: rows whose ``output`` is a string; questions repeat if the world has fewer.
        val_rows, test_rows: rows whose ``output`` is the list of all good answers; no question twice.

    Returns:
        File name (``FILES``) -> path.

    Raises:
        ValueError: an argument is out of range, the world has too few questions for the rows, or a file made with these
            arguments was edited since.
        OSError: the directory is not writable.
    """
    directory = Path(directory)
    counts = {"train": train_rows, "val": val_rows, "test": test_rows}
    arguments = {"seed": seed, "people": people, "documents": documents}
    arguments |= {f"{split}_rows": count for split, count in counts.items()}
    if min(documents, *counts.values()) < 1:
        raise ValueError(f"documents={documents} and the rows {counts} must be at least 1 each")

    def make() -> dict[str, str]:
        world = make_world(seed, people)
        return {
            "pretrain.txt": _documents(world, random.Random(f"documents {seed}"), documents),
            "pretrain_val.txt": _documents(world, random.Random(f"val documents {seed}"), -(-documents // 20)),
            **_rows(world, seed, counts),
            "facts.jsonl": _facts(world, seed),
        }

    identity = {"arguments": arguments, "format_version": FORMAT_VERSION}
    return write_made_files(directory, MANIFEST, identity, FILES, make)
