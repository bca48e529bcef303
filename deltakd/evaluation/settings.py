"""The evaluation group of the config: typed, checked, and compared with the protocol that it claims to follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

from deltakd.config.compose import CONF_DIR
from deltakd.data import DataConfig
from deltakd.data.sources.records import missing_sources
from deltakd.evaluation import MAIN_METRICS, METRICS, SCORERS
from deltakd.evaluation.measure_settings import MeasureSettings, make_measure_settings
from deltakd.generation import Decoding

T = TypeVar("T")

#: Objectives that need generated answers, main metrics first; more of them is better.
SCORES = tuple(f"val/{metric}" for metric in sorted(METRICS, key=lambda metric: metric not in MAIN_METRICS))

#: What a protocol fixes; the other keys of the group say what is asked, or are of no consequence.
PROTOCOL_KEYS = ("template", "max_prompt_length", "scorer", "limit", "seeds", "decoding")


@dataclass(frozen=True)
class SetSource:
    """One entry of ``evaluation.sets``, which may be a source alone.

    Args:
        source: a file or hub data set.
        scorer: what scores it; None: ``evaluation.scorer``.
        limit: first so many rows; None: ``evaluation.limit``.
    """

    source: str
    scorer: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation group, typed.

    Args:
        generate: whether anything is generated.
        sets: name -> where it is and how it is scored.
        limit: first so many rows of each set.
        seeds: sampling seeds; greedy decoding runs once, and each seed has a file of the same answers.
        batch_size: answers decoded together, over all seeds, at most.
        val_limit: validation rows answered during training.
        decoding: how tokens are chosen.
        scorer: one of ``SCORERS``, of validation answers and of the sets that name no other.
        template: of the prompts; None: the one of the data.
        max_prompt_length: tokens of a prompt; None: the one of the data.
        protocol: the protocol that is claimed to be followed, a file of ``conf/evaluation``; None: none.
        allow_overlap: whether sets may be evaluated of which rows were trained on.
        measures: what is measured beyond scores of answers, whether anything is generated or not.
    """

    generate: bool
    sets: dict[str, SetSource]
    limit: int | None
    seeds: tuple[int, ...]
    batch_size: int
    val_limit: int
    decoding: Decoding
    scorer: str = "rouge"
    template: Any = None
    max_prompt_length: int | None = None
    protocol: str | None = None
    allow_overlap: bool = False
    measures: MeasureSettings = field(default_factory=MeasureSettings)

    def problems(self) -> list[str]:
        """What is wrong with ``evaluation``, one sentence each."""
        found = self.decoding.problems()
        if not self.seeds:
            found.append("evaluation.seeds is empty; give at least one: evaluation.seeds=[10]")
        counts = {name: getattr(self, name) for name in ("batch_size", "val_limit", "limit", "max_prompt_length")}
        counts |= {f"sets.{name}.limit": entry.limit for name, entry in self.sets.items()}
        for name, value in counts.items():
            if value is not None and (type(value) is not int or value < 1):
                found.append(f"evaluation.{name} is {value!r}; it must be a number of at least 1")
        scorers = {"scorer": self.scorer} | {f"sets.{name}.scorer": entry.scorer for name, entry in self.sets.items()}
        found += [
            f"evaluation.{name} is {value!r}; allowed: {', '.join(SCORERS)}"
            for name, value in scorers.items()
            if value is not None and value not in SCORERS
        ]
        return found

    def scorer_of(self, name: str) -> str:
        """What scores the set ``name``."""
        return self.sets[name].scorer or self.scorer

    def limit_of(self, name: str) -> int | None:
        """How many rows of the set ``name`` are asked; None: all."""
        own = self.sets[name].limit
        return self.limit if own is None else own if self.limit is None else min(own, self.limit)

    def prompts_of(self, data: DataConfig) -> DataConfig:
        """The data with the template and the prompt length under which answers are asked for."""
        own = {"template": self.template, "max_prompt_length": self.max_prompt_length}
        return replace(data, **{key: value for key, value in own.items() if value is not None})


def make_evaluation(config: dict[str, Any], problems: list[str]) -> Evaluation:
    """The evaluation group as typed object; its problems are added to the list."""
    seeds = config["seeds"]
    if not (isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)):
        problems.append(f"evaluation.seeds is {seeds!r}; give a list of numbers from 0: evaluation.seeds=[10,20]")
        seeds = [0]
    evaluation = Evaluation(
        generate=config["generate"],
        sets=_sets(config["sets"], problems),
        limit=config["limit"],
        seeds=tuple(seeds),
        batch_size=config["batch_size"],
        val_limit=config["val_limit"],
        decoding=typed(Decoding, config["decoding"], "evaluation.decoding", problems),
        scorer=config["scorer"] or "rouge",
        template=config["template"],
        max_prompt_length=config["max_prompt_length"],
        protocol=config["protocol"],
        allow_overlap=config["allow_overlap"],
        measures=make_measure_settings(config.get("measures"), problems),
    )
    problems += evaluation.problems()
    if evaluation.protocol is not None and evaluation.protocol not in protocols():
        problems.append(
            f"evaluation.protocol is {evaluation.protocol!r}; it is set by evaluation=..., and these are protocols: "
            f"{', '.join(protocols())}"
        )
    return evaluation


def _sets(config: Any, problems: list[str]) -> dict[str, SetSource]:
    shape = "give names and files: evaluation.sets={mine: file.jsonl}, or mine: {source: file.jsonl, scorer: ...}"
    if not isinstance(config or {}, dict):
        problems.append(f"evaluation.sets is {config!r}; {shape}")
        return {}
    sets = {}
    for name, entry in (config or {}).items():
        node = {"source": entry} if isinstance(entry, str) else entry
        if not isinstance(node, dict) or not isinstance(node.get("source"), str):
            problems.append(f"evaluation.sets.{name} is {entry!r}; {shape}")
            continue
        sets[str(name)] = typed(SetSource, node, f"evaluation.sets.{name}", problems)
    return sets


def typed(kind: type[T], node: dict[str, Any], name: str, problems: list[str]) -> T:
    """A dataclass from a node of the config; keys that it does not know become problems."""
    known = {one.name for one in fields(cast(Any, kind))}
    unknown = sorted(set(node) - known)
    problems += [f"{name} has no key {key!r}; allowed: {', '.join(sorted(known))}" for key in unknown]
    return kind(**{key: value for key, value in node.items() if key in known})


def set_problems(evaluation: Evaluation, data: DataConfig | None) -> list[str]:
    """What would not be found out before the training is over: names that collide, missing files, another template."""
    if not evaluation.generate:
        return []
    found = [
        f"evaluation.sets has {name!r}; a set can't be called val, train or meta, nor have a slash in its name"
        for name in evaluation.sets
        if name in ("val", "train", "meta") or "/" in name
    ]
    if data is None:
        return found
    if data.prepare is None:
        sources = {f"evaluation.sets.{name}": entry.source for name, entry in evaluation.sets.items()}
        found += missing_sources(sources)
    if evaluation.template is not None and evaluation.template != data.template:
        found.append(
            f"evaluation.template is {evaluation.template!r}, but data.template is {data.template!r}: the student "
            "would be asked in a form that it was not trained on; give evaluation.template=null to ask in that of "
            f"the data{_no_longer(evaluation)}, or data.template={evaluation.template}"
        )
    return found


def _no_longer(evaluation: Evaluation) -> str:
    return f" (recorded as a deviation from {evaluation.protocol})" if evaluation.protocol else ""


def protocols() -> list[str]:
    """The names of the files of ``conf/evaluation`` that are protocols."""
    names = sorted(path.stem for path in (CONF_DIR / "evaluation").glob("*.yaml"))
    return [name for name in names if evaluation_group(name).get("protocol") == name]


def deviations(config: Mapping[str, Any]) -> list[str]:
    """In what an evaluation group differs from the protocol that it names, one phrase each.

    Args:
        config: the evaluation group, as plain dicts and lists.
    """
    if config["protocol"] is None:
        return []
    wanted: Any = OmegaConf.to_container(evaluation_group(config["protocol"]))
    pairs = [(key, config[key], wanted[key]) for key in PROTOCOL_KEYS if key != "decoding"]
    pairs += [
        (f"decoding.{key}", value, wanted["decoding"].get(key)) for key, value in dict(config["decoding"]).items()
    ]
    scorers = {
        name: entry.get("scorer") for name, entry in (config["sets"] or {}).items() if isinstance(entry, Mapping)
    }
    pairs += [(f"sets.{name}.scorer", own, wanted["scorer"]) for name, own in scorers.items() if own is not None]
    return [f"{key} is {_shown(given)} instead of {_shown(fixed)}" for key, given, fixed in pairs if given != fixed]


def evaluation_group(name: str) -> DictConfig:
    """A file of ``conf/evaluation`` with what it builds on, which are files of that folder alone."""
    node = cast(DictConfig, OmegaConf.load(CONF_DIR / "evaluation" / f"{name}.yaml"))
    bases = [evaluation_group(base) for base in node.pop("defaults", [])]
    return cast(DictConfig, OmegaConf.merge(*bases, node))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
