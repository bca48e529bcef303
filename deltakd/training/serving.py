"""A server of the references of a run (``deltakd.serve``)."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from deltakd.data import tokenizer_fingerprint
from deltakd.distributed.devices import choose_device
from deltakd.distributed.ranks import agreed, external_launch, main_process_first
from deltakd.generation.model_step import position_limit
from deltakd.models import LanguageModel
from deltakd.models.identity import model_identity, spec_of
from deltakd.models.roles import Vocabularies, open_tokenizer, open_vocabularies
from deltakd.references.serving.address import Address
from deltakd.references.serving.reference_server import ReferenceServer, Served
from deltakd.references.serving.secret import read_token
from deltakd.references.serving.team import join_team
from deltakd.training.assembly import open_references
from deltakd.training.elsewhere import student_vocabulary
from deltakd.training.image_check import served_images
from deltakd.training.settings import RunSettings
from deltakd.training.threads import choose_threads

log = logging.getLogger(__name__)


def make_server(settings: RunSettings, listen: Address | None = None) -> ReferenceServer:
    """Load the references of a run's loss, and listen.

    Collective: the other processes of the server call ``open_served`` meanwhile.

    Args:
        settings: from ``make_serving_settings``.
        listen: where, if it is not where trainers find the server (``reference.url``).

    Raises:
        ValueError: models that are not available or do not fit together, an address that is taken, or no token.
    """
    assert settings.served is not None
    address = settings.served.address if listen is None else listen
    # First, since loading takes minutes.
    token = read_token(create=True)
    address.check_free()
    return ReferenceServer(open_served(settings), address, token)


def open_served(settings: RunSettings) -> Served:
    """Load the references of a run's loss. Collective: call in every process of the server.

    Raises:
        ValueError: models that are not available or do not fit together, or one process that is to be several.
    """
    assert settings.served is not None
    launch = external_launch()
    if settings.served.sharding == "tensor" and launch is None:
        raise ValueError(
            "reference.sharding=tensor splits models over processes, and this server is one; start it with "
            "`torchrun --nproc-per-node N -m deltakd.serve ...`, or give reference.sharding=replicate"
        )
    device = choose_device(settings.trainer.accelerator, settings.trainer.devices)
    if launch is not None and not dist.is_initialized():
        # Also tells where they meet, if SLURM started them.
        agreed("the references to serve", ", ".join(settings.read_roles))
        join_team(device, launch.rank, launch.world_size)
    models = settings.model
    with tempfile.TemporaryDirectory() as folder:
        if models.tokenizer.train_on:
            with main_process_first("the tokenizer's files"):
                settings.data.make_files()
        tokenizer = open_tokenizer(models, Path(folder) / "tokenizer")
    vocabularies = open_vocabularies(models, settings.specs, tokenizer)
    opened = open_references(settings, tokenizer, vocabularies)
    choose_threads(settings.trainer, opened.values())
    content = _content(settings, tokenizer, vocabularies, opened)
    return Served(opened, content, device, packing=settings.data.packing, sharding=settings.served.sharding)


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
