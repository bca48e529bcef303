"""A report on finished runs: ``python -m deltakd.report outputs/quickstart`` writes one page, tables and figures."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltakd.cli import guarded
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory
from deltakd.tracking.redaction import redacted

if TYPE_CHECKING:
    from deltakd.evaluation.token_groups import Preservation
    from deltakd.results.methods import Method

log = logging.getLogger(__name__)

#: Maximum characters of run names in the name of a report's folder.
_LONGEST_NAME = 60

USAGE = """Compare finished runs: one page that opens without a network, and tables and figures for a paper.

  python -m deltakd.report outputs/quickstart                 a study, or any folder that holds runs
  python -m deltakd.report experiments/quickstart             the same: the stages of its table and their models
  python -m deltakd.report outputs/multirun/DATE 'outputs/kd_*' --baseline kd --output outputs/report_kd

Runs that differ in their seed alone are one method. Shift preservation is measured where a run's own directory does not
hold it yet, and kept there.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("deltakd.report", description=USAGE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="run directories, folders of them, studies, globs")
    parser.add_argument("--output", type=Path, help="folder (default: report/ beside the runs)")
    parser.add_argument("--title", help="heading (default: made from the paths)")
    parser.add_argument("--baseline", metavar="NAME", help="method to compare with (default: sft, else the first)")
    parser.add_argument(
        "--preservation",
        type=_rows,
        metavar="ROWS|off",
        help="held-out rows to measure shift preservation on (default: those of each run's summary, its "
        "evaluation.measures.rows)",
    )
    parser.add_argument(
        "--plane",
        nargs="+",
        metavar="KEY",
        help="heat maps: two config keys, and the scores in the cells, named as in summary.json (default: delta_weight "
        "loss.target.v, the main score of every set, val/kl_teacher)",
    )
    parser.add_argument("--mixed", action="store_true", help="one table for runs of different evaluation protocols")
    arguments = parser.parse_args(argv)
    if arguments.plane is not None and len(arguments.plane) < 2:
        parser.error("--plane needs two config keys, then any scores: --plane delta_weight loss.target.v val/rougeL")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    # It logs every table of every font embedded in a figure.
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    given = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["python", "-m", "deltakd.report", *given])
    guarded(lambda: write(arguments, command), "the same command; what is measured already is not measured again")


def _rows(text: str) -> int:
    """``off`` is 0."""
    if text == "off":
        return 0
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rows ≥ 1 nor off")


def write(arguments: argparse.Namespace, command: str) -> list[Path]:
    """Read the runs, compare them, and write the report.

    Returns:
        The files, the page first.

    Raises:
        ValueError: no run is found, or the baseline is not a method.
    """
    # They import torch, pandas and matplotlib; --help should not wait for them.
    from deltakd.config.loss_names import known_losses
    from deltakd.results.formats import markdown
    from deltakd.results.methods import make_methods
    from deltakd.results.page import make_page, write_report
    from deltakd.results.planes import NO_PLANE, PlaneRequest, find_planes
    from deltakd.results.reading import find_runs
    from deltakd.results.tables import make_comparisons

    found = find_runs(arguments.paths)
    log.info("%d runs found.", len(found.runs))
    notes = list(found.skipped)
    methods = make_methods(found.runs, known_losses(), notes)
    comparisons = make_comparisons(methods, arguments.baseline, arguments.mixed)
    if len({tuple(table.protocol) for table in comparisons}) > 1:
        notes.append(
            "These runs were evaluated by different protocols, so each protocol has its own table (--mixed: one table)."
        )
    preservation = {} if arguments.preservation == 0 else _preservation(methods, arguments.preservation)
    title = arguments.title or _title(arguments.paths)
    keys = arguments.plane or []
    plane = PlaneRequest(keys[0], keys[1], tuple(keys[2:])) if keys else PlaneRequest()
    if arguments.plane and not find_planes(methods, plane):
        notes.append(f"--plane {' '.join(arguments.plane)}: {NO_PLANE}")
    page = make_page(title, methods, comparisons, preservation, notes, command, plane)
    runs = [run.path for method in methods for run in method.runs]
    log.info("Writing the page and its figures.")
    files = write_report(page, arguments.output or default_output(arguments.paths, runs), tidy)
    for warning in page.warnings:
        log.warning("%s", tidy(warning))
    print(markdown(comparisons))
    log.info("%s (with report.md, table.tex and %d figures)", files[0], len(files) - 3)
    return files


def default_output(paths: Sequence[str], runs: Sequence[Path]) -> Path:
    """Return the folder of the report: ``report`` in the folder of the runs, so each has its own.

    A report on some of a folder's runs is named after them, so it does not replace the report on the whole folder.

    Args:
        paths: as given; one that is a folder above all runs, or a study, stands for all of them.
        runs: their directories.
    """
    (folder,) = {Path(os.path.commonpath([run.resolve().parent for run in runs]))}
    given = [Path(path).resolve() for path in paths]
    whole = len(given) == 1 and (folder.is_relative_to(given[0]) or (given[0] / "study.yaml").is_file())
    if whole and folder.is_relative_to(given[0]):
        folder = given[0]
    names = "_".join(re.sub(r"[^\w.=-]+", "_", path.name).strip("_") for path in given)
    name = "report" if whole else f"report_{names[:_LONGEST_NAME]}"
    return Path(os.path.relpath(folder / name)) if folder.is_relative_to(Path.cwd()) else folder / name


def _preservation(methods: Sequence[Method], rows: int | None) -> Mapping[str, list[Preservation]]:
    """Measure every trained method, leaving out the models that they learnt from."""
    runs = [
        (method.label, run)
        for method in methods
        if not method.role
        for run in method.finished
        if not run.evaluation_only
    ]
    measured: dict[str, list[Preservation]] = {}
    for number, (label, run) in enumerate(runs, 1):
        log.info("Shift preservation, %d of %d: %s", number, len(runs), tidy(str(run.path)))
        measured.setdefault(label, []).append(preservation_of(RunDirectory(run.path), rows))
    return measured


def preservation_of(directory: RunDirectory, rows: int | None = None, views: int = 4) -> Preservation:
    """Measure the shift preservation of a finished run, or say what is missing; see ``measure_preservation``."""
    from deltakd.config.build import stored_settings
    from deltakd.distributed.devices import choose_device
    from deltakd.evaluation.preservation import Preservation, RecordedRun, measure_preservation

    try:
        settings = stored_settings(directory.config)
    except ConfigError as error:
        return Preservation(missing=[f"config: {problem}" for problem in error.problems])
    run = RecordedRun(
        directory,
        settings.name,
        settings.model,
        settings.data,
        settings.evaluation.measures,
        settings.reference,
        # The accelerator of the training need not be here; that there was to be none holds here, too.
        choose_device("cpu" if settings.trainer.accelerator == "cpu" else "auto"),
    )
    return measure_preservation(run, rows, views)


def _title(paths: Sequence[str]) -> str:
    names = [Path(path).resolve().name for path in paths]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def tidy(text: str) -> str:
    """Paths relative to the working directory, and no home directory or secret."""
    return str(redacted(text.replace(f"{Path.cwd()}/", "")))


if __name__ == "__main__":
    main()
