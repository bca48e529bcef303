"""The ready-made losses of conf/loss, by name."""

from __future__ import annotations

import functools
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from deltakd.config.compose import CONF_DIR
from deltakd.types import Loss

_ALL = sorted(path.stem for path in (CONF_DIR / "loss").glob("*.yaml"))
#: Losses of tokens that the student sampled: their value is not what their gradient differentiates.
SAMPLED = ["delta_opd", "exopd", "minillm", "opd", "opd2"]
#: Losses of pairs of responses.
PAIRED = ["dpkd"]
#: Losses of two tokenizers, which read an alignment beside the logits (tests/losses/test_two_tokenizers.py).
ALIGNED = ["delta_span", "dskd", "span_kd", "uld"]
#: Losses of any tokens.
NAMES = [name for name in _ALL if name not in (*SAMPLED, *PAIRED, *ALIGNED)]
#: All but SFT: those with a term beside the cross-entropy.
DISTILLING = [name for name in NAMES if name != "sft"]


@functools.cache
def _composed(name: str, matching: str | None) -> DictConfig:
    choice = [f"loss/matching={matching}"] if matching else []
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(f"loss/{name}", ["+delta_weight=1.0", *choice])


def loss_named(name: str, matching: str | None = None, delta_weight: Any = 1.0, **options: Any) -> Loss:
    """A new loss from its YAML; ``options`` are set in it, with ``__`` for a dot (``target__treatment__mask=0.1``)."""
    config = _composed(name, matching).copy()
    config.delta_weight = delta_weight
    for key, value in options.items():
        OmegaConf.update(config.loss, key.replace("__", "."), value)
    return hydra.utils.instantiate(OmegaConf.to_container(config.loss, resolve=True), _convert_="all")


def variants(name: str) -> list[Loss]:
    """A loss as it stands, off its defaults, with its shift treated where it has one, and its other choices."""
    if name == "sft":
        return [loss_named(name)]
    losses = [loss_named(name), loss_named(name, delta_weight=0.7, temperature=1.7, ce_weight=0.3)]
    key = _treatment_key(name)
    if key is not None:
        treated = {f"{key}__centre": "teacher_raw", f"{key}__clip": 1.5, f"{key}__mask": 0.05}
        losses.append(loss_named(name, delta_weight=0.7, **treated))
    if name == "kd_plus_delta":
        losses.append(loss_named(name, matching="ratio"))
    if name == "parallel_logit":
        losses += [loss_named(name, matching__weighting=choice) for choice in ("uniform", "student", "student_raw")]
    if name == "signed_parallelogram":
        losses.append(loss_named(name, delta_weight=0.7, unsafe=True))
    return losses


def _treatment_key(name: str) -> str | None:
    if name.startswith("delta_") and name != "delta_gated":
        return "target__treatment"
    if name.startswith("parallel_") or name == "kd_plus_delta":
        return "matching__treatment"
    return "treatment" if name == "parallelogram" else None
