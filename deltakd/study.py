"""A chain of runs: ``python -m deltakd.study experiments/<name>`` runs the stages of its ``study.yaml`` in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.logging import RichHandler

from deltakd.cli import guarded, make_parser
from deltakd.config.folders import use_config_dir
from deltakd.distributed.ranks import is_main_process
from deltakd.io.console import make_console
from deltakd.studies.study_file import check_keys, read_study

USAGE = """Run the stages of a study, one after the other; what is finished is skipped.

  python -m deltakd.study experiments/quickstart
  python -m deltakd.study experiments/dolly_cpu --stages cache screening

A stage whose overrides hold sweeps (loss=sft,kd seed=0,1) is one run for every combination, each in
outputs/<study>/<stage>/<key=value,...>. A failed run stops neither the others of its stage
nor stages that do not read it.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("study", USAGE)
    parser.add_argument("folder", type=Path, help="folder that holds study.yaml, such as experiments/quickstart")
    parser.add_argument("--stages", nargs="+", default=[], metavar="STAGE", help="run these alone (default: all)")
    given = parser.parse_intermixed_args(argv)
    folder: Path = given.folder
    # The processes that Lightning starts for further ranks run this same command.
    console = make_console(quiet=not is_main_process())
    if console.is_terminal:
        # What is logged goes above the table of stages.
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%X", highlighter=None)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    again = " ".join(["python -m deltakd.study", str(folder), *(["--stages", *given.stages] if given.stages else [])])
    guarded(lambda: use_config_dir(given.config_dir), "")
    study = guarded(lambda: read_study(folder), again)
    # What is wrong with the stages that were asked for is said before Lightning and all models are imported.
    guarded(lambda: check_keys(study.chosen(given.stages)), again)
    from deltakd.studies.stages import run_study

    guarded(lambda: run_study(study, console, given.stages, checked=True), again)


if __name__ == "__main__":
    main()
