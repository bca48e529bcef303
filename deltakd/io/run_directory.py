"""The run directory: its owner, its files, and whether its run is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import yaml

from deltakd.io.errors import ConfigError
from deltakd.io.files import PARTIAL, make_folder, write_json, write_text

#: Tells the processes of further ranks the run directory.
RUN_DIR_VARIABLE = "DELTAKD_RUN_DIR"

#: Files of ``checkpoints/``.
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


@dataclass(frozen=True)
class ResumePolicy:
    """The keys of a run's config that may change on resume; a key covers all keys below it.

    Args:
        always: keys that do not affect what is trained.
        until_finished: keys that only affect the evaluation of the trained student or how the work is spread.
    """

    always: Collection[str] = ()
    until_finished: Collection[str] = ()

    def allows(self, key: str, finished: bool) -> bool:
        """True if ``key`` may change."""
        free = self.always if finished else (*self.always, *self.until_finished)
        return any(key == name or key.startswith(f"{name}.") for name in free)


@final
class Claim:
    """A directory that a run has claimed; as a context, it is given back if what is inside the block fails.

    A run that fails while it reads its data and models then leaves nothing behind.

    Args:
        path: the directory.
        found: the deepest existing directory above it; None: a run continues here, and is never given back.
    """

    def __init__(self, path: Path, found: Path | None) -> None:
        self.path = path
        self._found = found

    def __enter__(self) -> None:
        """Enter the block that may fail."""

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Give the directory back if the block failed."""
        if kind is not None:
            self.give_back()

    def give_back(self) -> None:
        """Remove everything this run wrote there; the directory was empty before."""
        if self._found is None:
            return
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        for folder in (self.path, *self.path.parents):
            # Other runs may have been created next to this one.
            if folder == self._found or any(folder.iterdir()):
                return
            folder.rmdir()


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run.

    Args:
        path: the directory.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config; its presence marks the directory as a run's."""
        return self.path / "config.yaml"

    @property
    def summary(self) -> Path:
        """The results; their presence marks the run as finished."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """``last.ckpt``, ``previous.ckpt`` and ``best.ckpt``."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The state to resume from."""
        return self.checkpoints / LAST

    @property
    def previous_checkpoint(self) -> Path:
        """The previous state."""
        return self.checkpoints / PREVIOUS

    @property
    def student(self) -> Path:
        """The exported Hugging Face model."""
        return self.path / "student"

    @property
    def adapter(self) -> Path:
        """The trained LoRA adapter, for runs that train one."""
        return self.path / "adapter"

    @property
    def generations(self) -> Path:
        """``<set>_seed<k>.jsonl``."""
        return self.path / "generations"

    @property
    def finished(self) -> bool:
        return self.summary.is_file()

    def claim(self, config: Mapping[str, Any], resume: bool, policy: ResumePolicy | None = None) -> Claim:
        """Claim the directory for this run: write its config, or check that a resumed run has the same one.

        Args:
            config: resolved, as plain dicts and lists.
            resume: continue a run in this directory.
            policy: the keys that may then differ; None: none.

        Returns:
            The claim; ``with`` it, a run that can't start gives the directory back.

        Raises:
            ConfigError: it holds another run, or this run with another config.
        """
        if self.config.is_file():
            if not resume:
                raise ConfigError(
                    [
                        f"run_dir={self.path} already holds a run; give another run_dir, "
                        "or resume=true to continue that one"
                    ]
                )
            held = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            allows = (policy or ResumePolicy()).allows
            differing = [key for key in _differences(held, config) if not allows(key, self.finished)]
            if differing:
                shown = ", ".join(f"{k} ({_get(held, k)!r} there, {_get(config, k)!r} now)" for k in differing[:6])
                raise ConfigError(
                    [
                        f"run_dir={self.path} holds a run with another config: {shown}; "
                        "give another run_dir, or remove that one to start again"
                    ]
                )
            if not self.finished:
                self._write_config(config)
            return Claim(self.path, None)
        if self.path.is_dir() and any(p for p in self.path.iterdir() if p.suffix != PARTIAL):
            raise ConfigError(
                [f"run_dir={self.path} is not empty and does not hold a run of deltakd's; give another run_dir"]
            )
        found = next(folder for folder in (self.path, *self.path.parents) if folder.is_dir())
        make_folder(self.path, "the run directory")
        self._write_config(config)
        return Claim(self.path, found)

    def _write_config(self, config: Mapping[str, Any]) -> None:
        write_text(self.config, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def read_summary(self) -> dict[str, Any]:
        return json.loads(self.summary.read_text(encoding="utf-8"))

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.summary, summary)


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = [*a, *(k for k in b if k not in a)]
        return [d for k in keys for d in _differences(a.get(k), b.get(k), f"{prefix}{k}.")]
    return [] if a == b else [prefix.rstrip(".")]


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
