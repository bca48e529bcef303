"""The commands of the documentation, run page by page as a reader would, with tiny models in place of theirs."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, blocks, write_shown_files
from tests.tiny import WORDS, make_rows, make_tokenizer, save_model, write_rows


def numbered_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Rows of which no two ask the same."""
    return [row | {"instruction": f"Say number {seed}{i:04}"} for i, row in enumerate(make_rows(n, seed))]


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A folder, for one page, with the models and files that the pages name, and the commands on the PATH."""
    home = tmp_path / "reader"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    for seed, (name, width) in enumerate({"student": 16, "teacher": 24, "teacher_raw": 24}.items()):
        save_model(home / "models" / name, seed=seed, width=width, n_positions=1024, tokenizer=tokenizer)
    write_rows(home / "my.jsonl", numbered_rows(80, 1))
    write_rows(home / "test.jsonl", numbered_rows(6, 2))
    (home / "corpus.txt").write_text("\n".join(" ".join(WORDS[i % 9 :]) for i in range(400)))
    for name in ("experiments", "sweeps"):
        (home / name).symlink_to(ROOT / name)
    write_shown_files(home)
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "bin" / "activate").touch()
    programs = home / "bin"
    programs.mkdir()
    shims = {
        "deltakd": f'exec "{sys.executable}" -m deltakd "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        # What a target does, its own tests show.
        "make": f'grep -q "^$1:" "{ROOT}/Makefile"',
    }
    for name, text in shims.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(stat.S_IRWXU)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_in_order(page: Path, reader: Path) -> None:
    variables = os.environ | {
        "PATH": f"{reader / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
    }
    for block in blocks(page):
        # A titled block of Python is a file that a command beside it uses.
        program = {"bash": ["bash", "-euo", "pipefail"], "python": ["python"]}.get(block.language)
        if program and block.runs and (block.language == "bash" or not block.title):
            done = subprocess.run(
                [*program, "-c", block.text], cwd=reader, env=variables, capture_output=True, text=True, timeout=900
            )
            assert done.returncode == 0, f"{block.where}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            assert not re.search(r"Traceback \(most recent", done.stderr), block.where
