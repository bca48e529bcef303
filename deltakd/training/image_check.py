"""What keeps a run from rows with images, named before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltakd.data import LoadedSets, Row
from deltakd.data.encoding.image_reader import ImageError, ImageReader, processor_digest, reader_beside
from deltakd.data.encoding.token_cache import fingerprint
from deltakd.data.sources.stored_rows import holds_images
from deltakd.io.errors import ConfigError
from deltakd.models import ModelSpec, load_config
from deltakd.models.image_models import IMAGE_FAMILIES, feature_differences, reads_images
from deltakd.models.tokenizers import load_tokenizer
from deltakd.training.settings import RunSettings
from deltakd.types import STUDENT


def check_images(settings: RunSettings, sets: LoadedSets) -> None:
    """Raise a ConfigError with everything that keeps a run from rows with images; rows of text alone pass.

    Args:
        settings: of a training run, or of one that fills a cache.
        sets: tokenised rows.
    """
    reader = sets.image_reader
    if reader is not None:
        problems = _setting_problems(settings) + _model_problems(settings, reader)
        if problems:
            raise ConfigError(problems)


def check_image_models(settings: RunSettings, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ConfigError if rows hold images, and a model can't read them.

    Raises:
        ImageError: the student's tokenizer has no processor.
    """
    problems = _model_problems(settings, reader_beside(tokenizer)) if holds_images(rows) else []
    if problems:
        raise ConfigError(problems)


def served_images(settings: RunSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what trainers must know of a server before they send images.

    Returns:
        ``processor``: what identifies the student's; None: it has none. ``problems``: why the models can't read images.
    """
    if not processor_digest(tokenizer):
        # Models of text: nothing is opened for them.
        return {"processor": None, "problems": []}
    try:
        reader = reader_beside(tokenizer)
    except ImageError as error:
        return {"processor": None, "problems": [str(error)]}
    return {"processor": fingerprint(reader.identity), "problems": _model_problems(settings, reader)}


def server_problems(reader: ImageReader, content: Mapping[str, Any], url: object) -> list[str]:
    """Return why a server can't run rows with images as this run would.

    Args:
        reader: of the student's images.
        content: of the server, with what ``served_images`` returned there.
        url: of the server.
    """
    there = content.get("images") or {"processor": None, "problems": []}
    if there["problems"]:
        return [f"the server reference.url={url} says: {problem}" for problem in there["problems"]]
    if there["processor"] == fingerprint(reader.identity):
        return []
    return [
        f"rows hold images, and the server reference.url={url} has "
        + ("no image processor" if there["processor"] is None else "another image processor for the student")
        + "; start it with the overrides of this run"
    ]


def _setting_problems(settings: RunSettings) -> list[str]:
    problems = []
    if settings.cache is not None and settings.cache.outside:
        problems.append(
            "rows hold images, and log-probs of servers and files (reference.url, reference.log_probs) are of text "
            "alone; load the models"
        )
    if settings.data.packing:
        problems.append("rows hold images, which packed rows do not carry; give data.packing=false")
    if settings.model.routes:
        problems.append("rows hold images, and model.routes divides batches of text alone; take it out")
    if settings.rollout.on_policy and settings.rollout.engine != "own":
        problems.append(
            f"rows hold images, and rollout.engine={settings.rollout.engine} is sent text alone; give "
            "rollout.engine=own"
        )
    return problems


def _model_problems(settings: RunSettings, reader: ImageReader) -> list[str]:
    problems = []
    for role, spec in settings.specs.items():
        if spec.path is None and spec.init == "pretrained":
            # An adapter on the raw teacher.
            continue
        config = load_config(role, spec, vocabulary=1, trust_remote_code=settings.model.trust_remote_code)
        key = f"model.{role}"
        if not reads_images(config):
            known = ", ".join(sorted(IMAGE_FAMILIES))
            problems.append(f"rows hold images, and {key} ({config.model_type}) reads none; families that do: {known}")
            continue
        if config.image_token_id != reader.token_id:
            problems.append(
                f"{key} reads images in place of token {config.image_token_id} (its image_token_id), and the student's "
                f"processor writes {reader.token!r}, which is token {reader.token_id}; give models and a processor "
                "that belong together"
            )
        problems += [
            f"the student's processor has {name}={here}, and {key} needs {there}: an image would have fewer or more "
            "tokens than features; give models and a processor that belong together"
            for name, here, there in feature_differences(config, reader.settings)
        ]
        if role != STUDENT:
            problems += _processor_problems(role, spec, reader)
    return problems


def _processor_problems(role: str, spec: ModelSpec, reader: ImageReader) -> list[str]:
    """Return why a model can't read the images as the student's processor prepares them."""
    key, path = ("tokenizer", spec.tokenizer) if spec.tokenizer else ("path", spec.path)
    key = f"model.{role}.{key}"
    try:
        other = reader_beside(load_tokenizer(str(path), key))
    except ImageError as error:
        return [f"{key}: {error}"]
    if other.identity == reader.identity:
        return []
    return [
        f"{key}={path} has another image processor than the student (another class, size, patches or normalisation), "
        "so it would read other pixels, or other tokens; give models that share one"
    ]
