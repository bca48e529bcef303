"""Config nodes with a ``_target_``: values are checked against its annotations, then Hydra builds the object."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import pydoc
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, cast, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

from deltakd.io.typed import mismatch


def built(node: Any, key: str, problems: list[str]) -> Any:
    """Instantiate a node with a ``_target_``; return None if that fails.

    Args:
        node: what Hydra instantiates; it may contain other nodes with a ``_target_``.
        key: the node's key.
        problems: gets one sentence for each key that the target does not take and each value that does not match its
            annotation (both are left out, so that the others can still be checked), for a target that cannot be
            imported, and for an error that it raises.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        problems.append(
            f"{key} is {node!r}; it must be a mapping with a _target_: take one of the choices of the group"
        )
        return None
    if unknown := list(_unknown_targets(node, key)):
        problems += unknown
        return None
    sound, found = _sound(node, key)
    problems += found
    try:
        return instantiate(sound, _convert_="all")
    except InstantiationException as error:
        if found:
            # Values that were left out may be missing now; they are reported already.
            return None
        cause = error.__cause__ or error
        # Hydra's error names the node; the constructor's message names only its argument.
        inner = re.search(r"full_key: (\S+)", str(error))
        where = f"{key}.{inner[1]}" if inner else key
        problems.append(f"{where}: {' '.join(str(cause).split())}")
        return None


def _unknown_targets(node: Any, key: str) -> Iterator[str]:
    """Yield a sentence for each ``_target_`` in a node that cannot be imported."""
    if isinstance(node, Mapping):
        if isinstance(target := node.get("_target_"), str) and (why := _why_unknown(target)):
            yield f"{key}._target_ is {target!r}, but {why}"
        for name, value in node.items():
            yield from _unknown_targets(value, f"{key}.{name}")
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for n, value in enumerate(node):
            yield from _unknown_targets(value, f"{key}.{n}")


def _why_unknown(target: str) -> str:
    """Return why a dotted path names nothing that can be imported; empty if it does name something."""
    try:
        if pydoc.locate(target) is not None:
            return ""
        owner, _, name = target.rpartition(".")
        while owner and (found := pydoc.locate(owner)) is None:
            owner, _, name = owner.rpartition(".")
    except pydoc.ErrorDuringImport as error:
        # Importing a user's module may raise anything. A SyntaxError says its line itself.
        where = ""
        if error.tb is not None and not isinstance(error.value, SyntaxError):
            last = inspect.getinnerframes(error.tb)[-1]
            where = f" at {last.filename}:{last.lineno}"
        return f"importing {error.filename} fails{where}: {type(error.value).__name__}: {error.value}"
    if owner:
        near = _nearest(name, dir(found)).removesuffix("; ")
        return f"{owner} has no {name!r}; {near or 'write module.Class'}"
    return f"there is no module {name!r} beside conf/, on PYTHONPATH or installed"


def _sound(node: Mapping[str, Any], key: str) -> tuple[dict[str, Any], list[str]]:
    """Return the node without values that do not match the target's annotations, and a sentence for each."""
    target = str(node["_target_"])
    hints, taken = argument_hints(target), _arguments(target)
    sound: dict[str, Any] = {}
    found: list[str] = []
    for name, value in node.items():
        kept, wrong = value, list[str]()
        if taken is not None and name not in taken and not name.startswith("_"):
            found.append(f"{key} has no key {name!r}; {_nearest(name, taken)}allowed: {', '.join(sorted(taken))}")
            continue
        if isinstance(value, Mapping) and "_target_" in value:
            kept, wrong = _sound(value, f"{key}.{name}")
            found += wrong
            wrong = []
        elif name in hints and not name.startswith("_") and not _holds_target(value):
            wrong = mismatch(hints[name], value, f"{key}.{name}")
            found += wrong
        if not wrong:
            sound[name] = kept
    return sound, found


def _holds_target(value: Any) -> bool:
    """True if anything in a list or mapping has a ``_target_``."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(_holds_target(inner) for inner in value.values())
    return isinstance(value, Sequence) and not isinstance(value, str) and any(map(_holds_target, value))


@cache
def _arguments(target: str) -> frozenset[str] | None:
    """Return the names of a target's arguments; None if it takes any, or they can't be read."""
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    # As below.
    except Exception:
        return None
    if any(one.kind == one.VAR_KEYWORD for one in parameters):
        return None
    return frozenset(one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"the nearest is {near[0]!r}; " if near else ""


@cache
def argument_hints(target: str) -> Mapping[str, Any]:
    """Return the annotations of a target's arguments; empty if the target or its annotations can't be read."""
    try:
        what: Any = get_object(target)
        if dataclasses.is_dataclass(what):
            return get_type_hints(what, include_extras=True)
        call = cast(Callable[..., Any], what.__init__) if inspect.isclass(what) else what
        # What it returns may be imported for type checkers alone.
        arguments = {name: hint for name, hint in inspect.get_annotations(call).items() if name != "return"}
        return get_type_hints(SimpleNamespace(__annotations__=arguments), call.__globals__, include_extras=True)
    # Importing a user's module may raise anything; Hydra's own attempt will report it.
    except Exception:
        return {}
