"""The console script ``deltakd <command> ...``, and the exit of every command: users' errors in one line."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

from deltakd.config.folders import use_config_dir
from deltakd.io.errors import NonFiniteLossError, ServerError, Stopped
from deltakd.io.files import WriteError, disk_reason, way_out

T = TypeVar("T")

#: Command -> a one-line description. Each also runs as ``python -m deltakd.<command>``.
COMMANDS = {
    "init": "write an experiment file for models and data of your own",
    "train": "train one model, or with --multirun one for every combination of settings",
    "evaluate": "score a student's answers on any set of files",
    "generate": "let a teacher answer the training prompts: the data of sequence-level KD",
    "cache": "run the references once, so that training runs read them from disk",
    "serve": "hold the references of training runs in this process, for other processes and machines",
    "study": "run the stages of an experiments/<name>/study.yaml in order",
    "search": "search hyperparameters by a sweep file, without a server",
    "report": "compare finished runs: one page, tables, figures",
    "export": "write a finished run's student to a directory, or upload it",
    "prune": "make a smaller model of a model: fewer layers, heads, channels",
    "plan": "estimate memory, compute and traffic before anything is rented",
    "runs": "list run directories, or compare the configs of two",
}

#: Commands whose arguments are Hydra overrides of conf/train.yaml.
_OVERRIDES = ("train", "evaluate", "generate", "cache", "serve", "search", "plan")

_COMPLETION = ("-sc", "--shell-completion")


def main() -> None:
    """Run the command that the first argument names, with the arguments after it."""
    command, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command in ("-h", "--help"):
        print(usage())
    elif command in _COMPLETION:
        _complete(arguments)
    elif command not in COMMANDS:
        print(f"error: {unknown(command)}" if command else usage(), file=sys.stderr)
        sys.exit(2)
    elif arguments[:1] in ([flag] for flag in _COMPLETION):
        _complete(arguments[1:])
    else:
        _run(command, arguments)


def usage() -> str:
    """Return the list of commands, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join(
        ["usage: deltakd <command> ...", "", *lines, "", "`deltakd <command> --help` says what a command takes."]
    )


def unknown(command: str) -> str:
    """Return a sentence that names the nearest command."""
    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.4)
    hint = f"the nearest is {near[0]!r}; " if near else ""
    return f"there is no command {command!r}; {hint}allowed: {', '.join(COMMANDS)}"


def _run(command: str, arguments: list[str]) -> None:
    """Run the command as ``python -m`` does.

    Its module must be ``__main__``: Hydra takes its task from there, and Lightning, joblib and submitit the command to
    run in further processes.
    """
    sys.argv[1:] = arguments
    if not sys.flags.safe_path:
        # As with `python -m`, modules in the working directory can be imported, such as a user's own loss.
        sys.path.insert(0, os.getcwd())
    runpy.run_module(f"deltakd.{command}", run_name="__main__", alter_sys=True)


def _complete(asked: list[str]) -> None:
    """Complete with Hydra's own completion, which knows overrides; the command before them is ours.

    Args:
        asked: ``install=bash``, ``query=bash``, ...
    """
    line = os.environ.get("COMP_LINE", "")
    words = [*line.split(), *([""] if line.endswith(" ") else [])]
    if any(argument.startswith("query=") for argument in asked):
        if len(words) < 3:
            print(" ".join(COMMANDS))
            return
        if words[1] not in _OVERRIDES:
            return
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    # Hydra takes the program's name from argv, so argv keeps this script's name.
    sys.argv[1:] = [_COMPLETION[0], *asked]
    runpy.run_module("deltakd.train", run_name="__main__")


def make_parser(command: str, usage: str) -> argparse.ArgumentParser:
    """Return a parser for a command that composes configs, with their common options."""
    parser = argparse.ArgumentParser(
        f"deltakd.{command}", description=usage, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--config-dir", metavar="DIR", help="your own configs: DIR/experiment/NAME.yaml, DIR/loss/NAME.yaml (./conf)"
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, search the configs of ``--config-dir``, and log to the console."""
    given = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    guarded(lambda: use_config_dir(given.config_dir), "")
    return given


def read_arguments(arguments: Sequence[str], keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return ``key=value`` arguments by key, and the problems with them, one sentence each.

    Args:
        arguments: as given.
        keys: the allowed ones.
    """
    given, problems = {}, []
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
            hint = f"the nearest is {near[0]}=...; " if near else ""
            problems.append(f"{argument!r} is not understood; {hint}allowed: {', '.join(f'{k}=...' for k in keys)}")
        elif not value:
            problems.append(f"{key}= is empty")
        else:
            given[key] = value
    return given, problems


def quiet_libraries() -> None:
    """Keep libraries' advertisements, device listings and very short progress bars off the console; warnings stay.

    Lightning sets its level when it is imported: call this after that.
    """
    for name in ("lightning.pytorch", "lightning.fabric", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Announced changes in the libraries' later versions: users can't act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(accelerate|peft|torch|transformers)(\.|$)")
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # transformers reads this from the hub's client once, at import.
    disable_progress_bars()
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def guarded(action: Callable[[], T], how_to_resume: str) -> T:
    """Run a command's work; users' errors end the process with one line and exit status 2.

    A run that was stopped by a signal has saved its state; it ends with 128 + the signal's number, as shells expect,
    so that schedulers and ``&&`` do not take it for finished. HYDRA_FULL_ERROR=1 shows tracebacks.
    """
    quiet_libraries()
    try:
        return action()
    except Stopped as stop:
        print(f"{stop}. To continue: {how_to_resume}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print(f"interrupted. To continue from the last checkpoint: {how_to_resume}", file=sys.stderr)
        sys.exit(130)
    except ServerError as error:
        print(f"error: {error}. To continue: {how_to_resume or 'the same command'}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        said = _in_one_line(error, how_to_resume)
        if said is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)


def _in_one_line(error: Exception, how_to_resume: str) -> str | None:
    """Return the message for the user; None for an error of ours."""
    if is_users(error):
        return str(error)
    reason = disk_reason(error)
    if reason is None:
        return None
    where = getattr(error, "filename", None)
    raw = f"{where}: {reason}" if where else f"the disk failed ({reason})"
    said = str(error) if isinstance(error, WriteError) else raw
    return f"{said}. {way_out(reason, how_to_resume or 'the same command')}"


def is_users(error: Exception) -> bool:
    """Return True if the message of the error tells the user what to fix."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    misuse = (lightning.MisconfigurationException,) if lightning else ()
    return isinstance(error, (ValueError, NonFiniteLossError, *misuse))
