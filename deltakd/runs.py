"""Lists run directories, and compares the configs of two."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deltakd.cli import guarded
from deltakd.io.console import make_console
from deltakd.io.errors import ConfigError

USAGE = """List run directories with their state, settings and scores.

  python -m deltakd.runs [FOLDER ...] [--filter KEY=VALUE ...] [--sort KEY] [--columns KEY,KEY,...]
  python -m deltakd.runs diff RUN_A RUN_B

Keys are columns (state, loss, seed, val/rougeL, seconds, ...) and config keys (optim.lr, model.teacher.path, ...):
  python -m deltakd.runs outputs/dolly_cpu --filter 'loss=*kd' --filter 'val/rougeL>5' --sort val/rougeL
The best of the runs of each method (here those that share loss and training data):
  python -m deltakd.runs outputs/dolly_cpu/screening* --sort val/ce --ascending --best-of loss,data.train
"""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["diff"]:
        parser = argparse.ArgumentParser("deltakd.runs diff", description="The keys in which two configs differ.")
        parser.add_argument("a", type=Path, help="run directory, or config.yaml")
        parser.add_argument("b", type=Path, help="run directory, or config.yaml")
        paths = parser.parse_args(arguments[1:])
        guarded(lambda: show_differences(paths.a, paths.b), "")
        return
    parser = argparse.ArgumentParser(
        "deltakd.runs", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("outputs")], help="default: outputs")
    parser.add_argument("--filter", action="append", default=[], metavar="KEY=VALUE", help="also != > < >= <=")
    parser.add_argument("--sort", metavar="KEY", help="numbers from high to low, runs without it last")
    parser.add_argument("--ascending", action="store_true", help="sort numbers from low to high")
    parser.add_argument("--best-of", metavar="KEY,KEY", help="of runs that share these, keep the first by --sort")
    parser.add_argument("--columns", metavar="KEY,KEY", help="instead of the usual ones")
    options = parser.parse_args(arguments)
    guarded(lambda: show_runs(options), "")


def show_runs(options: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ConfigError: unknown folders, keys or conditions.
    """
    # This imports torch; --help should not wait for it.
    from deltakd.results.listing import (
        best_of,
        default_columns,
        find_entries,
        make_table,
        ordered,
        select,
        unknown_keys,
    )

    found = find_entries(options.folders)
    if not found:
        raise ConfigError([f"no run directory (one with a config.yaml) under {', '.join(map(str, options.folders))}"])
    entries = select(found, options.filter)
    columns = default_columns(entries)
    if options.columns:
        columns = ["run", *(name.strip() for name in options.columns.split(",") if name.strip() != "run")]
        problems = unknown_keys(found, columns, "--columns")
        if problems:
            raise ConfigError(problems)
    if options.sort:
        # Which keys there are does not depend on the filter.
        entries = [entry for entry in ordered(found, options.sort, options.ascending) if entry in entries]
    if options.best_of:
        keys = [name.strip() for name in options.best_of.split(",") if name.strip()]
        problems = unknown_keys(found, keys, "--best-of")
        if not options.sort:
            problems.append("--best-of needs --sort KEY, which says what is best (--ascending: the lowest)")
        if problems:
            raise ConfigError(problems)
        entries = best_of(entries, keys, options.sort)
    console = make_console()
    console.print(make_table(entries, columns, console, fixed=bool(options.columns)))
    console.print(f"{len(entries)} of {len(found)} runs", markup=False, highlight=False)


def show_differences(a: Path, b: Path) -> None:
    """Print ``key: value in a -> value in b``, one line each.

    Raises:
        ConfigError: what can't be read.
    """
    from deltakd.results.listing import differences

    for key, *values in differences(a, b):
        print(f"{key}: {' -> '.join(json.dumps(value, ensure_ascii=False, default=str) for value in values)}")


if __name__ == "__main__":
    main()
