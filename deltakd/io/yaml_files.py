"""YAML files that users write: read completely, or rejected in one sentence with the location."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from deltakd.io.errors import ConfigError


class _UniqueKeys(yaml.SafeLoader):
    """Rejects a key that is given twice; YAML would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} stands twice; remove one", key.start_mark
                )
            seen |= set() if name is None else {name}
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; None if it is empty.

    Raises:
        ConfigError: it can't be read, is not YAML, or has a duplicate key; with line and column.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        hint = "; indent with spaces: YAML takes no tabs" if "\\t" in str(error.problem) else ""
        raise ConfigError([f"{where}: {error.problem or error}{hint}"]) from None
    # A date such as 2026-02-30 is a plain ValueError.
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError([f"{path} can't be read: {' '.join(str(error).split())}"]) from None
