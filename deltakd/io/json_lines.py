"""Generated answers on disk: one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltakd.io.files import telling


def write_generations(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the records whole or not at all: a reader never sees half a file.

    Args:
        path: the file; its folder is made, and an older file is replaced.
        records: what ``evaluate_set`` or ``answer_set`` returned, or any others.

    Raises:
        WriteError: the disk did not take them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since os.replace is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with telling("answers", path), temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_generations(path: str | Path) -> list[dict[str, Any]] | None:
    """The records of a file, or None where there is no file.

    Raises:
        ValueError: naming the file and the line that is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return None
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}, is not JSON ({error}): delete the file to have it generated again."
                ) from error
    return records
