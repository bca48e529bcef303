"""Files of a cache: whole or not there, found by the content of rows, read without being copied whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltakd.data import Encoded, EncodedSet, collate
from deltakd.data.encoding.encoded_set import flatten
from deltakd.references import CachedReferences, CacheStore, StoreError
from deltakd.references.index import RowIndex, keys_of_batch, keys_of_set
from deltakd.references.store import OFFSETS, ROW_KEYS, map_arrays
from deltakd.types import IGNORE_INDEX, Head

ROWS = [([5, 6, 7, 8], 2), ([9, 10, 11], 1), ([5, 6, 7, 8], 3), ([12, 13], 5), ([1, 2, 3, 4, 5, 6], 4)]


def make_set() -> EncodedSet:
    """Rows with ``prompt`` tokens masked; the third has the first one's tokens, the fourth nothing to train on."""
    ids, offsets = flatten([tokens for tokens, _ in ROWS])
    labels, _ = flatten([[IGNORE_INDEX] * min(p, len(t)) + t[p:] for t, p in ROWS])
    return EncodedSet(ids, labels, offsets, np.arange(len(ROWS)))


def hidden_of(row: int) -> torch.Tensor:
    """[n, 3]: the row and the position, in bfloat16."""
    n = int(make_set().valid_tokens[row])
    return torch.tensor([[row + 0.5, t, -1.0] for t in range(n)], dtype=torch.bfloat16).reshape(n, 3)


def make_store(path: Path) -> CacheStore:
    model = {"stored_dtype": "bfloat16", "softcap": None, "scale": 1.0}
    content: dict[str, Any] = {
        "store": "hidden", "temperature": None, "k": None, "vocabulary": 20, "models": {"teacher": model},
    }  # fmt: skip
    store = CacheStore.create(path, content, [])
    store.set_heads({"teacher.weight": torch.ones(20, 3, dtype=torch.bfloat16)})
    keys = keys_of_set(make_set())
    for rows in ([1, 4], [0, 2]):
        parts = [hidden_of(row) for row in rows]
        offsets = torch.tensor([0, *np.cumsum([len(part) for part in parts])])
        store.add_shard({"teacher": torch.cat(parts), ROW_KEYS: torch.from_numpy(keys[rows].copy()), OFFSETS: offsets})
    return store


def batch_of(*rows: int) -> Any:
    encoded = make_set()
    return collate([encoded[row] for row in rows], 0, 0, 1)


def test_keys_are_of_content_alone() -> None:
    encoded = make_set()
    keys = keys_of_set(encoded)
    assert keys.shape == (5, 16)
    assert len({key.tobytes() for key in keys}) == 5, "rows that differ in their labels alone are two"
    # In any order and however much padding; the row without a valid token has no key in a batch.
    np.testing.assert_array_equal(keys_of_batch(batch_of(4, 3, 1, 0)), keys[[4, 1, 0]])
    moved = EncodedSet(encoded.input_ids[4:7], encoded.labels[4:7], np.array([0, 3]), np.array([77]))
    np.testing.assert_array_equal(keys_of_set(moved), keys[[1]])


@pytest.mark.parametrize("rows", [(0,), (4, 0, 2, 1), (2, 3, 4), (3,)], ids=str)
def test_a_batch_gets_its_tokens_in_order(tmp_path: Path, rows: tuple[int, ...]) -> None:
    references = CachedReferences(make_store(tmp_path), {"teacher"})
    given = references(batch_of(*rows))
    assert isinstance(given, dict)
    head = given["teacher"]
    assert isinstance(head, Head)
    assert head.hidden.dtype == torch.bfloat16
    expected = [hidden_of(row) for row in rows if row != 3]
    assert torch.equal(head.hidden, torch.cat([torch.empty(0, 3, dtype=torch.bfloat16), *expected]))
    assert len(head.hidden) == len(batch_of(*rows).labels_N)


def test_a_row_that_is_not_there(tmp_path: Path) -> None:
    references = CachedReferences(make_store(tmp_path), {"teacher"})
    stranger = collate([Encoded([5, 6, 7, 9], [IGNORE_INDEX, 6, 7, 9], 31)], 0, 0, 1)
    with pytest.raises(StoreError, match=r"1 of the 1 rows \[31\] are not in the cache .*; add them"):
        references(stranger)


def test_files_are_mapped_and_not_read(tmp_path: Path) -> None:
    arrays = map_arrays(make_store(tmp_path).path / "shard_00000.safetensors")
    base: Any = arrays["teacher"]
    while not isinstance(base, np.memmap):
        base = base.base
    assert arrays["teacher"].shape == (4, 3)
    assert arrays[OFFSETS].tolist() == [0, 2, 4]


def test_a_damaged_store_is_named_and_its_good_files_stay(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    first, second = (tmp_path / f"shard_0000{n}.safetensors" for n in range(2))
    content = bytearray(first.read_bytes())
    content[-3] ^= 4
    first.write_bytes(content)
    again = CacheStore.open(tmp_path)
    again.check(checksum=False)
    with pytest.raises(StoreError, match=r"is damaged: shard_00000.safetensors has another content .*remake=true"):
        again.check(checksum=True)
    second.write_bytes(second.read_bytes()[:-1])
    (tmp_path / "heads.safetensors").unlink()
    bad = again.bad_files(checksum=False)
    assert set(bad) == {"heads.safetensors", "shard_00001.safetensors"}
    assert "is not there" in bad["heads.safetensors"]
    assert f"has {second.stat().st_size} bytes instead of" in bad["shard_00001.safetensors"]
    again.drop(again.bad_files(checksum=True))
    assert CacheStore.open(tmp_path).manifest.files == []
    assert len(RowIndex(CacheStore.open(tmp_path))) == 0
    assert store.manifest.shards[0].tokens == 4


def test_what_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no cache of references; make it .*python -m deltakd.cache"):
        CacheStore.open(tmp_path)
    make_store(tmp_path / "cache")
    manifest = tmp_path / "cache" / "manifest.json"
    text = manifest.read_text()
    for damaged, message in ((text[:-40], "is damaged"), (text.replace('"format": 1', '"format": 99'), "of format 99")):
        manifest.write_text(damaged)
        with pytest.raises(StoreError, match=message):
            CacheStore.open(tmp_path / "cache")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "student.txt").write_text("x")
    with pytest.raises(StoreError, match="is not empty and holds no cache"):
        make_store(tmp_path / "full")
