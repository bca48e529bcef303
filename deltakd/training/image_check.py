"""What a run with images can't do yet, named before any weights are loaded."""

from __future__ import annotations

from deltakd.data import LoadedSets
from deltakd.data.encoding.image_reader import ImageError, ImageReader, reader_beside
from deltakd.io.errors import ConfigError
from deltakd.models import ModelSpec, load_config
from deltakd.models.image_models import IMAGE_FAMILIES, reads_images
from deltakd.models.tokenizers import load_tokenizer
from deltakd.references.settings import LiveSettings
from deltakd.training.settings import RunSettings
from deltakd.types import STUDENT


def check_images(settings: RunSettings, sets: LoadedSets) -> None:
    """Raise a ConfigError with everything that keeps a run from rows with images; rows of text alone pass.

    Args:
        settings: of the run.
        sets: tokenised rows.
    """
    held = [encoded for encoded in (sets.train, sets.val) if encoded is not None and encoded.images is not None]
    if not held or held[0].images is None:
        return
    problems = _setting_problems(settings)
    several = settings.trainer.num_nodes > 1 or settings.trainer.devices != 1
    if several and any(encoded.counts["images"] < len(encoded) for encoded in held):
        problems.append(
            "some rows hold images and some do not, and on several processes the ranks would run different parts of "
            "the model; give trainer.devices=1, or rows that all hold images"
        )
    problems += _model_problems(settings, held[0].images.reader)
    if problems:
        raise ConfigError(problems)


def _setting_problems(settings: RunSettings) -> list[str]:
    problems = []
    if settings.loss.requires and not isinstance(settings.reference, LiveSettings):
        problems.append("rows hold images, which only live references read; give reference=live")
    if settings.data.packing:
        problems.append("rows hold images, which packed rows do not carry; give data.packing=false")
    if settings.model.routes:
        problems.append("rows hold images, and model.routes divides batches of text alone; take it out")
    if settings.rollout.on_policy:
        problems.append("rows hold images, and the student answers prompts of text alone; give rollout=none")
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
                f"{key} reads an image in place of token {config.image_token_id} (image_token_id of its configuration), "
                f"and the student's processor writes {reader.token!r}, which is token {reader.token_id}; give models and "
                "a processor that belong together"
            )
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
        f"{key}={path} has another image processor than the student (another class, size, patches or normalisation), so "
        "it would read other pixels, or other tokens; give models that share one"
    ]
