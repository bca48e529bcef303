"""Runs the references once over the rows missing from a cache."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltakd.data import EncodedSet, LoadedSets
from deltakd.io.files import WriteError
from deltakd.io.progress import progress_bar
from deltakd.references import CacheStore, StoreError
from deltakd.references.begin import Caching
from deltakd.references.content import missing_rows, named_sets
from deltakd.references.index import RowIndex, keys_of_rows, keys_of_set
from deltakd.references.store import OFFSETS, OTHER_OFFSETS, ROW_KEYS

log = logging.getLogger(__name__)

#: A shard ends before the batch that would exceed one of these; an interruption loses at most one shard.
SHARD_ROWS = 4096
SHARD_BYTES = 64 * 2**20
#: Bytes per row for its key and offset.
ROW_BYTES = 24


def summary_of(store: CacheStore) -> dict[str, Any]:
    """Return the ``summary.json`` of a cache."""
    content, shards = store.manifest.content, store.manifest.shards
    return {
        "store": content["store"],
        "models": content["models"],
        **({"routes": content["routes"]} if content.get("routes") else {}),
        "k": content["k"],
        "temperature": content["temperature"],
        "rows": sum(shard.rows for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "bytes_per_token": content["bytes_per_token"],
        "bytes": sum(file.bytes for file in store.manifest.files),
        "sample": store.manifest.sample,
    }


def drop_damaged(store: CacheStore) -> None:
    """Remove damaged files from the cache; filling it recreates them."""
    bad = store.bad_files(checksum=True)
    for file, problem in bad.items():
        log.info("%s %s; it is made again.", store.path / file, problem)
    store.drop(bad)


def make_missing(caching: Caching, store: CacheStore) -> float | None:
    """Run the references over all rows missing from the store. Each shard is written as soon as it is full.

    Returns:
        The speed in valid tokens/s; None if nothing was left to do.
    """
    content = store.manifest.content
    heads = _head_tensors(caching) if content["store"] == "hidden" and store.manifest.heads is None else {}
    todo = _rows_to_run(missing_rows(RowIndex(store), caching.sets), caching.sets)
    sets = named_sets(caching.sets)
    _announce(
        store, {name: sets[name].valid_tokens[rows] for name, rows in todo.items()}, _size(store, sets, todo), heads
    )
    if heads:
        with _disk_full(store, caching.sets):
            store.set_heads(heads)
    total, done, tokens, seconds = sum(map(len, todo.values())), 0, 0, 0.0
    with progress_bar("references", total, caching.show_progress) as advance:
        # A shard has the rows of one pair of teachers: pairs may differ in width.
        groups = [(name, own) for name, rows in todo.items() for own in caching.groups(sets[name], rows).values()]
        for name, rows in groups:
            for batches in plan_shards(sets[name], rows, caching.data.full_rows, row_bytes(sets[name], content)):
                began = time.perf_counter()
                tensors = _run_shard(caching, sets[name], batches, content, _from(advance, done))
                with _disk_full(store, caching.sets):
                    shard = store.add_shard(tensors)
                seconds += time.perf_counter() - began
                done += shard.rows
                tokens += shard.tokens
                log.info("%s: %d of %d rows done.", shard.file, done, total)
    return round(tokens / seconds, 1) if seconds else None


def _from(advance: Callable[[int], None], start: int) -> Callable[[int], None]:
    return lambda done: advance(start + done)


def _head_tensors(caching: Caching) -> dict[str, Tensor]:
    """Return copies of ``<role>.weight`` and ``<role>.bias``: a file holds no views, so each role stores its own."""
    assert caching.outside is None, "log-probs of a few tokens give no heads"
    heads = caching.model_heads(caching.examples())
    parts = {f"{role}.weight": head.weight for role, head in heads.items()}
    parts |= {f"{role}.bias": head.bias for role, head in heads.items() if head.bias is not None}
    return {name: tensor.detach().cpu().clone() for name, tensor in parts.items()}


def _rows_to_run(missing: dict[str, NDArray[np.int64]], sets: LoadedSets) -> dict[str, NDArray[np.int64]]:
    """Return set -> missing rows; of rows with equal content only one."""
    seen: set[bytes] = set()
    todo = {}
    for name, encoded in named_sets(sets).items():
        keys = [key.tobytes() for key in keys_of_set(encoded)]
        chosen = []
        for row in missing[name].tolist():
            if keys[row] not in seen:
                seen.add(keys[row])
                chosen.append(row)
        todo[name] = np.array(chosen, dtype=np.int64)
    return todo


def row_bytes(encoded: EncodedSet, content: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return [n], the bytes that the tokens of each row of a set take in a cache."""
    own = encoded.valid_tokens * content["bytes_per_token"]
    if "bytes_of_pair" in content:
        assert encoded.tasks is not None, "rows are routed as they are loaded"
        each = {int(pair): size for pair, size in content["bytes_of_pair"].items()}
        # A pair without a row when the cache was begun may have some now.
        of_rows = [each.get(pair, content["bytes_per_token"]) for pair in encoded.tasks.pairs.tolist()]
        own = encoded.valid_tokens * np.array(of_rows, np.int64)
    other = content.get("other")
    return (
        own if other is None or encoded.other is None else own + encoded.other.valid_tokens * other["bytes_per_token"]
    )


def _size(store: CacheStore, sets: Mapping[str, EncodedSet], rows: Mapping[str, NDArray[np.int64]]) -> int:
    """Return the bytes that rows take: their tokens, keys and offsets."""
    content = store.manifest.content
    return sum(int(row_bytes(sets[name], content)[of].sum()) + len(of) * ROW_BYTES for name, of in rows.items())


def plan_shards(
    encoded: EncodedSet, rows: NDArray[np.int64], batch_size: int, bytes_per_row: NDArray[np.int64]
) -> Iterator[list[NDArray[np.int64]]]:
    """Yield the batches of each shard; the rows of a batch have similar lengths.

    Shards end at batch boundaries, so that an interrupted run continues with the same batches.

    Args:
        encoded: the set.
        rows: positions in it.
        batch_size: rows per batch.
        bytes_per_row: [n] bytes of the stored tokens of each row of the set.
    """
    ordered = rows[np.argsort(encoded.lengths[rows], kind="stable")]
    shard: list[NDArray[np.int64]] = []
    held_rows, held_bytes = 0, 0
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        size = int(bytes_per_row[batch].sum())
        if shard and (held_rows + len(batch) > SHARD_ROWS or held_bytes + size > SHARD_BYTES):
            yield shard
            shard, held_rows, held_bytes = [], 0, 0
        shard.append(batch)
        held_rows += len(batch)
        held_bytes += size
    if shard:
        yield shard


@torch.no_grad()
def _run_shard(
    caching: Caching,
    encoded: EncodedSet,
    batches: Sequence[NDArray[np.int64]],
    content: dict[str, Any],
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """Return the arrays of a shard."""
    parts: list[dict[str, Tensor]] = []
    done = 0
    for rows in batches:
        batch = caching.batch(encoded, rows)
        parts.append(caching.tensors(batch, content))
        done += len(rows)
        progress(done)
    rows = np.concatenate(batches)
    keys = keys_of_rows(encoded, rows.tolist())
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    tensors |= {ROW_KEYS: torch.from_numpy(keys.copy()), OFFSETS: _offsets(encoded, rows)}
    return tensors if encoded.other is None else tensors | {OTHER_OFFSETS: _offsets(encoded.other, rows)}


def _offsets(encoded: EncodedSet, rows: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(encoded.valid_tokens[rows])]))


def _announce(
    store: CacheStore, valid_tokens: dict[str, NDArray[np.int64]], size: int, heads: dict[str, Tensor]
) -> None:
    """Log how much will be stored: the rows' tokens and keys, and the output embeddings.

    Raises:
        StoreError: the disk has less free space than that.
    """
    content = store.manifest.content
    each = content["bytes_per_token"]
    tokens = {name: int(counts.sum()) for name, counts in valid_tokens.items()}
    rows = sum(map(len, valid_tokens.values()))
    embeddings = sum(tensor.nbytes for tensor in heads.values())
    needed = size + embeddings
    free = shutil.disk_usage(store.path).free
    log.info(
        "%s: %s%d bytes per valid token x %d tokens (%s) in %d rows, and %s of output embeddings: %s; %s are free.",
        store.path,
        "at most " if len(set(content.get("bytes_of_pair", {}).values())) > 1 else "",
        each,
        sum(tokens.values()),
        ", ".join(f"{name} {count}" for name, count in tokens.items()),
        rows,
        in_units(embeddings),
        in_units(needed),
        in_units(free),
    )
    if needed > free:
        raise StoreError(
            f"the cache reference.path={store.path} needs {in_units(needed)} more, and {in_units(free)} are free; make "
            "room, give a directory on another disk, or store less (reference.store=topk, reference.dtype=bfloat16)"
        )


def in_units(size: float) -> str:
    """Format bytes as KiB, MiB or GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 2**10:.2f} KiB"


@contextmanager
def _disk_full(store: CacheStore, sets: LoadedSets) -> Iterator[None]:
    """Turn "no space left" into a message with the progress so far and the remedy.

    Raises:
        StoreError: the disk or the user's quota is full.
    """
    try:
        yield
    except WriteError as error:
        if not error.is_full:
            raise
        done = sum(shard.rows for shard in store.manifest.shards)
        missing = missing_rows(RowIndex(store), sets)
        rows = sum(map(len, missing.values()))
        needed = _size(store, named_sets(sets), missing)
        raise StoreError(
            f"the disk of reference.path={store.path} is full ({error.reason}): {done} rows are stored, {rows} need "
            f"another {in_units(needed)}, {in_units(shutil.disk_usage(store.path).free)} are free. Nothing half "
            "written is left; free some space, and the same command continues"
        ) from None
