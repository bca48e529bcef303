"""Sequence-level KD's data: ``python -m deltakd.generate experiment=kd_gpt2 [key=value ...]`` (arXiv 1606.07947)."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from deltakd.cli import guarded, make_parser, parse
from deltakd.config.compose import compose_config

log = logging.getLogger(__name__)

USAGE = """Let the teacher answer the training prompts; SFT on its answers is sequence-level KD.

  python -m deltakd.generate experiment=kd_gpt2 run_dir=outputs/seqkd [key=value ...]

Overrides are those of deltakd.train; the loss and the trainer's settings play no part. Answers are chosen by
  evaluation.decoding.do_sample=false  'evaluation.seeds=[10]' (the first counts)  evaluation.batch_size=32
Started again with the same run_dir it continues where it stopped.
"""

#: Overrides that only concern answering, or that SFT does not use.
_OURS = (
    "run_dir",
    "resume",
    "loss",
    "delta_weight",
    "reference",
    "model.teacher",
    "evaluation.decoding",
    "evaluation.seeds",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("generate", USAGE)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for deltakd.train")
    overrides = parse(parser, argv).overrides
    # Only from the command line: an experiment's own run_dir is for its training run.
    if not any(override.startswith("run_dir=") for override in overrides):
        overrides.append(f"run_dir=outputs/generate/{datetime.now():%Y-%m-%d_%H-%M-%S}")
    how_to_resume = f"the same command with {next(o for o in reversed(overrides) if o.startswith('run_dir='))}"
    guarded(lambda: run_generation(overrides), how_to_resume)


def run_generation(overrides: Sequence[str]) -> dict[str, Any]:
    """Answer, and log the command that trains on the answers; see ``run_answers``.

    Args:
        overrides: Hydra overrides, ``run_dir`` among them.
    """
    cfg = compose_config("train", overrides)
    # This imports torch; --help and a mistyped key should not wait for it. The models follow once the config is right.
    from deltakd.config.build import make_answering_settings

    settings = make_answering_settings(cfg)
    from deltakd.training.answering import run_answers

    run_dir = Path(str(cfg.run_dir))
    summary = run_answers(settings, run_dir)
    log.info("Next, SFT on the answers: %s", shlex.join(next_command(overrides, run_dir, bool(summary["held_out"]))))
    return summary


def next_command(overrides: Sequence[str], run_dir: Path, held_out: bool) -> list[str]:
    """Return the command that trains the student on the answers, with the same validation rows.

    Args:
        overrides: those of this command.
        run_dir: the directory that holds the answers.
        held_out: True if there is a ``val.jsonl``.
    """
    from deltakd.evaluation.teacher_answers import TRAIN_FILE, VAL_FILE

    # The rows are already chosen: nothing may be excluded or picked by line number a second time.
    sft = {"loss": "sft", "data.train": run_dir / TRAIN_FILE, "data.train_subset": "null", "data.exclude": "[]"}
    if held_out:
        sft["data.val"] = run_dir / VAL_FILE
    kept = [o for o in overrides if o.split("=", 1)[0] not in sft and not o.startswith(_OURS)]
    name = [] if any(o.startswith("name=") for o in kept) else ["name=seqkd"]
    return ["python", "-m", "deltakd.train", *kept, *name, *(f"{key}={value}" for key, value in sft.items())]


if __name__ == "__main__":
    main()
