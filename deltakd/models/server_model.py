"""A model that an inference server serves, compared with the model that a run expects there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from deltakd.io.errors import RefusedError
from deltakd.io.inference_server import InferenceServer
from deltakd.models.tokenizers import PROBE

#: Entries of a transformers config that decide which weights fit.
_SIZES = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "tie_word_embeddings", "num_experts", "num_local_experts",
)  # fmt: skip


@dataclass(frozen=True)
class ServedModel:
    """A model of a server.

    Args:
        name: what requests call it.
        source: the path or hub id that the server opened; None: it does not say.
        longest: most tokens of prompt and response together; None: it does not say.
        by: the kind of server, such as ``vllm`` or ``sglang``; None: it does not say.
    """

    name: str
    source: str | None
    longest: int | None
    by: str | None = None


def served_model(server: InferenceServer, wanted: str | None, key: str) -> ServedModel:
    """Return the model of a server.

    Args:
        server: the server.
        wanted: its name there; None: the only one.
        key: the config key of the name.

    Raises:
        LostServerError: the server is not there.
        RefusedError: it is another kind of server.
        ValueError: it serves no such model, or several and none is named.
    """
    listed = server.get("/v1/models")
    entries = listed.get("data") if isinstance(listed, Mapping) else None
    if not isinstance(entries, list) or not all(isinstance(one, Mapping) and "id" in one for one in entries):
        raise RefusedError(f"the server {server.url} does not speak OpenAI's API: /v1/models lists no models", 200)
    # vLLM lists LoRA adapters, too, each with its parent.
    models = {str(one["id"]): one for one in entries if one.get("parent") is None}
    names = ", ".join(models)
    if wanted is None and len(models) != 1:
        raise ValueError(f"the server {server.url} serves {names or 'no model'}; say which one: {key}=NAME")
    name = next(iter(models)) if wanted is None else wanted
    if name not in models:
        raise ValueError(f"{key} is {wanted!r}, and the server {server.url} serves {names}")
    found = models[name]
    return ServedModel(name, found.get("root"), found.get("max_model_len"), found.get("owned_by"))


def served_tokenizer_problems(
    server: InferenceServer, model: ServedModel, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return a sentence if the server cuts a probe text into other tokens than our tokenizer.

    A server without a tokenizer or without vLLM's ``/tokenize`` says nothing, and is not compared.

    Args:
        server: the server.
        model: its model.
        tokenizer: ours.
    """
    try:
        answer = server.post("/tokenize", {"model": model.name, "prompt": PROBE, "add_special_tokens": False})
    except RefusedError:
        return []
    theirs = answer.get("tokens") if isinstance(answer, Mapping) else None
    ours = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    if theirs is None or theirs == ours:
        return []
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return [
        f"the server {server.url} ({model.name}) has another tokenizer: it cuts a probe text into {len(theirs)} "
        f"tokens, ours into {len(ours)}, and token {at} is {_at(theirs, at)} there and {_at(ours, at)} here; serve a "
        "model with our tokenizer"
    ]


def _at(ids: list[int], place: int) -> str:
    return str(ids[place]) if place < len(ids) else "absent"


def served_config(model: ServedModel) -> PreTrainedConfig | None:
    """Return the config of a served model, if its source can be read here; nothing is downloaded."""
    if model.source is None:
        return None
    try:
        return AutoConfig.from_pretrained(model.source, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def architecture_problems(server: InferenceServer, model: ServedModel, ours: PreTrainedConfig) -> list[str]:
    """Return a sentence if the served model has other sizes than ours, so that our weights can't go there.

    Args:
        server: the server.
        model: its model; one whose config can't be read here is not compared.
        ours: the config of our model.
    """
    theirs = served_config(model)
    if theirs is None:
        return []
    differing = [
        f"{name} {there} there, {here} here"
        for name in _SIZES
        if (there := _entry(theirs, name)) != (here := _entry(ours, name)) and None not in (there, here)
    ]
    if not differing:
        return []
    return [
        f"the server {server.url} serves another model, {model.source}: {'; '.join(differing)}; serve the student: "
        "vllm serve <model.student.path>"
    ]


def _entry(config: PreTrainedConfig, name: str) -> Any:
    return getattr(config.get_text_config(decoder=True), name, None)
