"""The parts of a model card that tell a reader how to use the model, and what its loss figures measure."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping

from deltakd.data import DataConfig, TextData
from deltakd.data.encoding.templates import AlpacaTemplate, PlainTemplate
from deltakd.generation.decoding import Decoding
from deltakd.losses import Distillation
from deltakd.losses.schedules import Constant
from deltakd.losses.targets import ShiftedTarget, Target
from deltakd.types import Loss, Schedule

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_QUESTION = "Name three colours."


def usage(data: DataConfig, decoding: Decoding) -> str:
    """Return code that opens the model and prompts it in the format of its training."""
    options = f"max_new_tokens={decoding.max_new_tokens}, do_sample={decoding.do_sample}"
    return (
        "## Use\n\nThe model opens with transformers alone. Ask it in the form that it was trained on:\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'path = "."  # this directory, or its name on the hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(path)\n"
        "model = AutoModelForCausalLM.from_pretrained(path)\n"
        f"{_asked(data)}"
        f"output = model.generate(**inputs, {options})\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n```'
        f"{_with_input(data)}"
    )


def _asked(data: DataConfig) -> str:
    if data.template == "chat" and not isinstance(data, TextData):
        return (
            f'messages = [{{"role": "user", "content": {json.dumps(_QUESTION)}}}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        )
    plain = _plain(data)
    prompt = "Once upon a time" if plain is None else plain.without_input.format(instruction=_QUESTION)
    return f'prompt = {json.dumps(prompt, ensure_ascii=False)}\ninputs = tokenizer(prompt, return_tensors="pt")\n'


def _with_input(data: DataConfig) -> str:
    plain = _plain(data)
    if plain is None or plain.with_input == plain.without_input:
        return ""
    form = json.dumps(plain.with_input, ensure_ascii=False)
    return f"\n\nA question with an input of its own has the form\n\n```python\n{form}\n```"


def _plain(data: DataConfig) -> PlainTemplate | None:
    """Return the format-string template; None for a chat template and for plain text."""
    if isinstance(data, TextData):
        return None
    if isinstance(data.template, Mapping):
        keys = ("with_input", "without_input", "tail")
        return PlainTemplate(*(str(data.template[key]) for key in keys))
    return AlpacaTemplate() if data.template == "alpaca" else None


def distances(loss: Loss, scores: Iterable[str]) -> list[tuple[str, str]]:
    """Return (figure, what it measures) for each loss figure among the scores.

    Args:
        loss: of the run.
        scores: names of all scores, such as ``val/loss``.
    """
    first = next(iter((type(loss).__doc__ or type(loss).__name__).strip().splitlines()))
    # Without the place in the documentation where the formula comes from.
    formula = re.sub(r"\s*\([^()]*(?:arXiv|docs/)[^()]*\)", "", first).rstrip(".:")
    means = {
        "loss": f"what was minimised: {formula}{_weights(loss)}",
        "ce": "cross-entropy of the reference answers under this model; a distance to the data alone",
        "kl_teacher": "KL(teacher ‖ this model), at temperature 1, whatever the loss was",
        "span_kl_teacher": "the same of a teacher with another tokenizer, over spans of text that both share",
    }
    if isinstance(loss, Distillation):
        name = loss.divergence.name
        means[name] = (
            f"{name.replace('_kl', ' KL').replace('_', ' ')} of this model from the target {_target(loss.target)}, "
            f"at temperature {loss.temperature:g}"
        )
    there = {name.rpartition("/")[2] for name in scores}
    return [(f"`{name}`", meaning) for name, meaning in means.items() if name in there]


def _weights(loss: Loss) -> str:
    weight = getattr(loss, "ce_weight", None)
    return "" if weight is None else f", λ = {weight:g}"


def _target(target: Target) -> str:
    if not isinstance(target, ShiftedTarget):
        return type(target).__name__
    terms = [f" + {_number(shift.weight, shift.factor)} · ({shift.to} − {shift.origin})" for shift in target.shifts]
    return f"{target.base}{''.join(terms)}" + (" (in logits)" if terms else "")


def _number(weight: Schedule, factor: float) -> str:
    value = f"{weight.value * factor:g}"
    return value if isinstance(weight, Constant) else f"w (which changes in training; {value} at its end)"


def hub_ids(sources: Iterable[str | None]) -> list[str]:
    """Return the hub ids ``owner/name`` among models or data sources, without local files and folders."""
    found = []
    for source in sources:
        name = (source or "").partition("#")[0].partition(":")[0]
        if _HUB_ID.fullmatch(name) and not os.path.exists(name) and not os.path.splitext(name)[1].startswith(".json"):
            found.append(name)
    return list(dict.fromkeys(found))
