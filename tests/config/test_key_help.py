"""``deltakd train --help``: the groups, and what each key means."""

from __future__ import annotations

import subprocess
import sys

from deltakd.config.folders import choices
from deltakd.config.key_help import key_help


def test_every_key_of_a_default_run_is_there_with_what_conf_says_of_it() -> None:
    lines = key_help([]).splitlines()
    assert "  max_steps: null # optimiser steps; the run ends at whichever comes first" in lines
    assert "  lr: 5.0e-4 # peak, after the warm-up" in lines
    assert "loss.target:  # conf/loss/target/delta.yaml" in lines
    assert "delta_weight: 1.0" in lines
    assert not [line for line in lines if "_target_" in line or line.startswith("hydra:")]


def test_choices_on_the_command_line_show_their_keys() -> None:
    text = key_help(["loss=kd_jsd", "reference=cached", "logger=[csv]", "experiment=quickstart"])
    assert "conf/loss/kd_jsd.yaml" in text
    assert "conf/loss/divergence/jsd.yaml" in text
    assert "conf/reference/cached.yaml" in text
    assert "conf/loss/delta_kd.yaml" not in text


def test_every_group_lists_its_choices() -> None:
    words = key_help([]).replace(",", " ").split()
    assert set(choices("loss")) | set(choices("strategy")) | set(choices("experiment")) <= set(words)


def test_help_waits_for_no_library() -> None:
    code = (
        "import sys; sys.argv = ['deltakd.train', '--help']; from deltakd.train import main; main();"
        "print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
