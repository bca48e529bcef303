from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deltakd.io.arrays import ArrayWriter, kept_arrays

DTYPES = {"ids": "<i4", "none": "<i8", "text": "u1"}


def build(writer: ArrayWriter) -> None:
    for piece in range(3):
        writer.append("ids", np.arange(4) + 10 * piece)
        writer.append_bytes("text", b"ab")
    writer.meta["rows"] = 3


@pytest.mark.parametrize("kept", [True, False])
def test_pieces_come_back_as_one_array_that_nobody_can_change(tmp_path: Path, kept: bool) -> None:
    found = kept_arrays("new", tmp_path / "cache" if kept else None, DTYPES, build)
    assert found.arrays["ids"].tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert (found.arrays["none"].tolist(), found.arrays["text"].tobytes(), found.meta) == ([], b"ababab", {"rows": 3})
    with pytest.raises(ValueError, match="read-only"):
        found.arrays["ids"][0] = 1


def test_a_folder_is_built_once_and_only_whole(tmp_path: Path) -> None:
    def fail(writer: ArrayWriter) -> None:
        build(writer)
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"):
        kept_arrays("new", tmp_path, DTYPES, fail)
    assert list(tmp_path.iterdir()) == []
    kept_arrays("new", tmp_path, DTYPES, build)
    assert len(kept_arrays("new", tmp_path, DTYPES, fail).arrays["ids"]) == 12


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("ids", b"1234", "ids has 4 bytes, not 48"), ("text", None, "text"), ("arrays.json", b"{", "can't be read")],
)
def test_a_file_that_is_not_as_it_was_written_is_named(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    kept_arrays("new", tmp_path, DTYPES, build)
    file = tmp_path / "new" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{said}.*: delete {tmp_path / 'new'}"):
        kept_arrays("new", tmp_path, DTYPES, build)
