"""Estimates without models at hand: by architecture, number of GPUs and strategy (``deltakd.plan``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from deltakd.config.build import make_step_settings, read_strategy
from deltakd.config.compose import compose_config, read_mapping
from deltakd.config.folders import choices
from deltakd.estimates.costs import Setting
from deltakd.estimates.layout import Layout
from deltakd.estimates.memory import make_setting
from deltakd.estimates.sizes import Skeleton
from deltakd.io.errors import ConfigError
from deltakd.models import ModelSpec
from deltakd.models.image_models import auto_class
from deltakd.models.loading import DTYPES
from deltakd.types import STUDENT, STUDENT_RAW

_QWEN = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def _qwen(*sizes: int, vocabulary: int, tied: bool = False) -> dict[str, Any]:
    return {"model_type": "qwen2", "vocab_size": vocabulary, "tie_word_embeddings": tied} | dict(
        zip(_QWEN, sizes, strict=True)
    )


#: Name -> architecture, from the model cards of Qwen2.5 (arXiv 2412.15115).
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen(896, 24, 14, 2, 4864, vocabulary=151_936, tied=True),
    "qwen2.5-1.5b": _qwen(1536, 28, 12, 2, 8960, vocabulary=151_936, tied=True),
    "qwen2.5-3b": _qwen(2048, 36, 16, 2, 11_008, vocabulary=151_936, tied=True),
    "qwen2.5-7b": _qwen(3584, 28, 28, 4, 18_944, vocabulary=152_064),
    "qwen2.5-14b": _qwen(5120, 48, 40, 8, 13_824, vocabulary=152_064),
    "qwen2.5-32b": _qwen(5120, 64, 40, 8, 27_648, vocabulary=152_064),
    "qwen2.5-72b": _qwen(8192, 80, 64, 8, 29_568, vocabulary=152_064),
}
#: The paper's students, teacher (and raw teacher), and numbers of GPUs.
PAPER = (("qwen2.5-7b", "qwen2.5-1.5b"), "qwen2.5-72b", (8, 16, 64))
#: Overrides for plans without models at hand; the user's own replace them.
BASE = (
    "trainer.precision=bf16-mixed",
    "model.teacher.dtype=bfloat16",
    "model.student_raw.dtype=bfloat16",
    "model.gradient_checkpointing=true",
    "data.max_length=2048",
    "data.batch_size=4",
)
REFERENCES = {"replicate": "replicated", "shard": "sharded", "cached": "cached"}


class Way(NamedTuple):
    """How a training run is spread.

    Args:
        strategy: a name in ``conf/strategy``.
        references: ``replicate``, ``shard`` or ``cached``.
    """

    strategy: str
    references: str


WAYS = (
    Way("ddp", "replicate"),
    Way("deepspeed_zero2", "shard"),
    Way("deepspeed_zero3", "shard"),
    Way("deepspeed_zero3_offload", "shard"),
    Way("fsdp", "shard"),
    Way("deepspeed_zero2", "cached"),
)


@dataclass(frozen=True)
class Case:
    """One row of the tables.

    Args:
        gpus: number of GPUs.
        way: how they are used.
        setting: the inputs to the costs.
    """

    gpus: int
    way: Way
    setting: Setting

    @property
    def references(self) -> str:
        """The placement of the references, in a word."""
        return REFERENCES[self.way.references] if self.setting.references or self.setting.cached_heads else "none"


def strategies() -> list[str]:
    return choices("strategy")


def default_ways() -> list[Way]:
    """Return the sensible ways among the available strategies."""
    return [way for way in WAYS if way.strategy in strategies()]


def read_ways(text: str) -> list[Way]:
    """Parse ways such as ``fsdp+shard,ddp``; without ``+`` the references are replicated.

    Raises:
        ConfigError: lists every unknown name.
    """
    ways, problems, known = [], [], strategies()
    for part in text.split(","):
        strategy, _, references = part.strip().partition("+")
        way = Way(strategy, references or "replicate")
        if way.strategy not in known:
            problems.append(f"--strategies: {way.strategy!r} is not a strategy; allowed: {', '.join(known)}")
        if way.references not in REFERENCES:
            problems.append(f"--strategies: after + comes one of {', '.join(REFERENCES)}, not {way.references!r}")
        ways.append(way)
    if problems:
        raise ConfigError(problems)
    return ways


def read_architecture(text: str, option: str) -> tuple[str, dict[str, Any]]:
    """Return (name, architecture) from a built-in name or a mapping ``{model_type: ..., vocab_size: ..., ...}``.

    Raises:
        ValueError: it is neither.
    """
    if text.lower() in ARCHITECTURES:
        return text.lower(), ARCHITECTURES[text.lower()]
    how = (
        f"{option} {text!r} is not an architecture; give one of {', '.join(ARCHITECTURES)}, or a mapping with "
        "model_type, vocab_size and its sizes: '{model_type: qwen2, vocab_size: 32000, hidden_size: 1024, ...}'"
    )
    if not text.lstrip().startswith("{"):
        raise ValueError(how)
    try:
        given = read_mapping(text)
        kind, vocabulary = str(given["model_type"]), int(given["vocab_size"])
        AutoConfig.for_model(kind)
    # Whatever bad YAML, a missing key or an unknown type raises: the text is wrong.
    except Exception as error:
        raise ValueError(f"{how} ({type(error).__name__}: {' '.join(str(error).split())[:120]})") from None
    return f"{kind}, {vocabulary} tokens", {str(key): value for key, value in given.items()}


def assumed(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of ``BASE`` that fill in what the user's own leave out."""
    given = {override.split("=", 1)[0] for override in overrides}
    return [override for override in BASE if override.split("=", 1)[0] not in given]


def make_cases(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    gpus: Sequence[int],
    ways: Sequence[Way],
    overrides: Sequence[str],
) -> list[Case]:
    """Make a case for each number of GPUs and each way.

    Args:
        student: architecture of student and raw student.
        teacher: architecture of all other references.
        gpus: numbers of GPUs.
        ways: strategies.
        overrides: as for ``deltakd.train``, on top of ``BASE``.

    Raises:
        ValueError: invalid overrides, or an architecture that can't be built.
    """
    cfg = compose_config("train", [*assumed(overrides), *overrides])
    if cfg.model.lora:
        raise ValueError("model/lora is counted only for models that are available; leave --student out")
    if any(isinstance(spec, Mapping) and spec.get("adapter") for spec in cfg.model.values()):
        raise ValueError("model.<teacher>.adapter is counted only for models that are available; leave --student out")
    step = make_step_settings(cfg)
    precision = str(step.trainer.precision)
    shapes = {role: student if role == STUDENT_RAW else teacher for role in sorted(step.loss.requires)}
    live = {role: _skeleton(shape, step.model.specs[role].dtype) for role, shape in shapes.items()}
    cases = []
    for count in gpus:
        for way in ways:
            layout = Layout.of(read_strategy(way.strategy), count, way.references == "shard")
            own = _skeleton(student, layout.whole_dtype(precision) or step.model.specs[STUDENT].dtype, trained=True)
            cached = way.references == "cached"
            setting = make_setting(
                step,
                layout,
                own,
                {} if cached else live,
                device="cuda",
                home="cuda",
                cached_heads=[(s.head.numel(), s.head_itemsize) for s in live.values()] if cached else [],
                cached_bytes=sum(s.config.hidden_size * s.head_itemsize for s in live.values()) if cached else 0,
            )
            cases.append(Case(count, way, setting))
    return cases


def _skeleton(architecture: Mapping[str, Any], dtype: str, trained: bool = False) -> Skeleton:
    return Skeleton(_build(json.dumps(dict(architecture)), dtype, trained), ModelSpec())


@cache
def _build(architecture: str, dtype: str, trained: bool) -> Any:
    """Build the model on ``meta``; cached, since many cases share a model.

    Raises:
        ValueError: transformers can't build it.
    """
    given = json.loads(architecture)
    try:
        config = AutoConfig.for_model(given.pop("model_type"), **given)
        with torch.device("meta"):
            return auto_class(config).from_config(config, dtype=DTYPES[dtype]).requires_grad_(trained)
    # transformers raises all sorts of errors for sizes that don't fit together.
    except Exception as error:
        raise ValueError(f"no model can be built of {given}: {type(error).__name__}: {error}") from None
