"""A cache of references on disk: shards, written whole or not at all, and the manifest that lists them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from deltakd.io.files import PARTIAL, make_folder, write_bytes, write_json

#: Increase it when older files can no longer be read.
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
#: Arrays of a shard that belong to no role.
ROW_KEYS, OFFSETS, SUPPORT = "row_keys", "offsets", "support"
#: Offsets of the rows' tokens in the teachers' tokenizer, if they have one of their own.
OTHER_OFFSETS = "other_offsets"
#: Safetensors dtype -> numpy dtype; numpy lacks bfloat16, so its bits are read as 16-bit integers.
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<i2", "U8": "u1", "U16": "<u2", "I32": "<i4", "I64": "<i8"}


class StoreError(ValueError):
    """The cache can't be used in its current state; the message names the remedy."""


@dataclass(frozen=True)
class StoredFile:
    """A file of the cache as it was written.

    Args:
        file: its name.
        bytes: its size.
        sha256: over its content.
        rows, tokens: numbers of rows and tokens, if it is a shard.
    """

    file: str
    bytes: int
    sha256: str
    rows: int = 0
    tokens: int = 0

    def problem(self, folder: Path, checksum: bool) -> str | None:
        """Return the file's problem, in a few words; None if it is intact.

        Args:
            folder: where it is.
            checksum: also check its sha256, which reads the whole file.
        """
        path = folder / self.file
        if not path.is_file():
            return "is not there"
        size = path.stat().st_size
        if size != self.bytes:
            return f"has {size} bytes instead of {self.bytes}"
        if checksum:
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != self.sha256:
                    return "has another content than was written (its sha256 differs)"
        return None


@dataclass
class Manifest:
    """The format of a cache, and the inputs that its content depends on.

    Args:
        content: everything that determines the files' content (see ``deltakd.references.content``).
        heads: the file of the output embeddings; None in a top-K store, which needs none.
        shards: in the order of their names.
        sample: the result of ``sample_errors`` when a top-K store was created.
    """

    content: dict[str, Any]
    heads: StoredFile | None = None
    shards: list[StoredFile] = field(default_factory=list)
    sample: list[dict[str, Any]] = field(default_factory=list)

    @property
    def files(self) -> list[StoredFile]:
        """All files except the manifest itself."""
        return [*([] if self.heads is None else [self.heads]), *self.shards]


@dataclass(frozen=True)
class CacheStore:
    """A directory with a manifest.

    Args:
        path: the directory.
        manifest: its content in memory; ``save`` writes it.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def create(cls, path: Path, content: dict[str, Any], sample: list[dict[str, Any]]) -> CacheStore:
        """Create an empty cache on disk.

        Raises:
            StoreError: the directory holds something else.
        """
        if path.is_dir() and any(p for p in path.iterdir() if p.suffix != PARTIAL and p.name != "tokenizer"):
            raise StoreError(f"reference.path={path} is not empty and holds no cache; give another directory")
        make_folder(path, "the cache of references")
        store = cls(path, Manifest(content, sample=sample))
        store.save()
        return store

    @classmethod
    def open(cls, path: Path) -> CacheStore:
        """Open an existing cache.

        Raises:
            StoreError: there is none, or its manifest can't be read.
        """
        file = path / MANIFEST
        if not file.is_file():
            raise StoreError(
                f"reference.path={path} holds no cache of references; make it with the same overrides: "
                f"python -m deltakd.cache ... reference=cached reference.path={path}"
            )
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            if held["format"] != FORMAT_VERSION:
                raise StoreError(
                    f"{file} is of format {held['format']}, and this version of deltakd reads {FORMAT_VERSION}; make "
                    "the cache again in another directory"
                )
            heads = None if held["heads"] is None else StoredFile(**held["heads"])
            shards = [StoredFile(**entry) for entry in held["shards"]]
            return cls(path, Manifest(held["content"], heads, shards, held["sample"]))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise StoreError(
                f"{file} is damaged ({type(error).__name__}: {error}); remove {path} and make the cache again"
            ) from None

    @staticmethod
    def is_at(path: Path) -> bool:
        """True if the directory holds a cache, complete or not."""
        return (path / MANIFEST).is_file()

    def save(self) -> None:
        manifest = self.manifest
        entries = {
            "format": FORMAT_VERSION,
            "content": manifest.content,
            "sample": manifest.sample,
            "heads": None if manifest.heads is None else asdict(manifest.heads),
            "shards": [asdict(shard) for shard in manifest.shards],
        }
        write_json(self.path / MANIFEST, entries, indent=1)

    def add_shard(self, tensors: Mapping[str, Tensor]) -> StoredFile:
        """Write a shard under the first free number, then the manifest.

        Args:
            tensors: ``row_keys`` [rows, 16] uint8, ``offsets`` [rows + 1] int64 (with two tokenizers also
                ``other_offsets``), and the tokens' arrays.

        Raises:
            WriteError: the disk is full; no part of the shard is left.
        """
        taken = {shard.file for shard in self.manifest.shards}
        number = next(n for n in range(len(taken) + 1) if _shard_name(n) not in taken)
        rows, tokens = len(tensors[ROW_KEYS]), int(tensors[OFFSETS][-1])
        shard = self._write(_shard_name(number), tensors, rows, tokens)
        self.manifest.shards[:] = sorted([*self.manifest.shards, shard], key=lambda entry: entry.file)
        self.save()
        return shard

    def set_heads(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the output embeddings ``<role>.weight`` and ``<role>.bias``, then the manifest."""
        self.manifest.heads = self._write("heads.safetensors", tensors, 0, 0)
        self.save()

    def _write(self, name: str, tensors: Mapping[str, Tensor], rows: int, tokens: int) -> StoredFile:
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        write_bytes(self.path / name, content)
        return StoredFile(name, len(content), hashlib.sha256(content).hexdigest(), rows, tokens)

    def bad_files(self, checksum: bool) -> dict[str, str]:
        """Return file -> problem, for every damaged file."""
        problems = {entry.file: entry.problem(self.path, checksum) for entry in self.manifest.files}
        return {file: problem for file, problem in problems.items() if problem is not None}

    def check(self, checksum: bool) -> None:
        """Check that all files are unchanged since they were written.

        Raises:
            StoreError: names every damaged file and the command that recreates it.
        """
        bad = self.bad_files(checksum)
        if bad:
            shown = "; ".join(f"{file} {problem}" for file, problem in bad.items())
            raise StoreError(
                f"reference.path={self.path} is damaged: {shown}. Make these files again: "
                f"python -m deltakd.cache ... reference=cached reference.path={self.path} reference.remake=true"
            )

    def drop(self, files: Mapping[str, str]) -> None:
        """Delete files and their manifest entries; filling the cache recreates them."""
        for file in files:
            (self.path / file).unlink(missing_ok=True)
        if self.manifest.heads is not None and self.manifest.heads.file in files:
            self.manifest.heads = None
        self.manifest.shards[:] = [shard for shard in self.manifest.shards if shard.file not in files]
        self.save()

    def read_heads(self) -> dict[str, Tensor]:
        """Return the output embeddings; empty if the store has none."""
        entry = self.manifest.heads
        return {} if entry is None else load_file(self.path / entry.file)


def _shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def map_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a safetensors file, memory-mapped; bfloat16 comes as its bits in int16."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    content = np.memmap(path, mode="r", dtype=np.uint8)
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in entry["data_offsets"])
            arrays[name] = content[start:stop].view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def as_tensor(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Return a tensor that shares the array's memory; int16 holding bfloat16 bits becomes bfloat16 again."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor
