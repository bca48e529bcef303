"""Images: rows hold their paths or bytes, the token table their tokens, batches what the processor makes of them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from deltakd.data.sources.rows import Row, image_name
from deltakd.io.hub import hub_reachable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

#: What a processor returns of the text, which is tokenised separately.
_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets"})


_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class ImageError(ValueError):
    """An image, or the processor that reads images, can't be opened; the message says why."""


@final
class ImageReader:
    """A transformers processor as rows need it: the tokens that stand for images, and the tensors models read.

    Args:
        processor: transformers' processor of an image model.
        files: its files.
    """

    def __init__(self, processor: Any, files: Sequence[Path]) -> None:
        self._processor = processor
        self._files = files
        #: Written by the chat template once for each image, and repeated for each of its features.
        self.token = str(processor.image_token)
        self.token_id = int(processor.tokenizer.convert_tokens_to_ids(self.token))

    @cached_property
    def identity(self) -> str:
        """Everything that the tokens and tensors of an image depend on; equal for processors that agree."""
        kept = {
            key: value for key, value in self._processor.to_dict().items() if key not in ("tokenizer", "chat_template")
        }
        return json.dumps(kept, sort_keys=True, default=str)

    def expansions(self, images: Sequence[str]) -> list[str]:
        """Return the text that stands for each image in place of its one token.

        Raises:
            ImageError: an image can't be read.
        """
        return self._read(images)[1]

    def tensors(self, images: Sequence[str]) -> tuple[dict[str, Tensor], int]:
        """Return what models read of the images, in order, and the number of tokens that stand for them.

        Raises:
            ImageError: an image can't be read.
        """
        tensors, expansions = self._read(images)
        return tensors, sum(text.count(self.token) for text in expansions)

    def save(self, directory: Path) -> None:
        """Copy the processor's files."""
        for path in self._files:
            shutil.copyfile(path, directory / path.name)

    def _read(self, images: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
        opened = [_opened(image) for image in images]
        found = self._processor(
            images=opened,
            text=[self.token * len(opened)],
            return_tensors="pt",
            return_text_replacement_offsets=True,
        )
        expansions = [str(one["replacement"]) for one in found["text_replacement_offsets"][0]]
        return {name: value for name, value in found.items() if name not in _TEXT}, expansions


def _opened(image: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        source = io.BytesIO(b64decode(image.partition(",")[2], validate=True)) if image.startswith("data:") else image
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).partition("\n")[0]
        raise ImageError(f"the image {image_name(image)} can't be read: {reason}") from None


def reader_beside(tokenizer: PreTrainedTokenizerBase) -> ImageReader:
    """Return the reader of the processor in the directory, or of the hub's model, that a tokenizer comes from.

    Raises:
        ImageError: there is none, or its image processor needs a package that is not installed.
    """
    return _reader_at(str(tokenizer.name_or_path))


@lru_cache(maxsize=4)
def _reader_at(path: str) -> ImageReader:
    from transformers import PreTrainedTokenizerBase

    where = f"rows hold images, and {path or 'the tokenizer'}"
    try:
        processor = _processor_at(path)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        missing = [name for name in ("PIL", "torchvision") if not _is_installed(name)]
        needed = f" ({' and '.join(missing)} are not installed; pip install deltakd[vision])" if missing else ""
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ImageError(f"{where} gives no processor that reads them: {first:.160}{needed}") from None
    if isinstance(processor, PreTrainedTokenizerBase) or not getattr(processor, "image_token", None):
        raise ImageError(f"{where} gives no processor that reads them; give an image model, or take them out")
    return ImageReader(processor, _processor_files(path))


def _processor_at(path: str) -> Any:
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    local = {"local_files_only": not hub_reachable()}
    kind: Any = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(path, **local)), None)
    if kind is None or "video_processor" not in kind.get_attributes() or _is_installed("torchvision"):
        return AutoProcessor.from_pretrained(path, **local)
    # A processor of images and videos needs torchvision for the videos alone, which rows don't hold.
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(path, backend="pil", **local),
        "tokenizer": AutoTokenizer.from_pretrained(path, **local),
        "video_processor": None,
    }

    def check(self: Any, name: str, part: Any) -> Any:
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, part)

    without_videos: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    settings, _ = kind.get_processor_dict(path, **local)
    return without_videos.from_args_and_dict([parts[name] for name in kind.get_attributes()], settings)


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


@dataclass(frozen=True)
class RowImages:
    """The images of a row, opened only for a batch.

    Args:
        images: paths of files, or data URIs, in the order of their tokens.
        reader: reads them.
    """

    images: tuple[str, ...]
    reader: ImageReader


def row_images(row: Row, tokenizer: PreTrainedTokenizerBase) -> RowImages | None:
    """Return a row's images; None: it has none.

    Raises:
        ImageError: as ``reader_beside``.
    """
    return RowImages(row.images, reader_beside(tokenizer)) if row.images else None


@final
class SetImages:
    """The images of a data set, found by the ids of its rows.

    Args:
        rows: the rows, read on demand.
        tokenizer: of the student.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
        self._rows = rows
        self._tokenizer = tokenizer

    @cached_property
    def _places(self) -> dict[int, int]:
        ids = getattr(self._rows, "ids", None)
        listed = [row.id for row in self._rows] if ids is None else np.asarray(ids).tolist()
        return {id: place for place, id in enumerate(listed)}

    @property
    def reader(self) -> ImageReader:
        """Reads them."""
        return reader_beside(self._tokenizer)

    def of(self, row_id: int) -> RowImages | None:
        """Return the images of a row; None: it has none."""
        return row_images(self._rows[self._places[row_id]], self._tokenizer)


def processor_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what identifies the settings of the image processor in a tokenizer's directory; "" if there are none."""
    found = _processor_files(str(tokenizer.name_or_path))
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest() if found else ""


@lru_cache(maxsize=16)
def _processor_files(path: str) -> list[Path]:
    """Return the files of the processor in a directory, or of a hub's model as far as they are in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(path).is_dir() or not path:
        found: list[Any] = [Path(path) / name for name in _PROCESSOR_FILES] if path else []
    else:
        try:
            found = [try_to_load_from_cache(path, name) for name in _PROCESSOR_FILES]
        except HFValidationError:
            found = []
    return [Path(file) for file in found if isinstance(file, (str, Path)) and Path(file).is_file()]


def read_images(rows: Sequence[RowImages], input_ids: Sequence[Sequence[int]]) -> dict[str, Tensor] | None:
    """Return the tensors of all images of a batch, in the order of their tokens; None: there are none.

    Args:
        rows: the images of each row that has any.
        input_ids: the tokens of these rows.

    Raises:
        ImageError: an image can't be read, or has another size than when its row was tokenised.
    """
    if not rows:
        return None
    reader, images = rows[0].reader, [image for row in rows for image in row.images]
    tensors, tokens = reader.tensors(images)
    expected = sum(list(ids).count(reader.token_id) for ids in input_ids)
    if tokens != expected:
        names = ", ".join(map(image_name, images))
        raise ImageError(
            f"the images of a batch have {tokens} tokens, and its rows {expected}: a file has changed since the rows "
            f"were tokenised (among {names[:200]}); put it back, or delete data.cache_dir and start again"
        )
    return tensors
