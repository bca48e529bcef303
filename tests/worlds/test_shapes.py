"""The drawn shapes, counted again in the pixels alone."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor
from transformers import AutoTokenizer

from deltakd.data.encoding.image_reader import reader_beside
from deltakd.worlds.shapes import CELL, COLOURS, GRID, IMAGE_TOKEN, ROWS, SHAPES, write_shapes

SIZES = {"captions": 60, "questions": 30, "train_rows": 30, "val_rows": 10, "test_rows": 60}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, **SIZES)
    return folder


def read(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def parts(row: dict[str, Any]) -> tuple[str, str, str]:
    """Image, question and answer."""
    (image, text), answer = row["messages"][0]["content"], row["messages"][1]["content"]
    return image["image"], text["text"], answer


def seen(image: str) -> Counter[tuple[str, str]]:
    """(colour, shape) -> number, from the pixels: a square fills its box, a circle most of it, a triangle half."""
    opened = Image.open(io.BytesIO(b64decode(image.partition(",")[2]))).convert("RGB")
    names = {ImageColor.getrgb(code): name for name, code in COLOURS.items()}
    found: Counter[tuple[str, str]] = Counter()
    for cell in range(GRID * GRID):
        left, top = cell % GRID * CELL, cell // GRID * CELL
        places = [(x, y) for x in range(left, left + CELL) for y in range(top, top + CELL)]
        filled = [at for at in places if opened.getpixel(at) in names]
        if not filled:
            continue
        sides = [max(at[axis] for at in filled) - min(at[axis] for at in filled) + 1 for axis in (0, 1)]
        share = len(filled) / (sides[0] * sides[1])
        shape = "square" if share == 1 else "circle" if share > 0.7 else "triangle"
        colour = names[opened.getpixel(filled[0])]  # type: ignore[index]
        found[colour, shape] += 1
    return found


def test_captions_say_what_is_drawn(directory: Path) -> None:
    for row in read(directory, "captions.jsonl"):
        image, _, caption = parts(row)
        said = re.findall(r"(\d) (\w+) (circle|square|triangle)s?", caption)
        assert len(said) == 2
        assert seen(image) == Counter({(colour, shape): int(count) for count, colour, shape in said})


@pytest.mark.parametrize("name", ["questions.jsonl", "train.jsonl", "val.jsonl", "test.jsonl"])
def test_answers_are_right(directory: Path, name: str) -> None:
    for row in read(directory, name):
        image, question, answer = parts(row)
        [shape] = [shape for shape in SHAPES if shape in question]
        of_shape = {colour: count for (colour, drawn), count in seen(image).items() if drawn == shape}
        if row["task"] == "how many":
            count = sum(of_shape.values())
            assert answer == f"There {'is' if count == 1 else 'are'} {count or 'none'}."
        else:
            assert answer == f"They are {next(iter(of_shape))}."


def test_no_image_is_in_two_files_or_twice(directory: Path) -> None:
    images = [parts(row)[0] for name in ROWS for row in read(directory, name)]
    assert len(set(images)) == len(images)


def test_the_processor_gives_a_token_to_each_cell(directory: Path) -> None:
    """The experiments' configurations name the image token by its id."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "processor")
    reader = reader_beside(tokenizer)
    text = reader.expansions([parts(row)[0] for row in read(directory, "val.jsonl")[:2]])
    assert [one.count(IMAGE_TOKEN) for one in text] == [GRID * GRID] * 2
    config = Path(__file__).parents[2] / "conf" / "experiment" / "shapes_cpu_pretrain.yaml"
    assert f"image_token_id: {reader.token_id}\n" in config.read_text()
