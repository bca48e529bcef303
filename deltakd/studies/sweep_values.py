"""Values of a sweep file on their way into a config: how texts are parsed, and which values are not numbers."""

from __future__ import annotations

import re
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

#: A number with an exponent, which YAML 1.1 takes for text if point or sign is missing.
_EXPONENT = re.compile(r"([-+]?\d[\d_]*)(\.\d*)?[eE]([-+]?)(\d+)")


def text_problem(text: str) -> str | None:
    """Return why a text would not reach the config unchanged; None if it does.

    W&B's agents and our search write ``key=text``, which Hydra reads: ``a,b`` is a sweep to it, ``true`` no text. What
    YAML can't say in another way passes: ``null``, lists, mappings, and ``1e-5``, which YAML takes for text.
    """
    # Inside single quotes Hydra reads everything but these two verbatim.
    quoted = "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
    remedy = f"to give this text, quote it: {_in_yaml(quoted)}"
    try:
        parsed = OverridesParser.create().parse_override(f"key={text}")
        swept = parsed.is_sweep_override()
        read: Any = None if swept else parsed.value()
    except (HydraException, ValueError) as error:
        return f"{text!r} can't become an override ({' '.join(str(error).split())[:120]}); {remedy}"
    if swept:
        return f"{text!r} is several values to Hydra; list them one by one, or {remedy}"
    if isinstance(parsed._value, QuotedString) or read == text or read is None or isinstance(read, list | dict):
        return None
    if isinstance(read, float) and isinstance(_plain(text), str):
        return None
    return f"the text {text!r} would become {_shown(read)}; write {_shown(read)} without quotes, or {remedy}"


def _plain(text: str) -> Any:
    """Return an unquoted text as YAML parses it."""
    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return text


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _in_yaml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def number_problem(name: str, value: Any) -> str | None:
    """Return why a value is not a finite number, with the remedy if YAML took a number for text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return None if abs(value) < float("inf") else f"{name} is {value}; give a finite number"
    exponent = _EXPONENT.fullmatch(value) if isinstance(value, str) else None
    if exponent is None:
        return f"{name} is {value!r}; give a number"
    digits, fraction, sign, power = exponent.groups()
    fraction = fraction if fraction and fraction != "." else ".0"
    return (
        f"{name} is the text {value!r}: to YAML 1.1 it is a number only with a point and a sign; write "
        f"{digits}{fraction}e{sign or '+'}{power}"
    )
