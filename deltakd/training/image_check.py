"""What a run with images can't do yet, named before any weights are loaded."""

from __future__ import annotations

from deltakd.data import LoadedSets
from deltakd.data.encoding.images import ImageError, ImageReader, reader_beside
from deltakd.io.errors import ConfigError
from deltakd.models import load_config
from deltakd.models.image_models import IMAGE_FAMILIES, reads_images
from deltakd.models.tokenizers import load_tokenizer
from deltakd.references.settings import LiveSettings
from deltakd.training.settings import RunSettings


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
        config = load_config(role, spec, vocabulary=1, trust_remote_code=settings.model.trust_remote_code)
        key = f"model.{role}"
        if not reads_images(config):
            known = ", ".join(sorted(IMAGE_FAMILIES))
            problems.append(f"rows hold images, and {key} ({config.model_type}) reads none; families that do: {known}")
            continue
        try:
            other = reader_beside(load_tokenizer(str(spec.path), f"{key}.path"))
        except ImageError as error:
            problems.append(f"{key}: {error}")
            continue
        if other.identity != reader.identity:
            problems.append(
                f"{key}.path={spec.path} has another image processor than the student (another class, size, patches "
                "or normalisation), so it would read other pixels, or other tokens; give models that share one"
            )
    return problems
