"""Creating a cache: the format of a stored token and, for a top-K store, the choice of K."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
from deltakd.references import CacheSettings, CacheStore, LiveReferences, RoutedReferences
from deltakd.references.cached import DTYPES
from deltakd.references.content import named_sets
from deltakd.references.outside import LogProbSource
from deltakd.references.routed import names_of_pair
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
        routes: ``model.routes``: the pair of teachers that judges the rows of each task; None: the first judges all.
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
    routes: Mapping[str, int] | None
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

    def heads(self, batch: Batch) -> dict[str, Head]:
        """Run the references; return role -> head, as the loss reads them.

        Args:
            batch: on ``device``; of routed rows, those of one pair of teachers.
        """
        if self.routes is None:
            return self.references(batch)
        return RoutedReferences(self.references, self.loss.requires, self.routes.values())(batch).of_one_pair

    def names(self, batch: Batch) -> dict[str, str]:
        """Return role as the loss reads it -> role of the model, for the pair of teachers that judges a batch."""
        if self.routes is None:
            return {role: role for role in sorted(self.references.roles)}
        [route] = batch.routes
        return names_of_pair(self.loss.requires, route.pair)

    def groups(self, encoded: EncodedSet, rows: NDArray[np.int64]) -> dict[int | None, NDArray[np.int64]]:
        """Return number of the pair of teachers -> positions of its rows, of those given; None: rows are not routed."""
        if self.routes is None:
            return {None: rows}
        assert encoded.tasks is not None, "rows are routed as they are loaded"
        pairs = encoded.tasks.pairs[rows]
        return {int(pair): rows[pairs == pair] for pair in np.unique(pairs)}

    def examples(self) -> dict[int | None, Batch]:
        """Return the shortest row of the set, or of each pair of teachers that judges one."""
        found: dict[int | None, Batch] = {}
        for encoded in named_sets(self.sets).values():
            ordered = np.argsort(encoded.lengths, kind="stable")
            for pair, rows in self.groups(encoded, ordered[encoded.valid_tokens[ordered] > 0]).items():
                if pair not in found and len(rows):
                    found[pair] = self.batch(encoded, rows[:1])
        return found

    def model_heads(self, examples: Mapping[int | None, Batch]) -> dict[str, Head]:
        """Return role of the model -> its head, over tokens that don't matter, of all models that are loaded."""
        found = self.references.empty_heads() if self.routes is not None else {}
        for batch in examples.values():
            names = self.names(batch)
            found |= {names[read]: head for read, head in self.heads(batch).items()}
        return found

    def tensors(self, batch: Batch, content: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run the references; return the arrays to store for a batch's N valid tokens.

        Args:
            batch: on ``device``; of routed rows, those of one pair of teachers.
            content: of the cache.
        """
        heads = self.heads(batch)
        if self.outside is None:
            return token_tensors(heads, batch.labels_N, content, self.names(batch))
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
    examples = caching.examples()
    models, sample, k = _models_content(caching, examples, is_topk)
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
    bytes_of_pair = {}
    for pair, example in examples.items():
        sizes = {
            name: tensor[0].numel() * tensor.element_size()
            for name, tensor in caching.tensors(example, content).items()
        }
        own = {name: size for name, size in sizes.items() if content.get("other") is None or name in OWN_ROLES}
        bytes_of_pair[str(pair)] = sum(own.values())
        if content.get("other") is not None:
            content["other"] |= {"bytes_per_token": sum(sizes.values()) - sum(own.values())}
    content["bytes_per_token"] = max(bytes_of_pair.values())
    if caching.routes is not None:
        content |= {"routes": dict(caching.routes), "bytes_of_pair": bytes_of_pair}
    return CacheStore.create(Path(str(caching.settings.path)), content, sample)


def _models_content(
    caching: Caching, examples: Mapping[int | None, Batch], is_topk: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], int | None]:
    """Return the entries of the models, the errors on a sample, and K."""
    own = {role: _model_content(caching, role, head) for role, head in caching.model_heads(examples).items()}
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


def token_tensors(
    heads: Mapping[str, Head], labels: Tensor, content: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the arrays to store for N tokens: name -> [N, ...] on the CPU.

    Args:
        heads: of the references, as the loss reads them.
        labels: [N] int64.
        content: of the cache.
        names: role as the loss reads it -> role of the model.
    """
    if content["store"] == "hidden":
        return {role: heads[read].hidden.to(_stored_dtype(content, role)).cpu() for read, role in names.items()}
    buckets = make_buckets({read: heads[read] for read in names}, labels, content["k"], content["temperature"])
    by_model = {role: buckets.log_probs[read] for read, role in names.items()}
    return _bucket_tensors(replace(buckets, log_probs=by_model), content)


def _bucket_tensors(buckets: Buckets, content: Mapping[str, Any]) -> dict[str, Tensor]:
    ids = torch.uint16 if content["vocabulary"] <= 2**16 else torch.int32
    stored = {role: log_p.to(_stored_dtype(content, role)).cpu() for role, log_p in buckets.log_probs.items()}
    return {SUPPORT: buckets.support.cpu().to(ids)} | stored


def _stored_dtype(content: Mapping[str, Any], role: str) -> torch.dtype:
    return DTYPES[content["models"][role]["stored_dtype"]]


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
    dtype = DTYPES[settings.dtype or "float16"]
    student = caching.open_student().eval().to(caching.device)
    rows = caching.groups(caching.sets.train, np.argsort(caching.sets.train.lengths, kind="stable"))
    reports, tokens = [], 0
    for ordered in rows.values():
        head, heads, labels, names = _sample(caching, student, ordered)
        errors = sample_errors(caching.loss, head, heads, labels, [min(k, vocabulary) for k in given], dtype)
        reports.append([entry | {"kept_mass": _renamed(entry["kept_mass"], names)} for entry in errors])
        tokens += len(labels)
    report = [_worst(entries) for entries in zip(*reports, strict=True)]
    for entry in report:
        log.info("On %d tokens of the training set: %s.", tokens, _shown(entry))
    if settings.k is not None:
        return report, report[0]["k"]
    good = [
        entry["k"] for entry in report if max(entry["loss_error"], entry["gradient_error"]) <= settings.target_error
    ]
    if not good:
        raise ValueError(
            f"no K meets reference.target_error={settings.target_error:g} on {tokens} tokens of the training set "
            f"(the last: {_shown(report[-1])}); give reference.k=..., a larger reference.target_error, or "
            "reference.store=hidden, which is exact"
        )
    return report, good[0]


def _renamed(values: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    return {names[read]: value for read, value in values.items()}


def _worst(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the largest errors of one K over the pairs of teachers; of a model that all share, the least mass."""
    mass: dict[str, float] = {}
    for entry in entries:
        mass |= {role: min(value, mass.get(role, 1.0)) for role, value in entry["kept_mass"].items()}
    errors = {name: max(entry[name] for entry in entries) for name in ("loss_error", "gradient_error")}
    return {"k": entries[0]["k"], "kept_mass": mass} | errors


def _shown(entry: Mapping[str, Any]) -> str:
    kept = ", ".join(f"{role} {mass:.4f}" for role, mass in entry["kept_mass"].items())
    return (
        f"K = {entry['k']} keeps a mass of {kept}; the distillation term is off by "
        f"{entry['loss_error']:.2g} of itself, "
        f"its gradient by {entry['gradient_error']:.2g}"
    )


@torch.no_grad()
def _sample(
    caching: Caching, student: LanguageModel, ordered: NDArray[np.int64]
) -> tuple[Head, dict[str, Head], Tensor, dict[str, str]]:
    """Return the untrained student's head, the references' heads, labels, and ``Caching.names``.

    Args:
        caching: everything loaded.
        student: the untrained one.
        ordered: rows of the training set by length, of which rows of all lengths are taken.
    """
    encoded, names = caching.sets.train, dict[str, str]()
    tokens = max(1, int(encoded.valid_tokens[ordered].sum()))
    count = min(len(ordered), max(1, SAMPLE_TOKENS * len(ordered) // tokens))
    rows = ordered[np.linspace(0, len(ordered) - 1, count).round().astype(np.int64)]
    found: dict[str, list[Head]] = {}
    labels = []
    size = caching.data.full_rows
    for start in range(0, len(rows), size):
        batch = caching.batch(encoded, rows[start : start + size])
        names = caching.names(batch)
        for role, head in {STUDENT: student(batch), **caching.heads(batch)}.items():
            found.setdefault(role, []).append(head)
        labels.append(batch.labels_N)
    heads = {
        role: replace(parts[0], hidden=torch.cat([part.hidden for part in parts])) for role, parts in found.items()
    }
    return heads.pop(STUDENT), heads, torch.cat(labels), names
