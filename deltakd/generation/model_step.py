"""The parts of a model that generation uses: one step with a cache, evaluation mode, the number of positions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from deltakd.generation.full_batch import DecodingState
from deltakd.generation.image_inputs import has_positions_of_axes, image_inputs, positions_of_axes
from deltakd.generation.key_values import JointCache
from deltakd.generation.static_cache import StaticKeyValues, StaticStep
from deltakd.types import at_least_float32, device_of

#: Returns the tensors of the images of the prompts with the given places; None: they have none.
Images = Callable[[Sequence[int]], dict[str, Tensor] | None]


class Step:
    """One forward pass over a state.

    Args:
        model: a transformers decoder, possibly wrapped by PEFT.
        processors: change the logits.
        vocab_size: V; logits beyond it are cut.
        images: as for ``generate``.
    """

    def __init__(
        self, model: nn.Module, processors: Callable[..., Any], vocab_size: int, images: Images | None = None
    ) -> None:
        self._model = model
        self._processors = processors
        self._vocab_size = vocab_size
        self._images = images
        self._axes = has_positions_of_axes(_unwrapped(model))
        self._parameters = inspect.signature(_unwrapped(model).forward).parameters
        # Pure state-space models (Mamba) use another name for their cache, and multiply their input by the mask.
        self._cache_name = next(
            (name for name in ("past_key_values", "cache_params") if name in self._parameters), None
        )
        self.device = device_of(model)
        self._static: StaticStep | None = None

    def __call__(self, state: DecodingState) -> Tensor:
        """Return the last position's processed logits, [B, V] in at least float32; update the state's cache.

        Raises:
            ValueError: the model can't generate here, or not with a static cache.
        """
        static = isinstance(state.cache, StaticKeyValues)
        logits = self._static_logits(state) if static else self._logits(state)
        if logits.shape[-1] < self._vocab_size:
            raise ValueError(
                f"The model has {logits.shape[-1]} logits and the tokenizer {self._vocab_size} tokens: they do not "
                "belong together. Give the tokenizer that the model was trained with."
            )
        processed: Tensor = self._processors(state.history, at_least_float32(logits[:, : self._vocab_size]))
        return processed

    def _static_logits(self, state: DecodingState) -> Tensor:
        if self._static is None:
            self._static = self._checked_static_step(state)
        return self._static(state.input_ids, state.positions, state.mask)

    def _checked_static_step(self, state: DecodingState) -> StaticStep:
        """Make the step over a static cache; compare its first logits with those of an ordinary one."""
        model = _unwrapped(self._model)
        attention = str(model.config._attn_implementation)
        if attention not in ("sdpa", "eager"):
            raise ValueError(_no_static_cache(model, f"its attention is {attention}"))
        if "position_ids" not in self._parameters or self._axes:
            raise ValueError(_no_static_cache(model, "it counts positions itself"))
        expected_BV = self._logits(replace(state, cache=state.cache.as_ordinary(len(state.rows))))
        step = StaticStep(self._model, state.cache, frozenset(self._parameters), attention == "eager")
        place = state.cache.start, state.cache.end
        try:
            found_BV = step(state.input_ids, state.positions, state.mask)
        except (RuntimeError, ValueError, TypeError) as failure:
            raise ValueError(_no_static_cache(model, (str(failure).splitlines() or [""])[0])) from failure
        state.cache.start, state.cache.end = place
        error = (found_BV - expected_BV)[[not row.finished for row in state.rows]].abs().max().item()
        tolerance = 1e-3 if expected_BV.dtype in (torch.float32, torch.float64) else 5e-2
        if error > tolerance * max(1.0, expected_BV.abs().max().item()):
            raise ValueError(_no_static_cache(model, f"its logits differ by {error:.3g} from those with a growing one"))
        return step

    def _logits(self, state: DecodingState) -> Tensor:
        if self._cache_name is None:
            raise ValueError(
                f"{type(_unwrapped(self._model)).__name__} takes neither past_key_values nor cache_params, so it can't "
                "generate here"
            )
        extra: dict[str, Any] = {self._cache_name: state.cache}
        if "logits_to_keep" in self._parameters:
            extra["logits_to_keep"] = 1
        if "position_ids" in self._parameters:
            extra["position_ids"] = state.positions
        self._add_images(extra, state)
        width = state.input_ids.shape[1] if self._cache_name == "cache_params" else state.mask.shape[1]
        output = self._model(
            input_ids=state.input_ids,
            attention_mask=state.mask[:, -width:],
            use_cache=True,
            **extra,
        )
        state.cache = output.get(self._cache_name)
        if state.cache is None:
            raise ValueError(
                f"{type(_unwrapped(self._model)).__name__} does not return its cache, so it can't generate here"
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _add_images(self, extra: dict[str, Any], state: DecodingState) -> None:
        """Add the images of rows that are not in the cache yet, and the positions of models that count by axis."""
        images = None
        if self._images is not None and state.cache is None:
            images = self._images([row.number for row in state.rows])
        if images is not None:
            images = {name: tensor.to(self.device) for name, tensor in images.items()}
            extra |= image_inputs(_unwrapped(self._model), images, state.input_ids)
        if self._axes:
            positions_3Bt = positions_of_axes(
                _unwrapped(self._model),
                images,
                state.input_ids,
                state.mask[:, -state.input_ids.shape[1] :],
                state.positions,
            )
            extra["position_ids"] = positions_3Bt
            # A prompt ends with text, whose three positions are equal: the answer counts on from there.
            state.positions = positions_3Bt[0]


@dataclass(frozen=True)
class Mixture:
    """A second model to sample from: p̃ = (1 − weight) · p_model + weight · p_other, token by token.

    Args:
        other: a transformers decoder of the same tokens; it may be on another device.
        weight: α of MiniLLM (arXiv 2306.08543), between 0 and 1.
    """

    other: nn.Module
    weight: float


class MixedStep:
    """One forward pass of two models over a state; each model's logits are processed before they are mixed."""

    def __init__(self, own: Step, other: Step, weight: float) -> None:
        self._own = own
        self._other = other
        self._weight = weight
        self.device = own.device

    def __call__(self, state: DecodingState) -> Tensor:
        """Return the log-probs of the mixture, [B, V] in at least float32; update the state's cache."""
        caches = (None, None) if state.cache is None else state.cache.parts
        device = self._other.device
        there = replace(
            state,
            input_ids=state.input_ids.to(device),
            mask=state.mask.to(device),
            history=state.history.to(device),
            positions=state.positions.to(device),
            cache=caches[1],
        )
        here = replace(state, cache=caches[0])
        # The student's autocast must not reach the other model, which runs in its own dtype.
        with torch.autocast(device.type, enabled=False):
            others_BV = self._other(there)
        mixed_BV = mixed_log_probs(
            self._own(here).log_softmax(-1), others_BV.to(self.device).log_softmax(-1), self._weight
        )
        state.cache = JointCache([here.cache, there.cache])
        return mixed_BV


def mixed_log_probs(own: Tensor, other: Tensor, weight: float) -> Tensor:
    """Return log((1 − weight) · exp(own) + weight · exp(other)), element by element."""
    return torch.logaddexp(own + math.log1p(-weight), other + math.log(weight))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode; on exit restore each module's own mode (frozen parts may have been in eval)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


#: Names that configs give the number of positions; attribute maps cover others, such as GPT-2's ``n_positions``.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


def position_limit(model: nn.Module) -> int | None:
    """Return the model's number of positions, or None if its config names no limit."""
    return positions_of(_unwrapped(model).config)


def positions_of(config: Any) -> int | None:
    """Return how many positions a transformers config allows, or None if it names no limit.

    In a nested config, the text decoder's count. Scaling the rotary embedding by ``factor`` extends the length that
    the model was trained with.
    """
    text = config.get_text_config(decoder=True)
    named = (getattr(text, name, None) for name in _POSITIONS)
    limit = next((int(value) for value in named if isinstance(value, int) and value > 0), None)
    return None if limit is None else max(limit, *(_extended(limit, rope) for rope in _rope_settings(text)))


def _rope_settings(config: Any) -> list[Mapping[str, Any]]:
    """Return the settings of the rotary embedding, one for all layers or one for each type of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_type = [value for value in given.values() if isinstance(value, Mapping)]
    return by_type or [given]


def _extended(limit: int, rope: Mapping[str, Any]) -> int:
    trained = rope.get("original_max_position_embeddings") or limit
    return int(trained * (rope.get("factor") or 1.0))


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's EOS and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    found: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(config, "eos_token_id", None)):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)


def _no_static_cache(model: nn.Module, reason: str) -> str:
    return f"{type(model).__name__} can't decode with a static cache: {reason}; give static_cache=false"


def _unwrapped(model: Any) -> Any:
    # PEFT's forward takes *args and **kwargs; only the wrapped model's signature shows what it accepts.
    return model.get_base_model() if hasattr(model, "get_base_model") else model
