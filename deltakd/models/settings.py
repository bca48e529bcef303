"""The config group ``model``: the model of each role, and how models are opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from deltakd.types import teacher_pair

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class ModelSpec:
    """Where one role's model comes from (``model.<role>``).

    Args:
        path: hub id or local directory; None only with ``init="random"``.
        dtype: of the weights.
        init: ``pretrained``, or ``random``: built from ``architecture`` with weights drawn from the seed.
        architecture: for ``random``: ``model_type`` and options of its transformers configuration.
        tokenizer: where the role's tokenizer is, if not at ``path``.
        quantization: transformers' quantisation config, a mapping with ``quant_method``; None: as in the checkpoint.
        adapter: directory of a PEFT LoRA adapter on the model, for teachers; without ``path``, on the raw teacher.
    """

    path: str | None = None
    dtype: Dtype = "float32"
    init: Literal["pretrained", "random"] = "pretrained"
    architecture: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    quantization: Mapping[str, Any] | None = None
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """A tokenizer trained for the run, for students from scratch (``model.tokenizer``).

    Args:
        train_on: text files or instruction files; None: the student's own tokenizer is loaded.
        train_subset: source -> ``split.json#key``, for sources of records.
        vocabulary: maximum number of tokens.
        add_prefix_space: a word gets the same token at the start of a text as inside it.
    """

    train_on: str | Sequence[str] | None = None
    train_subset: Mapping[str, str] | None = None
    vocabulary: Annotated[int, Ge(1)] = 8000
    add_prefix_space: bool = False


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter (arXiv 2106.09685).

    Args:
        r: rank.
        alpha: the adapter is scaled by alpha / r.
        dropout: on the adapter's input.
        target_modules: peft's names of the layers to adapt; ``all-linear``: every linear layer except the head, and
            except those whose adapter would not count (``unadaptable``).
    """

    r: Annotated[int, Ge(1)] = 16
    alpha: float = 32.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | Sequence[str] = "all-linear"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The models of a run.

    Args:
        specs: role -> where its model comes from, for every role in the config.
        tokenizer: the tokenizer to train, if any.
        lora: the student's adapter, or None.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``; None: transformers' choice.
        gradient_checkpointing: recompute the student's activations in the backward pass.
        router_aux_loss_coef: weight of the loss that balances the experts of a student that has some, as its
            architecture defines it; 0: not trained. References have none.
        trust_remote_code: run Python code that comes with a checkpoint.
        routes: a row's task -> the number of the pair of teachers that judges it, from 1; ``*``: all other rows. None:
            the loss's own roles judge all rows.
    """

    specs: Mapping[str, ModelSpec] = field(default_factory=dict)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    lora: LoraSpec | None = None
    attn_implementation: str | None = None
    gradient_checkpointing: bool = False
    router_aux_loss_coef: Annotated[float, Ge(0)] = 0.0
    trust_remote_code: bool = False
    routes: Mapping[str, Annotated[int, Ge(1)]] | None = None

    def of_pair(self, pair: int) -> ModelSettings:
        """Return the settings in which the teachers of a pair are ``teacher`` and ``teacher_raw``."""
        others = {role: spec for role, spec in self.specs.items() if role not in teacher_pair(1)}
        own = {
            first: self.specs[role]
            for first, role in zip(teacher_pair(1), teacher_pair(pair), strict=True)
            if role in self.specs
        }
        return replace(self, specs=others | own, routes=None)
