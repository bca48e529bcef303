"""Writes what the screening chose into the finals of study.yaml: the α with the lowest cross-entropy on dev rows.

    python experiments/shapes_cpu/choose.py

All runs of the screening must be finished; no test set is read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCREENING = Path("outputs/shapes_cpu/screening")
METHODS = ("delta_kd", "delta_gated")


def screened(method: str) -> list[tuple[float, str]]:
    """Return (dev cross-entropy, α) of a method's runs, the best first. Raises SystemExit if one is not finished."""
    found = []
    for config in SCREENING.glob(f"loss={method},*/config.yaml"):
        summary = config.with_name("summary.json")
        if not summary.is_file():
            raise SystemExit(f"{config.parent} is not finished: run the stage screening first")
        read = json.loads(summary.read_text(encoding="utf-8"))
        assert not any(key.startswith("test/") for key in read), f"{config.parent} read the test set"
        found.append((read["val/ce"], config.parent.name.rpartition("delta_weight=")[2]))
    if not found:
        raise SystemExit(f"{SCREENING} has no runs of {method}: run the stage screening first")
    return sorted(found)


def main() -> None:
    """Choose, print and write."""
    study = HERE / "study.yaml"
    text = study.read_text(encoding="utf-8")
    for method in METHODS:
        runs = screened(method)
        print(method, *(f"alpha {weight}: dev CE {value:.4f}" for value, weight in runs), sep="; ")
        text, count = re.subn(rf"(loss={method}, delta_weight=)[\d.]+", rf"\g<1>{runs[0][1]}", text)
        assert count == 1, f"study.yaml has {count} finals of {method}"
    study.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
