"""A server of the references of a run (``deltakd.serve``)."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltakd.data import tokenizer_fingerprint
from deltakd.distributed.devices import choose_device
from deltakd.generation.model_step import position_limit
from deltakd.models import LanguageModel
from deltakd.models.identity import model_identity, spec_of
from deltakd.models.roles import Vocabularies, open_tokenizer, open_vocabularies
from deltakd.references.serving.address import Address
from deltakd.references.serving.reference_server import ReferenceServer, Served
from deltakd.references.serving.secret import read_token
from deltakd.training.assembly import open_references
from deltakd.training.elsewhere import student_vocabulary
from deltakd.training.image_check import served_images
from deltakd.training.settings import RunSettings
from deltakd.training.threads import choose_threads

log = logging.getLogger(__name__)


def make_server(settings: RunSettings, listen: Address | None = None) -> ReferenceServer:
    """Load the references of a run's loss, and listen.

    Args:
        settings: from ``make_serving_settings``.
        listen: where, if it is not where trainers find the server (``reference.url``).

    Raises:
        ValueError: models that are not available or do not fit together, an address that is taken, or no token.
    """
    assert settings.served is not None
    # First, since loading takes minutes.
    token = read_token(create=True)
    models = settings.model
    with tempfile.TemporaryDirectory() as folder:
        if models.tokenizer.train_on:
            settings.data.make_files()
        tokenizer = open_tokenizer(models, Path(folder) / "tokenizer")
    vocabularies = open_vocabularies(models, settings.specs, tokenizer)
    opened = open_references(settings, tokenizer, vocabularies)
    device = choose_device(settings.trainer.accelerator, settings.trainer.devices)
    choose_threads(settings.trainer, opened.values())
    content = _content(settings, tokenizer, vocabularies, opened)
    served = Served(opened, content, device, packing=settings.data.packing)
    return ReferenceServer(served, settings.served.address if listen is None else listen, token)


def _content(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    vocabularies: Vocabularies,
    opened: dict[str, LanguageModel],
) -> dict[str, Any]:
    """Return everything that determines the server's answers."""
    specs = {role: spec_of(settings.model, role) for role in opened}
    limits = [limit for model in opened.values() if (limit := position_limit(model.causal_lm)) is not None]
    return {
        "store": "served",
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocabulary": vocabularies.size,
        "student_vocabulary": student_vocabulary(settings, tokenizer),
        "positions": min(limits, default=None),
        "packing": settings.data.packing,
        "images": served_images(settings, tokenizer),
        "k": None,
        "temperature": None,
        "models": {role: model_identity(spec) for role, spec in specs.items() if spec is not None},
    }
