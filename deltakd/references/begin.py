"""Creating a cache: the format of a stored token and, for a top-K store, the choice of K."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deltakd.data import DataConfig, EncodedSet, LoadedSets, collate
from deltakd.kernels import Buckets
from deltakd.models import LanguageModel, ModelSettings
from deltakd.models.identity import model_identity, spec_of
from deltakd.models.roles import OWN_ROLES, Vocabularies
from deltakd.models.tokenizers import pad_id
from deltakd.references import CacheSettings, CacheStore, LiveReferences
from deltakd.references.cached import DTYPES
from deltakd.references.outside import LogProbSource
from deltakd.references.store import SUPPORT
from deltakd.references.topk import CANDIDATES, log_probs_at, make_buckets, sample_errors
from deltakd.types import STUDENT, Batch, Head, Loss

log = logging.getLogger(__name__)

#: Valid tokens in the sample on which K is chosen and errors are measured.
SAMPLE_TOKENS = 2048


@dataclass(frozen=True)
class Caching:
    """Everything loaded that caching needs.

    Args:
        settings: the group ``reference``.
        models: the group ``model``.
        data: the group ``data``.
        loss: the loss that will be trained.
        tokenizer: the student's.
        vocabularies: numbers of tokens that the models share, and the teachers' tokenizer if they have one.
        sets: tokenised rows.
        references: the models that are loaded, on ``device``.
        outside: gives the log-probs of the others; None: all are loaded.
        device: where they run.
        open_student: loads the untrained student, on which the errors of ``topk`` are measured.
        show_progress: show a progress bar.
    """

    settings: CacheSettings
    models: ModelSettings
    data: DataConfig
    loss: Loss
    tokenizer: PreTrainedTokenizerBase
    vocabularies: Vocabularies
    sets: LoadedSets
    references: LiveReferences
    outside: LogProbSource | None
    device: torch.device
    open_student: Callable[[], LanguageModel]
    show_progress: bool = True

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the student."""
        return self.vocabularies.size

    def batch(self, encoded: EncodedSet, rows: NDArray[np.int64]) -> Batch:
        """Return rows of a set as one batch on the device."""
        chosen = [encoded[row] for row in rows]
        return collate(chosen, pad_id(self.tokenizer, self.vocabulary), 0, 0).to(self.device)

    def tensors(self, batch: Batch, content: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the references; return the arrays to store for a batch's N valid tokens.

        Args:
            batch: on ``device``.
            content: of the cache.
        """
        heads = self.references(batch)
        if self.outside is None:
            return token_tensors(heads, batch.labels_N, content)
        buckets = self.outside.buckets(batch)
        assert torch.equal(buckets.support[:, 0], batch.labels_N.cpu()), "labels are tokens of their rows"
        own = log_probs_at(heads, buckets.support.to(self.device))
        return _bucket_tensors(replace(buckets, log_probs={**buckets.log_probs, **own}), content)


def begin_store(caching: Caching, given: Mapping[str, Any]) -> CacheStore:
    """Create an empty cache on disk.

    Args:
        caching: everything loaded.
        given: ``data_identity`` of the data.

    Raises:
        ValueError: no K meets ``reference.target_error``, or the directory holds something else.
    """
    is_topk = caching.settings.store == "topk"
    row = np.argsort(caching.sets.train.lengths, kind="stable")[:1]
    example = caching.batch(caching.sets.train, row)
    models, sample, k = _models_content(caching, example, is_topk)
    content = {
        "store": "topk" if is_topk else "hidden",
        "models": models,
        "vocabulary": caching.vocabulary,
        "k": k,
        "temperature": caching.loss.temperature if is_topk else None,
        **given,
    }
    if caching.vocabularies.other is not None:
        content["other"] |= {"vocabulary": caching.vocabularies.other_size}
    sizes = {
        name: tensor[0].numel() * tensor.element_size() for name, tensor in caching.tensors(example, content).items()
    }
    own = {name: size for name, size in sizes.items() if content.get("other") is None or name in OWN_ROLES}
    content["bytes_per_token"] = sum(own.values())
    if content.get("other") is not None:
        content["other"] |= {"bytes_per_token": sum(sizes.values()) - content["bytes_per_token"]}
    return CacheStore.create(Path(str(caching.settings.path)), content, sample)


def _models_content(
    caching: Caching, example: Batch, is_topk: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], int | None]:
    """Return the entries of the models, the errors on a sample, and K."""
    own = {role: _model_content(caching, role, head) for role, head in caching.references(example).items()}
    if caching.outside is not None:
        dtype = caching.settings.dtype or "float16"
        given = {role: one | {"stored_dtype": dtype} for role, one in caching.outside.identities.items()}
        return own | given, [], caching.outside.k
    sample, k_chosen = _choose_k(caching) if is_topk else ([], None)
    return own, sample, k_chosen


def _model_content(caching: Caching, role: str, head: Head) -> dict[str, Any]:
    spec = spec_of(caching.models, role)
    assert spec is not None, f"{role} was loaded from nowhere"
    own = next(name for name, dtype in DTYPES.items() if dtype == head.hidden.dtype)
    default = "float16" if caching.settings.store == "topk" else own
    return model_identity(spec) | {
        "stored_dtype": caching.settings.dtype or default,
        "softcap": head.softcap,
        "scale": head.scale,
    }


def token_tensors(heads: Mapping[str, Head], labels: Tensor, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the arrays to store for N tokens: name -> [N, ...] on the CPU.

    Args:
        heads: of the references.
        labels: [N] int64.
        content: of the cache.
    """
    dtypes = {role: DTYPES[model["stored_dtype"]] for role, model in content["models"].items()}
    if content["store"] == "hidden":
        return {role: heads[role].hidden.to(dtype).cpu() for role, dtype in dtypes.items()}
    buckets = make_buckets({role: heads[role] for role in dtypes}, labels, content["k"], content["temperature"])
    return _bucket_tensors(buckets, content)


def _bucket_tensors(buckets: Buckets, content: Mapping[str, Any]) -> dict[str, Tensor]:
    dtypes = {role: DTYPES[model["stored_dtype"]] for role, model in content["models"].items()}
    ids = torch.uint16 if content["vocabulary"] <= 2**16 else torch.int32
    stored = {role: buckets.log_probs[role].to(dtype).cpu() for role, dtype in dtypes.items()}
    return {SUPPORT: buckets.support.cpu().to(ids)} | stored


def _choose_k(caching: Caching) -> tuple[list[dict[str, Any]], int]:
    """Return the errors of each K on a sample, and the K to use.

    Raises:
        ValueError: no K is good enough.
    """
    settings = caching.settings
    vocabulary = caching.vocabulary
    given = [settings.k] if settings.k is not None else [k for k in CANDIDATES if k < vocabulary]
    if settings.k is None and vocabulary <= CANDIDATES[-1]:
        given.append(vocabulary)
    student, heads, labels = _sample(caching)
    dtype = DTYPES[settings.dtype or "float16"]
    report = sample_errors(caching.loss, student, heads, labels, [min(k, vocabulary) for k in given], dtype)
    for entry in report:
        log.info("On %d tokens of the training set: %s.", len(labels), _shown(entry))
    if settings.k is not None:
        return report, report[0]["k"]
    good = [
        entry["k"] for entry in report if max(entry["loss_error"], entry["gradient_error"]) <= settings.target_error
    ]
    if not good:
        raise ValueError(
            f"no K meets reference.target_error={settings.target_error:g} on {len(labels)} tokens of the training set "
            f"(the last: {_shown(report[-1])}); give reference.k=..., a larger reference.target_error, or "
            "reference.store=hidden, which is exact"
        )
    return report, good[0]


def _shown(entry: Mapping[str, Any]) -> str:
    kept = ", ".join(f"{role} {mass:.4f}" for role, mass in entry["kept_mass"].items())
    return (
        f"K = {entry['k']} keeps a mass of {kept}; the distillation term is off by "
        f"{entry['loss_error']:.2g} of itself, "
        f"its gradient by {entry['gradient_error']:.2g}"
    )


@torch.no_grad()
def _sample(caching: Caching) -> tuple[Head, dict[str, Head], Tensor]:
    """Return the untrained student's head, the references' heads, and labels, over rows of all lengths."""
    encoded = caching.sets.train
    student = caching.open_student().eval().to(caching.device)
    count = min(len(encoded), max(1, SAMPLE_TOKENS * len(encoded) // max(1, int(encoded.valid_tokens.sum()))))
    ordered = np.argsort(encoded.lengths, kind="stable")
    rows = ordered[np.linspace(0, len(ordered) - 1, count).round().astype(np.int64)]
    found: dict[str, list[Head]] = {}
    labels = []
    size = caching.data.full_rows
    references = caching.references
    for start in range(0, len(rows), size):
        batch = caching.batch(encoded, rows[start : start + size])
        for role, head in {STUDENT: student(batch), **references(batch)}.items():
            found.setdefault(role, []).append(head)
        labels.append(batch.labels_N)
    heads = {
        role: replace(parts[0], hidden=torch.cat([part.hidden for part in parts])) for role, parts in found.items()
    }
    return heads.pop(STUDENT), heads, torch.cat(labels)
