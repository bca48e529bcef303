"""Images in a column of their own: their places in the turns are parts without an image, or ``<image>`` in a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

#: The columns: of Hugging Face's data sets, and of LLaVA's and LLaMA-Factory's.
IMAGE_KEYS = ("images", "image")
#: Parts of content that are an image, and where it is in them: our form, and OpenAI's.
IMAGE_PARTS = {"image": "image", "image_url": "image_url"}
_PLACE = "<image>"
_CONTENT = ("content", "value")


def with_images(record: Mapping[str, Any], turns: Any, where: str) -> Any:
    """Return a record's turns with the images of its column in their places, in order.

    Turns without a place for an image are returned as they are: the column is then not read.

    Raises:
        ValueError: there are more or fewer places than images.
    """
    key = next((key for key in IMAGE_KEYS if record.get(key) not in (None, "", [])), None)
    if key is None or not isinstance(turns, list):
        return turns
    images = record[key] if isinstance(record[key], list) else [record[key]]
    places = sum(_places(turn) for turn in turns)
    if not places:
        return turns
    if places != len(images):
        raise ValueError(
            f"{where}: {key} holds {len(images)} images, and the turns have {places} places for one (a part "
            f'{{"type": "image"}}, or {_PLACE} in a text); give one image for each place'
        )
    waiting = iter(images)
    return [_filled(turn, waiting) for turn in turns]


def holds_places(turns: Any) -> bool:
    """Return True if turns have a place for an image of the column."""
    return isinstance(turns, list) and any(map(_places, turns))


def _places(turn: Any) -> int:
    content = _content(turn)
    if isinstance(content, str):
        return content.count(_PLACE)
    return sum(map(_is_place, content)) if isinstance(content, list) else 0


def _content(turn: Any) -> Any:
    return next((turn[key] for key in _CONTENT if turn.get(key) is not None), None) if isinstance(turn, dict) else None


def _is_place(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image" and part.get("image") is None


def _filled(turn: Any, images: Iterator[Any]) -> Any:
    if not _places(turn):
        return turn
    content = _content(turn)
    if isinstance(content, str):
        # A line break between an image and its question belongs to the place, not to the text.
        pieces = re.split(rf"({_PLACE})\n?", content)
        content = [
            {"type": "image"} if piece == _PLACE else {"type": "text", "text": piece} for piece in pieces if piece
        ]
    filled = [part | {"image": next(images)} if _is_place(part) else part for part in content]
    return {key: value for key, value in turn.items() if key not in _CONTENT} | {"content": filled}
