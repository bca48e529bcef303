"""Images of rows and sets: rows hold paths or bytes, the token table their tokens, batches what the processor makes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

from deltakd.data.encoding.image_reader import DIGEST_BYTES, ImageError, ImageReader, image_bytes, reader_beside
from deltakd.data.sources.rows import Row, image_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RowImages:
    """The images of a row, opened only for a batch.

    Args:
        images: paths of files, or data URIs, in the order of their tokens.
        reader: reads them.
        digest: ``ImageReader.digest`` of their content when the row was tokenised.
    """

    images: tuple[str, ...]
    reader: ImageReader
    digest: bytes


def row_images(row: Row, tokenizer: PreTrainedTokenizerBase) -> RowImages | None:
    """Return a row's images as they are now; None: it has none.

    Raises:
        ImageError: as ``reader_beside``, or an image can't be read.
    """
    if not row.images:
        return None
    reader = reader_beside(tokenizer)
    return RowImages(row.images, reader, reader.digest([image_bytes(image) for image in row.images]))


@final
class SetImages:
    """The images of a data set, found by the numbers of its rows.

    Args:
        rows: the rows, read on demand.
        row_ids: [n] int64, the row of each example.
        digests: [n, 16] uint8 of each example's images; zeros: it has none.
        tokenizer: of the student.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        row_ids: NDArray[np.int64],
        digests: NDArray[np.uint8],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._rows = rows
        self._row_ids = row_ids
        self._digests = digests
        self._tokenizer = tokenizer
        self.some_lack = not digests.any(1).all()

    @cached_property
    def _places(self) -> dict[int, int]:
        ids = getattr(self._rows, "ids", None)
        listed = [row.id for row in self._rows] if ids is None else np.asarray(ids).tolist()
        return {id: place for place, id in enumerate(listed)}

    @property
    def examples(self) -> list[int]:
        """The examples that have images."""
        found: list[int] = np.flatnonzero(self._digests.any(1)).tolist()
        return found

    @cached_property
    def _by_row(self) -> dict[int, int]:
        return {row_id: index for index, row_id in enumerate(self._row_ids.tolist())}

    @property
    def reader(self) -> ImageReader:
        """Reads them."""
        return reader_beside(self._tokenizer)

    def digest(self, index: int) -> bytes:
        """Return the digest of an example's images; b"": it has none."""
        found = self._digests[index]
        return found.tobytes() if found.any() else b""

    def of(self, index: int) -> RowImages | None:
        """Return the images of an example; None: it has none."""
        digest = self.digest(index)
        if not digest:
            return None
        row = self._rows[self._places[int(self._row_ids[index])]]
        return RowImages(row.images, self.reader, digest)

    def of_row(self, row_id: int) -> RowImages | None:
        """Return the images of the row with an id; None: it has none."""
        return self.of(self._by_row[row_id])

    @property
    def fingerprint(self) -> str:
        """sha256 of the content of all images, in order, and of how they are prepared."""
        return hashlib.sha256(np.ascontiguousarray(self._digests).data).hexdigest()


def image_stamp(rows: Sequence[Row]) -> str:
    """Return what shows, without reading them, that the files of the rows' images are as they were: sizes and times."""
    found = hashlib.sha256()
    for row in rows:
        for image in row.images:
            if not image.startswith("data:"):
                try:
                    state = os.stat(image)
                except (OSError, ValueError):
                    # It is named when it is read.
                    continue
                found.update(f"{state.st_size} {state.st_mtime_ns}\n".encode())
    return found.hexdigest()


def digest_rows(rows: Sequence[RowImages | None]) -> NDArray[np.uint8]:
    """Return [n, 16] uint8, the digest of each row's images; zeros: it has none."""
    none = bytes(DIGEST_BYTES)
    found = b"".join(none if one is None else one.digest for one in rows)
    return np.frombuffer(found, np.uint8).reshape(-1, DIGEST_BYTES)


def read_images(
    rows: Iterable[tuple[RowImages | None, Sequence[int] | NDArray[np.int32]]],
) -> dict[str, Tensor] | None:
    """Return the tensors of all images of a batch, in the order of their tokens; None: there are none.

    Args:
        rows: images, None if it has none, and tokens of each row.

    Raises:
        ImageError: an image can't be read, or has changed since its row was tokenised.
    """
    held = [(images, ids) for images, ids in rows if images is not None]
    if not held:
        return None
    reader = held[0][0].reader
    contents = [[(image, image_bytes(image)) for image in row.images] for row, _ in held]
    for (row, _), content in zip(held, contents, strict=True):
        if reader.digest([each for _, each in content]) != row.digest:
            names = ", ".join(map(image_name, row.images))
            raise ImageError(
                f"an image has changed since its row was tokenised (among {names[:200]}); put it back, or start the "
                "run again"
            )
    tensors, tokens = reader.tensors(contents)
    expected = [list(ids).count(reader.token_id) for _, ids in held]
    assert tokens == expected, f"equal files give equal tokens: {tokens}, {expected}"
    return tensors
