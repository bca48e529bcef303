"""The model card of an exported student: how it was made, its scores, how to reproduce it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from deltakd.data import DataConfig
from deltakd.evaluation.settings import EvaluationSettings
from deltakd.models import ModelSettings
from deltakd.models.identity import spec_of
from deltakd.tracking.card_usage import distances, hub_ids, usage
from deltakd.tracking.redaction import redacted
from deltakd.types import STUDENT, Loss

#: The run's config next to an exported model, for training it again.
CONFIG_FILE = "training_config.yaml"
_LIMITATIONS = (
    "The model copies what its teacher and its training data say, with their errors and biases, and was evaluated on "
    "the sets above alone. Scores of text overlap say little about truth, safety or usefulness: evaluate it for your "
    "own purpose before you rely on it."
)


@dataclass(frozen=True)
class CardFacts:
    """Facts of a run for its card, without its results.

    Args:
        name: the run's name.
        loss: the name of its loss.
        seed: the training seed.
        models: where the models come from.
        data: the training data.
        evaluation: how answers were generated and scored.
        hyperparameters: shown as YAML.
        objective: the loss itself.
        folder: the command's working directory: paths in the config are relative to it.
        run: the run directory.
    """

    name: str
    loss: str
    seed: int
    models: ModelSettings
    data: DataConfig
    evaluation: EvaluationSettings
    hyperparameters: Mapping[str, Any]
    objective: Loss
    folder: Path
    run: Path


def model_card(facts: CardFacts, summary: Mapping[str, Any]) -> str:
    """Return a student's card as Markdown, without home directories and secrets.

    Args:
        facts: facts of the run.
        summary: ``summary.json`` of the run; missing parts are left out.
    """
    summary = redacted(dict(summary))
    meta = summary.get("meta", {})
    sections = [_head(facts, meta), usage(facts.data, facts.evaluation.decoding), _made_from(facts, meta)]
    sections += [_scores(facts, summary), _settings(facts), _again(facts, meta)]
    sections += [f"## Limitations\n\n{_LIMITATIONS}", _LICENCE]
    return "\n\n".join(redacted(section) for section in sections if section) + "\n"


_LICENCE = (
    "## Licence\n\nUnknown. The weights derive from the models and the data named above: their licences decide what "
    "may be done with this model. Whoever publishes it replaces `license: unknown` in the head of this file by "
    "[the hub's name](https://huggingface.co/docs/hub/repositories-licenses) of the licence that they allow, or by "
    "`license: other` with `license_name` and `license_link`."
)


def _head(facts: CardFacts, meta: Mapping[str, Any]) -> str:
    base = hub_ids([facts.models.specs[STUDENT].path])
    data = hub_ids([facts.data.train] if isinstance(facts.data.train, str) else facts.data.train or [])
    fields: dict[str, Any] = {"license": "unknown", "library_name": "transformers", "pipeline_tag": "text-generation"}
    fields |= {"base_model": base[0], "base_model_relation": "finetune"} if base else {}
    fields |= {"datasets": data} if data else {}
    fields["tags"] = ["deltakd", "distillation"]
    head = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    parameters = meta.get("exported_parameters", meta.get("parameters", {}).get(STUDENT))
    size = "" if parameters is None else f" of {parameters:,} parameters"
    return (
        f"---\n{head}---\n\n# {facts.name}\n\n"
        f"A language model{size}, trained with [deltakd](https://arxiv.org/abs/2509.14526) (loss `{facts.loss}`)."
    )


def _made_from(run: CardFacts, meta: Mapping[str, Any]) -> str:
    roles = [STUDENT, *meta.get("references", [r for r in meta.get("parameters", {}) if r != STUDENT])]
    rows = {f"starting point ({STUDENT})" if role == STUDENT else role: _source(run.models, role) for role in roles}
    facts: dict[str, Any] = {
        "trained parameters": _trained(run.models, meta),
        "training data": _code(run.data.train),
        "rows": meta.get("data", {}).get("train/rows"),
        "sha256 of the tokenised rows": _code(meta.get("data_sha256")),
        "template": _code(run.data.template),
        "valid tokens trained on": meta.get("valid_tokens"),
        "optimiser steps": meta.get("steps"),
        "best step": meta.get("best_step"),
        "chosen by": _code(meta.get("objective")),
        "seed": run.seed,
    }
    return _table("How it was made", ("", ""), [(k, v) for k, v in (rows | facts).items() if v is not None])


def _trained(models: ModelSettings, meta: Mapping[str, Any]) -> str | None:
    """Return how many parameters were trained, and which."""
    trained, lora = meta.get("trained_parameters"), models.lora
    if trained is None:
        return None
    if lora is None:
        return f"{trained:,}" if trained != meta.get("exported_parameters") else f"{trained:,} (all)"
    layers = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    adapter = f"LoRA adapter of rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, on {layers}"
    return f"{trained:,} ({adapter}; merged into the weights)"


def _source(models: ModelSettings, role: str) -> str:
    spec = spec_of(models, role)
    return "from scratch" if spec is None or spec.path is None else spec.path


def _scores(facts: CardFacts, summary: Mapping[str, Any]) -> str:
    evaluation = facts.evaluation
    spreads = ("_stderr", "_seed_std")
    names = [k for k, v in summary.items() if isinstance(v, int | float) and not k.endswith(spreads)]
    rows = [(f"`{k}`", f"{summary[k]:.4f}", _stderr(summary, k)) for k in names]
    protocol = ", ".join(f"{key}={value}" for key, value in asdict(evaluation.decoding).items())
    limit = evaluation.limit
    note = (
        "Scores of answers, `ece`, `top1_agreement`, `distinct_n` and `repetition_4` are in per cent, losses and "
        f"`kl_teacher` in nats per token. Decoding: {protocol}; sampling seeds "
        f"{list(evaluation.seeds)}; {'all rows' if limit is None else f'the first {limit} rows'} of each set; "
        "± is one standard error over prompts."
    )
    if not rows:
        return ""
    measured = "\n".join(f"- {figure}: {meaning}" for figure, meaning in distances(facts.objective, names))
    return _table("Scores", ("metric", "value", "±"), rows) + f"\n\n{note}\n\n{measured}"


def _stderr(summary: Mapping[str, Any], name: str) -> str:
    error = summary.get(f"{name}_stderr")
    return "" if error is None else f"{error:.4f}"


def _settings(facts: CardFacts) -> str:
    text = yaml.safe_dump(dict(facts.hyperparameters), sort_keys=False, allow_unicode=True)
    return f"## Hyperparameters\n\n```yaml\n{text}```"


def _again(facts: CardFacts, meta: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in meta.get("packages", {}).items() if version)
    commit = f"Commit `{meta['git_commit']}`; " if meta.get("git_commit") else ""
    where = f"{commit}{packages}; {meta.get('machine')}, {meta.get('device')}."
    command = "python -m deltakd.train --config-dir"
    beside = f"{CONFIG_FILE.removesuffix('.yaml')} run_dir=outputs/again"
    return (
        f"## To train it again\n\n{where}\n\nWhere it was trained, from the folder in which the paths of its config "
        f"begin:\n\n    cd {_quoted(facts.folder)}\n"
        f"    {command} {_quoted(facts.run)} --config-name config run_dir={_quoted(facts.run)}_again\n\n"
        f"A copy made by `python -m deltakd.export` has that config beside the weights, as `{CONFIG_FILE}`; elsewhere, "
        f"give the models and the data as well (model.student.path=..., data.train=...):\n\n"
        f"    {command} . --config-name {beside}"
    )


def _quoted(path: Path) -> str:
    """Return the path for a shell, which expands ``~`` only outside quotes."""
    text = str(redacted(str(path)))
    return f"~/{shlex.quote(text[2:])}" if text.startswith("~/") else shlex.quote(text)


def _table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (head, ("---",) * len(head), *rows)]
    return f"## {title}\n\n" + "\n".join(lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _code(value: Any) -> str | None:
    return None if value is None else f"`{value}`"
