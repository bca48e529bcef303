"""Token tables on disk: built once, found again by a hash of everything they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltakd.io.files import replacing
from deltakd.io.home import expanded

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

#: Raise it when a change gives the same inputs different tokens, or the table different columns.
FORMAT_VERSION = 2
#: Fewer rows than this take seconds to tokenise and need no progress bar.
LONG_TABLE = 20_000


def fingerprint(*parts: Any) -> str:
    """Return the sha256 (64 hex digits) of JSON-able parts and the format version."""
    digest = hashlib.sha256(str(FORMAT_VERSION).encode())
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of everything that decides how the tokenizer turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    # Left over from the tokenizer's last call; our calls set neither.
    state = {key: value for key, value in state.items() if backend is None or key not in ("truncation", "padding")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return fingerprint(type(tokenizer).__name__ if backend is None else "", state, special)


def cached_table(key: str, cache_dir: str | Path | None, build: Callable[[], Dataset]) -> Dataset:
    """Load the table from ``cache_dir``, or build it and store it there.

    A table gets its final name only when complete, so interrupted and concurrent processes do no harm.

    Args:
        key: ``fingerprint`` of what the table depends on.
        cache_dir: folder, created if missing; None keeps nothing.
        build: makes the table.
    """
    if cache_dir is None:
        return build()
    final = expanded(cache_dir) / f"tokens-{key}"
    if not final.is_dir():
        _store(build(), final)
    from datasets import Dataset, load_from_disk

    table = load_from_disk(str(final))
    assert isinstance(table, Dataset)
    return table


def _store(table: Dataset, final: Path) -> None:
    with replacing(final, "tokens", first_wins=True) as partial, quiet(len(table)):
        table.save_to_disk(str(partial))


@contextmanager
def quiet(rows: int) -> Iterator[None]:
    """Hide the progress bars of ``datasets`` for tables of fewer than LONG_TABLE rows."""
    import datasets

    if rows >= LONG_TABLE or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def flat_column(table: Dataset, name: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return a column of lists as (flat [tokens] int32, offsets [n + 1] int64)."""
    chunks = table.data.column(name).chunks
    lengths = np.concatenate([chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks])
    flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks])
    return flat.astype(np.int32), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def plain_column(table: Dataset, name: str) -> NDArray[np.int64]:
    """Return a column of integers as [n] int64."""
    return table.data.column(name).to_numpy().astype(np.int64)
