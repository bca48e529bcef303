"""Where configs are found: the package's own ``conf/``, then the user's folders."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from deltakd.io.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
#: conf/ of the installed wheel, or of the checkout.
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

#: Names a further config folder; ``--config-dir`` sets it, so that processes started later know the folder, too.
CONFIG_DIR_VARIABLE = "DELTAKD_CONFIG_DIR"

#: The folder in the working directory that is searched by default.
OWN_FOLDER = "conf"


def config_folders() -> list[Path]:
    """Return the folders that are searched, in this order: the package's, ``--config-dir``'s, ``./conf``.

    All have the same layout: ``<folder>/experiment/my_run.yaml``, ``<folder>/loss/my_loss.yaml``. The first folder that
    has a file wins, so another program's folder named ``conf`` can't change a run.
    """
    named = os.environ.get(CONFIG_DIR_VARIABLE)
    own = [Path(named)] if named else []
    own = [folder.absolute() for folder in (*own, Path(OWN_FOLDER)) if folder.is_dir()]
    return list(dict.fromkeys([CONF_DIR, *(folder for folder in own if not folder.samefile(CONF_DIR))]))


def use_config_dir(folder: Path | str | None) -> None:
    """Search a further folder, in this process and its child processes.

    Modules next to the folder can be imported: a loss's YAML in ``my_project/conf/loss`` may name a class of
    ``my_project/my_losses.py``.

    Args:
        folder: laid out as ``conf/``; None: none.

    Raises:
        ConfigError: the folder does not exist.
    """
    if folder is None:
        return
    path = Path(folder).absolute()
    if not path.is_dir():
        raise ConfigError([f"--config-dir {folder} is not a folder; give one that holds experiment/, loss/, ..."])
    os.environ[CONFIG_DIR_VARIABLE] = str(path)
    beside = str(path.parent)
    if beside not in sys.path:
        # Last, so that it shadows no module that could be imported before.
        sys.path.append(beside)
        known = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{known}{os.pathsep}{beside}" if known else beside


def is_group(key: str) -> bool:
    """Return True for a config group, such as ``loss`` or ``loss/divergence``; False for Hydra's own."""
    # Hydra checks its own groups: some of their choices come from plugins.
    if "." in key or key.startswith("hydra/"):
        return False
    return any((folder / key).is_dir() for folder in config_folders())


def group_names() -> list[str]:
    folders = config_folders()
    return sorted({str(p.relative_to(folder)) for folder in folders for p in folder.rglob("*") if p.is_dir()})


def choices(group: str) -> list[str]:
    return sorted({path.stem for folder in config_folders() for path in (folder / group).glob("*.yaml")})


def choice_files(group: str, name: str) -> list[Path]:
    """Return the files of a choice, the effective one first; empty if there is no such choice."""
    files = (folder / group / f"{name}.yaml" for folder in config_folders())
    # pathlib raises where a name is too long to be one.
    return [file for file in files if os.path.isfile(file)]
