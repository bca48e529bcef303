"""Builds settings dataclasses from config values; every mismatch with an annotation becomes a sentence.

pydantic checks in strict mode: ``no`` is not ``False``, ``1e2`` is not an integer, ``0.5`` is not a count of rows.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError

T = TypeVar("T")

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_NOT_CHECKABLE = (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError)


def typed(kind: type[T], node: Any, key: str, problems: list[str]) -> T | None:
    """Make a settings dataclass from a config node.

    Args:
        kind: the dataclass. Its annotations define the allowed values.
        node: a mapping.
        key: the node's key, such as ``model.student``.
        problems: gets one sentence for each unknown key and each value of the wrong type. Such values are left out, so
            that the others can still be checked.

    Returns:
        The dataclass; None if a field without a default has no usable value.
    """
    if not isinstance(node, Mapping):
        problems.append(f"{key} is {node!r}; it must be a mapping with {', '.join(_names(kind))}")
        return None
    unknown = sorted(set(node) - set(_names(kind)), key=str)
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


def mismatches(settings: Any, key: str) -> list[str]:
    """Return a sentence for each field of a dataclass whose value does not match its annotation.

    Args:
        settings: made by code, not by ``typed``.
        key: its config key.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    values = {name: getattr(settings, name) for name in _names(type(settings))}
    return [one for name, value in values.items() for one in mismatch(hints[name], value, f"{key}.{name}")]


def mismatch(hint: Any, value: Any, key: str) -> list[str]:
    """Return a sentence if ``value`` does not match ``hint``: what is given, what is allowed, what to do."""
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
    while get_origin(hint) is Annotated and dataclasses.is_dataclass(get_args(hint)[0]):
        hint = get_args(hint)[0]  # pydantic takes no config for a dataclass, marked or not
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
    """Return, in words, the values that an annotation allows; text in an ``Annotated`` is used verbatim."""
    return " or ".join(dict.fromkeys(_words(hint)))


def _words(hint: Any, bounds: str = "") -> list[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        told = [mark for mark in arguments[1:] if isinstance(mark, str)]
        if told:
            return told
        return [word + _length(arguments[1:]) for word in _words(arguments[0], _bounds(arguments[1:]))]
    if origin in (Union, types.UnionType):
        return [word for part in arguments for word in _words(part, bounds)]
    if origin is Literal:
        return [", ".join("null" if one is None else str(one) for one in arguments)]
    if hint in _NAMES:
        return [_NAMES[hint] + (bounds if hint in (int, float) else "")]
    if origin is not None and issubclass(origin, Mapping):
        anything = not arguments or arguments[1] is Any
        return ["a mapping" if anything else f"a mapping (each value {allowed(arguments[1])})"]
    if origin is not None and issubclass(origin, Sequence):
        return [f"a list (each {allowed(arguments[0])})" if arguments else "a list"]
    return ["a mapping" if dataclasses.is_dataclass(hint) else f"a {getattr(hint, '__name__', hint)}"]


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
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
    # "from 0 to 5", but "from 0 and below 5".
    return " " + " and ".join(said).replace(" and to ", " to ") if said else ""


def _length(marks: Sequence[Any]) -> str:
    """Return the number of entries that a list needs, in words."""
    lengths = [mark for mark in marks if isinstance(mark, annotated_types.Len)]
    if not lengths:
        return ""
    least, most = lengths[0].min_length, lengths[0].max_length
    return f" of {least} entries" if least == most else f" of at least {least}"


def _shown(value: Any) -> str:
    """Return a value roughly as YAML writes it, so that text and numbers can be distinguished."""
    if value is None:
        return "null"
    return repr(value).lower() if isinstance(value, bool) else repr(value)


def _remedy(hint: Any, value: Any, key: str) -> str:
    if inspect.isabstract(hint):  # a plug-in, and a config group of its own
        return f"; choose one with {key.replace('.', '/')}=NAME"
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
    """Return the dataclass to build from a mapping, if the annotation names exactly one."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _nested_kind(arguments[0])
    if origin in (Union, types.UnionType):
        kinds = [kind for part in arguments if (kind := _nested_kind(part)) is not None]
        return kinds[0] if len(kinds) == 1 else None
    return hint if dataclasses.is_dataclass(hint) and isinstance(hint, type) else None
