"""Writes what the screening chose into the finals of study.yaml: the learning rate, and α, with the best dev ROUGE-L.

    python experiments/on_policy_cpu/choose.py

Ties go to the lower KL to the teacher on dev rows. All runs of the screening must be finished; no test set is read.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUTPUTS = Path("outputs/on_policy_cpu")

#: Stage of the screening -> its method, where its runs do not name their loss.
METHODS = {"screening_off": "kd", "screening_kd_reverse": "kd_reverse", "screening_delta_opd": "delta_opd"}

Chosen = dict[str, str]


def screened() -> dict[str, list[tuple[float, float, Chosen]]]:
    """Return method -> (dev ROUGE-L, minus the KL to the teacher, settings) of its runs.

    Raises:
        SystemExit: a run is not finished.
    """
    found = defaultdict(list)
    for config in sorted(OUTPUTS.glob("screening_*/*/config.yaml")):
        run = config.parent
        if not (run / "summary.json").is_file():
            raise SystemExit(f"{run} is not finished: run the stages of the screening first")
        settings = dict(pair.split("=") for pair in run.name.split(","))
        method = METHODS.get(run.parent.name) or settings.pop("loss", "exopd")
        reference = settings.pop("loss.reference", None)
        if reference is not None:
            method += "_" + reference.removesuffix("_raw")
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        assert not any(key.startswith("test/") for key in summary), f"{run} read the test set"
        found[method].append((summary["val/rougeL"], -summary["val/kl_teacher"], settings))
    return found


def written(text: str, stage: str, chosen: Chosen) -> str:
    """Return the study with a stage's settings replaced. Raises SystemExit if one is not there."""
    start = text.index(f"\n  {stage}:\n") + 1
    following = re.compile(r"^(?:  )?\w", re.MULTILINE).search(text, start + len(stage) + 3)
    end = following.start() if following else len(text)
    block = text[start:end]
    for key, value in chosen.items():
        block, count = re.subn(rf"(?<![\w.]){re.escape(key)}=[^,\]\s]+", f"{key}={value}", block)
        if count != 1:
            raise SystemExit(f"study.yaml, stage {stage}: {key} is there {count} times, not once")
    return text[:start] + block + text[end:]


def main() -> None:
    """Choose, print and write."""
    study = HERE / "study.yaml"
    text = study.read_text(encoding="utf-8")
    for method, runs in screened().items():
        rouge, kl, chosen = max(runs, key=lambda run: run[:2])
        settings = ", ".join(f"{key}={value}" for key, value in chosen.items())
        print(f"{method}: {settings} of {len(runs)} runs; dev ROUGE-L {rouge:.2f}, KL to the teacher {-kl:.3f}")
        stages = [stage for stage in (method, f"{method}_long") if f"\n  {stage}:\n" in text]
        for stage in stages:
            text = written(text, stage, chosen)
    study.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
