"""Drawn shapes: images with captions that say everything, and with questions (how many, which colour).

A scene has two kinds of shapes, each in one colour, in the cells of a 3 × 3 grid. Scenes, not questions, are dealt to
the splits: no image of a question is in the captions, or in another split. Images are PNGs in the rows themselves.
"""

from __future__ import annotations

import io
import json
import random
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltakd.worlds.made_files import write_made_files

FORMAT_VERSION = 1
MANIFEST = "shapes.json"
ROWS = ("captions.jsonl", "captions_val.jsonl", "questions.jsonl", "train.jsonl", "val.jsonl", "test.jsonl")
#: The tokenizer and the processor of the models, which are made from scratch.
PROCESSOR = tuple(
    f"processor/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                                     "processor_config.json")
)  # fmt: skip
FILES = (*ROWS, *PROCESSOR)

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": "#d02020", "green": "#20a040", "blue": "#2050d0", "yellow": "#e0c020"}
#: Shapes of one kind in a scene.
COUNTS = range(1, 4)
#: Cells in a row, and pixels of a cell.
GRID, CELL = 3, 16
IMAGE_TOKEN, END = "<image>", "<|im_end|>"
#: The others that Idefics3's processor writes around an image.
_AROUND = ("<fake_token_around_image>", "<global-img>")
_TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}"
    + IMAGE_TOKEN
    + "{% else %}{{ p.text }}{% endif %}{% endfor %}{% if m.role == 'user' %}\n{% else %}"
    + END
    + "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Kind:
    """Some shapes of one colour, and the cells that they are in."""

    shape: str
    colour: str
    cells: tuple[int, ...]

    def __str__(self) -> str:
        return f"{len(self.cells)} {self.colour} {self.shape}{'s' if len(self.cells) > 1 else ''}"


@dataclass(frozen=True)
class Scene:
    """Two kinds of shapes."""

    kinds: tuple[Kind, Kind]

    @property
    def caption(self) -> str:
        """Everything there is to say, but for the places."""
        return f"There are {self.kinds[0]} and {self.kinds[1]}."

    def questions(self) -> list[tuple[str, str, str]]:
        """Return (task, question, answer) of all that can be asked."""
        found = []
        held = {kind.shape: kind for kind in self.kinds}
        for shape in SHAPES:
            count = len(held[shape].cells) if shape in held else 0
            found.append(
                (
                    "how many",
                    f"How many {shape}s are there?",
                    f"There {'is' if count == 1 else 'are'} {count or 'none'}.",
                )
            )
        for kind in self.kinds:
            found.append(("which colour", f"Which colour are the {kind.shape}s?", f"They are {kind.colour}."))
        return found


def draw_scene(rng: random.Random) -> Scene:
    """Choose a scene."""
    counts = [rng.choice(COUNTS) for _ in range(2)]
    cells = rng.sample(range(GRID * GRID), sum(counts))
    # In the order of their names, so that a caption can be known for certain.
    shapes = sorted(rng.sample(SHAPES, 2))
    colours = [rng.choice(list(COLOURS)) for _ in range(2)]
    places = (tuple(sorted(cells[: counts[0]])), tuple(sorted(cells[counts[0] :])))
    return Scene((Kind(shapes[0], colours[0], places[0]), Kind(shapes[1], colours[1], places[1])))


def paint(scene: Scene, rng: random.Random) -> bytes:
    """Return the scene as a PNG of 48 × 48 pixels; the shapes differ a little in size and place."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (GRID * CELL, GRID * CELL), "white")
    pen = ImageDraw.Draw(image)
    for kind in scene.kinds:
        for cell in kind.cells:
            size = rng.randint(4, 6)
            x, y = (CELL * at + CELL // 2 + rng.randint(-1, 1) for at in (cell % GRID, cell // GRID))
            box, colour = (x - size, y - size, x + size, y + size), COLOURS[kind.colour]
            if kind.shape == "circle":
                pen.ellipse(box, fill=colour)
            elif kind.shape == "square":
                pen.rectangle(box, fill=colour)
            else:
                pen.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], fill=colour)
    written = io.BytesIO()
    image.save(written, format="PNG")
    return written.getvalue()


def _row(image: str, question: str, answer: str, task: str | None = None) -> dict[str, Any]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return ({} if task is None else {"task": task}) | {"messages": turns}


def _rows(scenes: list[Scene], rng: random.Random, captions: bool) -> str:
    rows = []
    for scene in scenes:
        image = "data:image/png;base64," + b64encode(paint(scene, rng)).decode()
        if captions:
            rows.append(_row(image, "What is there?", scene.caption))
        else:
            task, question, answer = rng.choice(scene.questions())
            rows.append(_row(image, question, answer, task))
    return "".join(json.dumps(row) + "\n" for row in rows)


def _processor() -> dict[str, str]:
    """Return the files of a byte-level tokenizer and of Idefics3's processor for images of this size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = random.Random(0)
    scenes = [draw_scene(words) for _ in range(500)]
    texts = [scene.caption + " What is there?" for scene in scenes]
    texts += [f"{question} {answer}" for scene in scenes for _, question, answer in scene.questions()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=356, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in (END, IMAGE_TOKEN, *_AROUND)])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": None}
    images = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": GRID * CELL},
        "max_image_size": {"longest_edge": GRID * CELL},
        "do_image_splitting": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    # With patches of 8 pixels and a scale factor of 2, a token stands for one cell.
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": GRID * GRID, "image_processor": images}
    texts_of = (bpe.to_str(), json.dumps(settings), _TEMPLATE, json.dumps(processor))
    return dict(zip(PROCESSOR, texts_of, strict=True))


def write_shapes(
    directory: str | Path,
    *,
    seed: int = 0,
    captions: int = 4000,
    questions: int = 2000,
    train_rows: int = 512,
    val_rows: int = 200,
    test_rows: int = 400,
) -> dict[str, Path]:
    """Write rows with images, and a tokenizer with its image processor, unless they already exist.

    Args:
        directory: created if missing; files there that were made with other arguments are overwritten.
        seed: for everything random; the same arguments give the same scenes and texts.
        captions: rows of ``captions.jsonl``; ``captions_val.jsonl`` gets a fiftieth of it.
        questions: rows of ``questions.jsonl``, for the teacher, each about an image of its own.
        train_rows, val_rows, test_rows: the same, for students.

    Returns:
        File name (``FILES``) -> path.

    Raises:
        ValueError: an argument is below 1, or a file made with these arguments was edited since.
        OSError: the directory is not writable.
    """
    sizes = dict(zip(ROWS, (captions, -(-captions // 50), questions, train_rows, val_rows, test_rows), strict=True))
    small = [name for name, size in sizes.items() if size < 1]
    if small:
        raise ValueError(f"{', '.join(small)} must have at least 1 row")

    def make() -> dict[str, str]:
        rng, drawn = random.Random(f"scenes {seed}"), dict[Scene, None]()
        while len(drawn) < sum(sizes.values()):
            drawn[draw_scene(rng)] = None
        scenes, at, texts = list(drawn), 0, _processor()
        for name, size in sizes.items():
            own, at = scenes[at : at + size], at + size
            texts[name] = _rows(own, random.Random(f"{name} {seed}"), name.startswith("captions"))
        return texts

    identity = {"seed": seed, "sizes": sizes, "format_version": FORMAT_VERSION}
    return write_made_files(Path(directory), MANIFEST, identity, FILES, make)
