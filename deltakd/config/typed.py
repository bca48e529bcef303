"""Values of a config against the types of what is made of them; every mismatch becomes a sentence.

pydantic decides, in strict mode: ``no`` is not ``False``, ``1e2`` is no whole number, ``0.5`` is no count of rows.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import annotated_types
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError

T = TypeVar("T")

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_NOT_CHECKABLE = (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError)


def typed(kind: type[T], node: Any, key: str, problems: list[str]) -> T | None:
    """Make a settings dataclass of a node of the config.

    Args:
        kind: the dataclass. Its annotations say what is allowed.
        node: a mapping.
        key: where the node stands, such as ``model.student``.
        problems: one sentence is added for each key that ``kind`` does not know and each value of another type. Such
            a value is left out, so that the others can still be checked.

    Returns:
        The dataclass, or None where a field without a default has no usable value.
    """
    if not isinstance(node, Mapping):
        problems.append(f"{key} is {node!r}; it must be a mapping with {', '.join(_names(kind))}")
        return None
    unknown = sorted(set(node) - set(_names(kind)))
    problems += [f"{key} has no key {name!r}; allowed: {', '.join(sorted(_names(kind)))}" for name in unknown]
    hints = get_type_hints(kind, include_extras=True)
    values: dict[str, Any] = {}
    for name, value in node.items():
        if name not in hints:
            continue
        nested = _nested_kind(hints[name])
        if nested is not None and isinstance(value, Mapping):
            made = typed(nested, value, f"{key}.{name}", problems)
            values |= {} if made is None else {name: made}
            continue
        found = mismatch(hints[name], value, f"{key}.{name}")
        problems += found
        values |= {} if found else {name: value}
    lacking = [one.name for one in _fields(kind) if _is_required(one) and one.name not in values]
    problems += [f"{key}.{name} is missing; it must be {allowed(hints[name])}" for name in lacking if name not in node]
    return None if lacking else kind(**values)


def built(node: Any, key: str, problems: list[str]) -> Any:
    """Instantiate a node with a ``_target_``; None where that fails.

    Args:
        node: what Hydra instantiates; other nodes with a ``_target_`` may stand in it.
        key: where the node stands.
        problems: one sentence is added for each value of another type than the target's annotation says, or for what
            the target refuses.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        problems.append(
            f"{key} is {node!r}; it must be a mapping with a _target_: take one of the choices of the group"
        )
        return None
    found = _target_mismatches(node, key)
    if found:
        problems += found
        return None
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        # Hydra knows which node it was: the constructor's message names its argument alone.
        inner = re.search(r"full_key: (\S+)", str(error))
        where = f"{key}.{inner[1]}" if inner else key
        problems.append(f"{where}: {' '.join(str(cause).split())}")
        return None


def _target_mismatches(node: Mapping[str, Any], key: str) -> list[str]:
    hints = _argument_hints(str(node["_target_"]))
    found: list[str] = []
    for name, value in node.items():
        if name.startswith("_"):
            continue
        if isinstance(value, Mapping) and "_target_" in value:
            found += _target_mismatches(value, f"{key}.{name}")
        elif name in hints and not _holds_target(value):
            found += mismatch(hints[name], value, f"{key}.{name}")
    return found


def _holds_target(value: Any) -> bool:
    """True if something inside a list or mapping is still to be instantiated."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(_holds_target(inner) for inner in value.values())
    return isinstance(value, Sequence) and not isinstance(value, str) and any(map(_holds_target, value))


@cache
def _argument_hints(target: str) -> Mapping[str, Any]:
    """Return the annotations of a target's arguments; none where there is no such target, or they can't be read."""
    try:
        what: Any = get_object(target)
        if dataclasses.is_dataclass(what):
            return get_type_hints(what, include_extras=True)
        call = cast(Callable[..., Any], what.__init__) if inspect.isclass(what) else what
        return get_type_hints(call, include_extras=True)
    # Importing a user's module may raise anything; Hydra's own attempt will say it.
    except Exception:
        return {}


def mismatch(hint: Any, value: Any, key: str) -> list[str]:
    """Return a sentence if ``value`` is not of the annotated type: what is given, what is allowed, what to do."""
    adapter = _adapter(hint)
    if adapter is None:
        return []
    try:
        adapter.validate_python(value)
    except ValidationError:
        return [f"{key} is {_shown(value)}; it must be {allowed(hint)}{_remedy(hint, value, key)}"]
    return []


@cache
def _adapter_of(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(hint, config=None if dataclasses.is_dataclass(hint) else _STRICT)
    except _NOT_CHECKABLE:
        return None


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return _adapter_of(hint)
    except TypeError:  # an annotation that can't be hashed
        return None


def allowed(hint: Any) -> str:
    """Say in words which values an annotation allows."""
    return " or ".join(dict.fromkeys(_words(hint)))


def _words(hint: Any, bounds: str = "") -> list[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _words(arguments[0], _bounds(arguments[1:]))
    if origin in (Union, types.UnionType):
        return [word for part in arguments for word in _words(part, bounds)]
    if origin is Literal:
        return [", ".join("null" if one is None else str(one) for one in arguments)]
    if hint in _NAMES:
        return [_NAMES[hint] + (bounds if hint in (int, float) else "")]
    if origin is not None and issubclass(origin, Mapping):
        return ["a mapping"]
    if origin is not None and issubclass(origin, Sequence):
        return [f"a list ({allowed(arguments[0])} each)" if arguments else "a list"]
    return ["a mapping" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))]


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    Any: "anything",
}


def _bounds(marks: Sequence[Any]) -> str:
    said = []
    words = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
    for mark in marks:
        if isinstance(mark, annotated_types.Ge | annotated_types.Gt | annotated_types.Le | annotated_types.Lt):
            name = type(mark).__name__.lower()
            said.append(words[name].format(getattr(mark, name)))
    return "".join(f" {one}" for one in said)


def _shown(value: Any) -> str:
    """Return a value as it would be written in YAML, so that text and numbers can be told apart."""
    if value is None:
        return "null"
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def _remedy(hint: Any, value: Any, key: str) -> str:
    words = _words(hint)
    if isinstance(value, int | float) and not isinstance(value, bool) and "text" in words:
        return f"""; to give these digits as text: "{key}='{value}'\""""
    if isinstance(value, float) and value.is_integer() and any(word.startswith("a whole number") for word in words):
        return f"; write {int(value)}"
    return ""


def _fields(kind: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cast(Any, kind))


def _names(kind: type) -> list[str]:
    return [one.name for one in _fields(kind)]


def _is_required(one: dataclasses.Field[Any]) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def _nested_kind(hint: Any) -> type | None:
    """Return the dataclass that a mapping is made into where the annotation names exactly one."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _nested_kind(arguments[0])
    if origin in (Union, types.UnionType):
        kinds = [kind for part in arguments if (kind := _nested_kind(part)) is not None]
        return kinds[0] if len(kinds) == 1 else None
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None
