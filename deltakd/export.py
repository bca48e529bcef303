"""Write or upload a student: ``python -m deltakd.export run=DIR output=DIR [push_to_hub=owner/name]``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from deltakd.cli import guarded, read_arguments
from deltakd.io.errors import ConfigError
from deltakd.io.run_directory import RunDirectory

USAGE = """Write a finished run's student to a directory, or upload it, with a model card that says how it was made.

  python -m deltakd.export run=RUN_DIR output=DIR
  python -m deltakd.export run=RUN_DIR push_to_hub=OWNER/NAME [private=true] [output=DIR]
"""
KEYS = ("run", "output", "push_to_hub", "private")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("deltakd.export", description=USAGE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="key=value", help=", ".join(KEYS))
    arguments = parser.parse_args(argv).arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    guarded(lambda: export(arguments), "the same command")


def export(arguments: Sequence[str]) -> None:
    """Export as the ``key=value`` arguments say.

    Raises:
        ConfigError: all problems with them, or the hub's error.
    """
    given, problems = _read(arguments)
    if problems:
        raise ConfigError(problems)
    # This imports the hub's client and torch; --help and a mistyped key should not wait for it.
    from deltakd.results.publishing import run_export

    output = Path(given["output"]) if "output" in given else None
    private = given.get("private", "false").lower() == "true"
    run_export(RunDirectory(Path(given["run"])), output, given.get("push_to_hub"), private)


def _read(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the arguments by key, and the problems with them."""
    given, problems = read_arguments(arguments, KEYS)
    if "run" not in given:
        problems.append("run=<run directory> is missing")
    if given.get("private", "false").lower() not in ("true", "false"):
        problems.append(f"private={given['private']}: give true or false")
    return given, problems


if __name__ == "__main__":
    main()
