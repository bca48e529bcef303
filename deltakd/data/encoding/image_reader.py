"""Image files, and transformers' processors, which make of them tokens of text and tensors for models."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from base64 import b64decode
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from deltakd.data.sources.rows import image_name
from deltakd.io.hub import hub_reachable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

#: What a processor returns of the text, which is tokenised separately.
_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets"})


_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


#: Bytes of ``ImageReader.digest``.
DIGEST_BYTES = 16


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
        return json.dumps(self.settings, sort_keys=True, default=str)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The processor's settings, without its tokenizer."""
        every = self._processor.to_dict()
        return {key: value for key, value in every.items() if key not in ("tokenizer", "chat_template")}

    def expansions(self, images: Sequence[str]) -> list[str]:
        """Return the text that stands for each image of a row in place of its one token.

        Raises:
            ImageError: an image can't be read.
        """
        return self._read([list(zip(images, map(image_bytes, images), strict=True))])[1][0]

    def tensors(self, rows: Sequence[Sequence[tuple[str, bytes]]]) -> tuple[dict[str, Tensor], list[int]]:
        """Return what models read of the images, in order, and the number of tokens that stand for those of each row.

        Args:
            rows: (image, its content) of each row; some processors treat several images of one row unlike a single one.

        Raises:
            ImageError: an image can't be read.
        """
        tensors, expansions = self._read(rows)
        return tensors, [sum(text.count(self.token) for text in of_row) for of_row in expansions]

    def digest(self, contents: Sequence[bytes]) -> bytes:
        """Return 16 bytes that identify the files of a row's images, and how this processor prepares them."""
        found = hashlib.blake2b(self.identity.encode(), digest_size=DIGEST_BYTES)
        for content in contents:
            found.update(hashlib.blake2b(content).digest())
        return found.digest()

    def save(self, directory: Path) -> None:
        """Copy the processor's files."""
        for path in self._files:
            shutil.copyfile(path, directory / path.name)

    def _read(self, rows: Sequence[Sequence[tuple[str, bytes]]]) -> tuple[dict[str, Tensor], list[list[str]]]:
        opened = [[_opened(image, content) for image, content in row] for row in rows]
        try:
            found = self._processor(
                images=opened,
                text=[self.token * len(row) for row in opened],
                # Not of the texts: their lengths differ.
                images_kwargs={"return_tensors": "pt"},
                return_text_replacement_offsets=True,
            )
        except (ValueError, TypeError, ZeroDivisionError) as error:
            # Such as Qwen's, which takes no image 200 times as long as wide.
            names = ", ".join(image_name(image) for row in rows for image, _ in row)
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ImageError(f"{type(self._processor).__name__} can't prepare {names[:200]}: {first:.160}") from None
        expansions = [[str(one["replacement"]) for one in row] for row in found["text_replacement_offsets"]]
        return {name: value for name, value in found.items() if name not in _TEXT}, expansions


def image_bytes(image: str) -> bytes:
    """Return the content of an image: of its file, or the bytes that a row holds.

    Raises:
        ImageError: there is no such file, or it can't be read.
    """
    try:
        if image.startswith("data:"):
            return b64decode(image.partition(",")[2], validate=True)
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error).partition("\n")[0]
        raise ImageError(f"the image {image_name(image):.200} can't be read: {reason}") from None


def _opened(image: str, content: bytes) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as opened:
            # Cameras note how they were held; transformers turns images so, too.
            return ImageOps.exif_transpose(opened).convert("RGB")
    # Pillow's decoders fail in many ways on broken files.
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        reason = (
            "Pillow does not recognise it as an image"
            if "cannot identify" in str(error)
            else str(error).partition("\n")[0]
        )
        raise ImageError(f"the image {image_name(image):.200} can't be read: {reason}") from None


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
    if Path(path).is_dir() and not _processor_files(path):
        raise ImageError(f"{where} holds no image processor ({' or '.join(_PROCESSOR_FILES[:2])}); give an image model")
    try:
        processor = _processor_at(path)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        missing = [name for name in ("PIL", "torchvision") if not _is_installed(name)]
        needed = f" (not installed: {', '.join(missing)}; pip install deltakd[vision])" if missing else ""
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ImageError(f"{where} gives no processor that reads them: {first:.160}{needed}") from None
    if isinstance(processor, PreTrainedTokenizerBase) or not getattr(processor, "image_token", None):
        raise ImageError(f"{where} gives no processor that reads them; give an image model, or take them out")
    return ImageReader(processor, _processor_files(path))


def _processor_at(path: str) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    local = {"local_files_only": not hub_reachable()}
    kind = _processor_class(path, local)
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


def _processor_class(path: str, local: dict[str, Any]) -> Any:
    """Return the class of the processor in a directory or of a hub's model; None: its files don't name one."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    settings, _ = transformers.ProcessorMixin.get_processor_dict(path, **local)
    named = getattr(transformers, str(settings.get("processor_class")), None)
    if named is not None:
        return named
    # Older models name it beside the image processor's settings.
    return PROCESSOR_MAPPING.get(type(transformers.AutoConfig.from_pretrained(path, **local)), None)


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


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
