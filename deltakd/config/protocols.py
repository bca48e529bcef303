"""Published evaluation protocols: files of ``conf/evaluation``, and an evaluation's deviations from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from deltakd.config.folders import choice_files, choices
from deltakd.evaluation.settings import EvaluationSettings, SetSource
from deltakd.io.keys import Protocol, keys_with
from deltakd.io.typed import typed


def make_evaluation(node: Any, problems: list[str]) -> EvaluationSettings | None:
    """Make the settings of an evaluation group; None if values are missing.

    Args:
        node: the group, as plain dicts and lists; anything but a mapping is a problem.
        problems: gets one sentence for each problem.
    """
    if not isinstance(node, Mapping):
        problems.append(f"evaluation is {node!r}; it must be a mapping: take one of the choices of the group")
        return None
    given = {key: value for key, value in node.items() if key != "sets"}
    settings = typed(EvaluationSettings, given | {"sets": _sets(node.get("sets"), problems)}, "evaluation", problems)
    if settings is not None and settings.protocol is not None and settings.protocol not in protocols():
        problems.append(
            f"evaluation.protocol is {settings.protocol!r}; it is set by evaluation=..., and these are protocols: "
            f"{', '.join(protocols())}"
        )
    return settings


def _sets(node: Any, problems: list[str]) -> dict[str, SetSource]:
    shape = "give names and files: evaluation.sets={mine: file.jsonl}, or mine: {source: file.jsonl, scorer: ...}"
    if not isinstance(node or {}, Mapping):
        problems.append(f"evaluation.sets is {node!r}; {shape}")
        return {}
    sets: dict[str, SetSource] = {}
    for name, entry in (node or {}).items():
        source = {"source": entry} if isinstance(entry, str) else entry
        if not isinstance(source, Mapping) or not isinstance(source.get("source"), str):
            problems.append(f"evaluation.sets.{name} is {entry!r}; {shape}")
            continue
        made = typed(SetSource, source, f"evaluation.sets.{name}", problems)
        sets |= {} if made is None else {str(name): made}
    return sets


def protocols() -> list[str]:
    """Return the names of the protocols in ``conf/evaluation``."""
    return [name for name in choices("evaluation") if _is_protocol(name)]


def _is_protocol(name: str) -> bool:
    # Check the text first: otherwise any file in another program's `conf/evaluation` would be composed.
    mentions = "protocol:" in choice_files("evaluation", name)[0].read_text(encoding="utf-8", errors="replace")
    return mentions and evaluation_group(name).get("protocol") == name


def evaluation_group(name: str) -> DictConfig:
    """Return a file of ``conf/evaluation``, merged with its bases, which are in the same folder."""
    node = cast(DictConfig, OmegaConf.load(choice_files("evaluation", name)[0]))
    bases = [evaluation_group(base) for base in node.pop("defaults", [])]
    return cast(DictConfig, OmegaConf.merge(*bases, node))


def deviations(settings: EvaluationSettings) -> tuple[str, ...]:
    """Return how an evaluation deviates from the protocol that it names, one phrase each."""
    if settings.protocol is None or settings.protocol not in protocols():
        return ()
    published: Any = OmegaConf.to_container(evaluation_group(settings.protocol))
    wanted = make_evaluation(published, [])
    assert wanted is not None, f"conf/evaluation/{settings.protocol}.yaml is wrong"
    pairs = [pair for key in keys_with(EvaluationSettings, Protocol.FIXED) for pair in _pairs(key, settings, wanted)]
    pairs += [
        (f"sets.{name}.scorer", entry.scorer, wanted.scorer)
        for name, entry in settings.sets.items()
        if entry.scorer is not None
    ]
    return tuple(
        f"{key} is {_shown(given)} instead of {_shown(fixed)}" for key, given, fixed in pairs if given != fixed
    )


def _pairs(key: str, given: Any, wanted: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, given, wanted) for a field, or for each field inside it."""
    own, fixed = getattr(given, key), getattr(wanted, key)
    if is_dataclass(own):
        yield from ((f"{key}.{one.name}", getattr(own, one.name), getattr(fixed, one.name)) for one in fields(own))
    else:
        yield key, own, fixed


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
