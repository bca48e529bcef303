"""Write an experiment file for your models and data: ``python -m deltakd.init my_run student=... data=...``."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deltakd.cli import guarded
from deltakd.config.folders import CONF_DIR, OWN_FOLDER, choice_files, choices
from deltakd.config.short_names import SHORT_NAMES
from deltakd.io.errors import ConfigError
from deltakd.io.files import write_text

USAGE = """Write a commented experiment file for models and data of your own; it is conf/experiment/NAME.yaml.

  python -m deltakd.init my_run
  python -m deltakd.init my_run student=gpt2 teacher=./teacher teacher_raw=gpt2-xl data=my.jsonl loss=delta_kd lr=1e-4

Then, in the same folder:  python -m deltakd.train experiment=my_run
From any other folder:     python -m deltakd.train --config-dir FOLDER/conf experiment=my_run
evaluate, generate, cache, search, plan, study and train --multirun find it in the same way. Losses of your own lie
beside it, as conf/loss/NAME.yaml; the class that such a file names is a module in FOLDER, or is installed.

These values can be given here:
{names}
"""

#: ``[name]`` is replaced by the value given, or by its default.
_TEXT = """\
# @package _global_
# python -m deltakd.train experiment=[name]
#
# [where]
# The command line overrides everything here: optim.lr=1e-4 seed=1 loss=kd. Keys that are
# not here keep their defaults; `deltakd train --help` lists all keys and what they mean.
defaults:
  - override /loss: [loss] # sft, kd, delta_kd, ...: conf/loss of deltakd, or a file in the loss folder beside this one
name: [name] # runs go to outputs/<name>/<time>

model: # paths are hub ids or directories
  student: # the model to train
    path: [student]
    dtype: float32
  teacher: # the fine-tuned model to learn from
    path: [teacher]
    dtype: float32
  teacher_raw: # the teacher before its fine-tuning; delta losses read it
    path: [teacher_raw]
  student_raw: # the student before training; delta losses read it. As it stands: what the student starts from
    path: [student_raw]

# The one knob of delta losses: how much of the teacher's shift the student copies. 0 is plain KD.
delta_weight: [delta_weight]
seed: [seed]

data:
  # .jsonl(.gz) or .json with instruction|question, context|input, response|output|answer; or prompt and response; or
  # messages. Also owner/name on the hub, owner/name:file, or a list of any of these.
  train: [data]
  val: [val] # as train; it chooses the checkpoint. null: val_size rows of train
  val_size: [val_size]
  # Files that the finished student answers: {my_test: test.jsonl}
  sets: [sets]
  # alpaca, chat (the model's own), or {with_input: "{instruction} {input}\\n", without_input: ..., tail: ...}
  template: [template]
  max_length: [max_length] # tokens of prompt and answer
  max_prompt_length: [max_prompt_length]
  batch_size: [batch_size] # rows per process and micro-batch

trainer:
  max_steps: [max_steps] # optimiser steps; the run ends with whichever limit comes first
  max_epochs: [max_epochs] # passes over the data; may be a fraction; null: by max_steps alone

optim:
  lr: [lr]
"""

_DEFAULTS: dict[str, Any] = {
    "student": None,
    "teacher": None,
    "teacher_raw": None,
    "loss": "delta_kd",
    "delta_weight": 1.0,
    "seed": 0,
    "data": None,
    "val": None,
    "val_size": 0,
    "sets": {},
    "template": "alpaca",
    "max_length": 512,
    "max_prompt_length": 256,
    "batch_size": 8,
    "max_steps": None,
    "max_epochs": 1,
    "lr": 5e-4,
}

#: Values that can be given, by short name or key.
NAMES = (*_DEFAULTS, "student_raw")
#: Their values may name local files, which a run started from another folder must find, too.
_PATHS = ("student", "teacher", "teacher_raw", "student_raw", "data", "val", "sets")
#: Required to start a run.
_NEEDED = ("student", "teacher", "teacher_raw", "data")


def main(argv: Sequence[str] | None = None) -> None:
    usage = USAGE.format(names=textwrap.fill(", ".join(NAMES), 100))
    parser = argparse.ArgumentParser("deltakd.init", description=usage, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", help="of the experiment: letters, digits, _ and -")
    parser.add_argument("values", nargs="*", help="student=..., data=..., ...")
    parser.add_argument("--config-dir", metavar="DIR", type=Path, help=f"where it goes (./{OWN_FOLDER})")
    given = parser.parse_intermixed_args(argv)
    folder = given.config_dir or Path(OWN_FOLDER)
    path, missing = guarded(lambda: write_experiment(given.name, given.values, folder), "")
    print(f"wrote {path}")
    if missing:
        print(f"fill in: {', '.join(missing)}")
    option = [] if folder == Path(OWN_FOLDER) else ["--config-dir", str(folder)]
    command = shlex.join(["python", "-m", "deltakd.train", *option, f"experiment={given.name}"])
    print(f"then: {command}    (with trainer.dry_run=true first: what it needs of memory)")


def write_experiment(name: str, values: Sequence[str], folder: Path) -> tuple[Path, list[str]]:
    """Write ``<folder>/experiment/<name>.yaml``.

    Args:
        name: of the experiment.
        values: ``student=gpt2``, or by key: ``model.student.path=gpt2``.
        folder: the config folder; created if it does not exist.

    Returns:
        The file, and the keys that still need values.

    Raises:
        ConfigError: the file exists, the name is invalid, or values can't be parsed; all problems at once.
    """
    path = folder / "experiment" / f"{name}.yaml"
    chosen, problems = _read(values)
    problems = [*_place_problems(name, path), *problems]
    if problems:
        raise ConfigError(problems)
    # Whoever names the steps wants them, however many passes they are.
    passes = {"max_epochs": None} if chosen.get("max_steps") is not None else {}
    chosen = {"name": name, "student_raw": None} | _DEFAULTS | passes | chosen
    words = {key: _yaml(_from_anywhere(key, value)) for key, value in chosen.items()}
    if chosen["student_raw"] is None:
        words["student_raw"] = "${model.student.path}"
    where = "Written by `deltakd init`, to be edited. It is found in the folder that holds this conf/; from elsewhere:"
    shown = f"{where}\n# --config-dir {folder.absolute()}" if folder.name == OWN_FOLDER else _found_by(folder)
    words["where"] = shown
    write_text(path, re.sub(r"\[(\w+)\]", lambda found: words[found[1]], _TEXT))
    unread = {"sft": ("teacher", "teacher_raw"), "kd": ("teacher_raw",)}.get(str(chosen["loss"]), ())
    return path, [SHORT_NAMES[key] for key in _NEEDED if chosen[key] is None and key not in unread]


def _found_by(folder: Path) -> str:
    return f"Written by `deltakd init`, to be edited. It is found by --config-dir {folder.absolute()}"


def _place_problems(name: str, path: Path) -> list[str]:
    if not re.fullmatch(r"\w[\w.-]*", name):
        return [f"{name!r} can't be the name of an experiment; give letters, digits, _ and -"]
    own = path.parent.parent
    if own.is_dir() and own.samefile(CONF_DIR):
        return [
            f"{own.absolute()} is deltakd's own; start `deltakd init` in a folder of your project, or give "
            "--config-dir FOLDER"
        ]
    if path.exists():
        return [f"{path} exists and is not overwritten; edit it, remove it, or give another name"]
    taken = (CONF_DIR / "experiment" / f"{name}.yaml").is_file()
    return [f"{name} is an experiment of deltakd's own; give another name"] if taken else []


def _read(values: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return short name -> value, and the problems, one sentence each."""
    # Importing Hydra takes a tenth of a second; --help should not wait for it.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    by_key = {SHORT_NAMES[name]: name for name in NAMES}
    chosen: dict[str, Any] = {}
    problems = []
    for text in values:
        key, equals, _ = text.partition("=")
        name = key if key in NAMES else by_key.get(key)
        if not equals or name is None:
            problems.append(
                f"{text!r} is none of {', '.join(f'{known}=...' for known in NAMES)}; edit the file for that"
            )
            continue
        try:
            chosen[name] = OverridesParser.create().parse_override(text).value()
        except HydraException as error:
            problems.append(f"{text}: {' '.join(str(error).split())}; write it in quotes: \"{key}='...'\"")
    loss = chosen.get("loss", _DEFAULTS["loss"])
    if not choice_files("loss", str(loss)):
        problems.append(f"loss={loss} does not exist; allowed: {', '.join(choices('loss'))}")
    return chosen, problems


def _from_anywhere(key: str, value: Any) -> Any:
    """Return the value with existing files replaced by their absolute paths."""
    if key not in _PATHS:
        return value
    if isinstance(value, Mapping):
        return {name: _from_anywhere(key, inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_from_anywhere(key, inner) for inner in value]
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value


def _yaml(value: Any) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, allow_unicode=True).split("\n...")[0].strip()
    )


if __name__ == "__main__":
    main()
