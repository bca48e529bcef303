"""A search without a server: ``python -m deltakd.search sweeps/delta_weight.yaml [--trials 20] [key=value ...]``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from deltakd.cli import guarded, make_parser, parse
from deltakd.io.console import make_console
from deltakd.studies.sweep_files import Sweep, read_sweep

USAGE = """Run a sweep file on this machine, one trial after the other, chosen by Optuna.

  python -m deltakd.search sweeps/delta_weight.yaml [--trials 20] [--storage FILE] [key=value ...]
  python -m deltakd.search --check sweeps/delta_weight.yaml [key=value ...]

The file is one of Weights & Biases. Its overrides are those of its command, then those given here. Each trial is a run
in outputs/search/<name of the file>/<number>; the same command continues where it stopped, and --trials may grow.
At the end: the best value, search.csv and search.png.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser("search", USAGE)
    parser.add_argument("file", type=Path, help="a sweep file")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for deltakd.train")
    parser.add_argument("--check", action="store_true", help="check the file, start nothing")
    parser.add_argument("--trials", type=_count, help="how many trials, those of former starts included")
    parser.add_argument("--storage", type=Path, help="SQLite file (outputs/search/<name>/study.db)")
    given = parse(parser, argv)
    sweep = guarded(lambda: read_sweep(given.file, given.overrides), "")
    # This imports Lightning and all models; --help and a file with wrong keys should not wait for it.
    from deltakd.studies.sweep_types import check_types

    guarded(lambda: check_types(sweep), "")
    if given.check:
        print(describe(sweep))
        return
    # This imports Optuna; --help and --check should not wait for it.
    from deltakd.studies.trials import Search, run_search

    search = Search(sweep, given.storage or Path("outputs/search") / given.file.stem / "study.db", given.trials)
    words = shlex.join(sys.argv[1:] if argv is None else argv)
    console = make_console()
    guarded(lambda: run_search(search, console), f"python -m deltakd.search {words}")


def describe(sweep: Sweep) -> str:
    """Return in a line what a checked file asks for."""
    names = ", ".join(sweep.parameters)
    size = f", {sum(1 for _ in sweep.grid())} runs" if sweep.method == "grid" else ""
    return f"{sweep.path}: fine ({sweep.method} over {names}{size}; {sweep.goal} {sweep.metric})"


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} trials; give a number from 1")
    return count


if __name__ == "__main__":
    main()
