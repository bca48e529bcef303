"""The record of where a run ran, with which code and packages, and how much memory it took."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from deltakd.distributed.devices import choose_device

#: The package's location: a checkout, or an environment's site-packages.
ROOT = Path(__file__).resolve().parents[2]

#: Maximum number of characters kept of a checkout's changes.
CHANGES_LIMIT = 1_000_000

#: Variables that make git use a repository other than the folder's.
_OTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")

PACKAGES = (
    "deltakd",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "datasets",
    "hydra-core",
    "torchmetrics",
    "peft",
)


def environment() -> dict[str, Any]:
    """Return Git commit, package versions, machine and device."""
    return {
        "git_commit": git_commit(),
        "packages": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "device": _device_name(),
    }


def _device_name() -> str:
    device = choose_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def checkout() -> Path | None:
    """Return the checkout of this project that the package runs from; None if it is installed.

    Packages are often installed inside a user's repository, whose commit and changes do not concern us.
    """
    top = _git("rev-parse", "--show-toplevel").strip()
    if not top or Path(top).resolve() != ROOT.resolve():
        return None
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, ValueError):
        return None
    return ROOT if project.get("name") == "deltakd" else None


def git_commit() -> str | None:
    """Return our checkout's commit, with ``-dirty`` if files differ from it; None outside a checkout of ours."""
    if checkout() is None:
        return None
    return _git("describe", "--always", "--abbrev=40", "--dirty").strip() or None


def git_changes() -> str | None:
    """Return the diff to the commit, fit for ``git apply``, then the names of new files; None if there are none.

    Diff and names are each cut to CHANGES_LIMIT characters, and the text says so. None outside a checkout of ours, too.
    """
    if checkout() is None:
        return None
    diff = _git("diff", "HEAD", "--no-ext-diff", "--no-color")
    new = _git("ls-files", "--others", "--exclude-standard")
    named = "".join(f"# new file, not in this diff: {name}\n" for name in new.splitlines())
    text = diff[:CHANGES_LIMIT] + named[:CHANGES_LIMIT]
    left_out = len(diff) + len(named) - len(text)
    return (text + (f"\n# {left_out} more characters were left out\n" if left_out else "")) or None


def _git(*arguments: str) -> str:
    """Return git's output for the folder of the package; empty outside a repository."""
    # In a hook, git's own variables name the user's repository.
    variables = {key: value for key, value in os.environ.items() if key not in _OTHER_REPOSITORY}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_memory_mib() -> float:
    """Return the peak memory in MiB: the GPU's if one was used, else this process's since it started."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def costs_since(started: float, speed: float | None) -> dict[str, Any]:
    """Return the costs of a run without a trainer, for its ``summary.json``.

    Args:
        started: when it began, by ``time.perf_counter``.
        speed: tokens/s; None if nothing was left to do.
    """
    return {
        "seconds": round(time.perf_counter() - started, 3),
        "tokens_per_second": speed,
        "peak_memory_mib": round(peak_memory_mib(), 1),
    }
