"""A causal language model split into its body and its head."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from deltakd.generation.image_inputs import image_inputs
from deltakd.generation.model_step import position_limit
from deltakd.models.experts import router_loss
from deltakd.models.image_models import reads_images
from deltakd.models.row_masks import many_rows_each, one_row_each
from deltakd.types import Head, PackedRows, TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Names of layer types in transformers' configs that keep only keys and values, of all or the last positions.
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})


@final
class LanguageModel(nn.Module):
    """Wraps a transformers causal model so that it returns heads, not logits.

    Args:
        hf: the model, or a PEFT model around it.
        vocabulary: V; rows of the output embedding beyond it are padding, and are cut from every head.
        adapters: role -> name of the frozen adapter that makes this model that role's, or None: the model without one.

    Raises:
        ValueError: the model has fewer rows than the tokenizer has tokens, or its output embedding is quantised.
    """

    def __init__(self, hf: nn.Module, vocabulary: int, adapters: Mapping[str, str | None] | None = None) -> None:
        super().__init__()
        self.hf = hf
        self.vocabulary = vocabulary
        self.adapters = dict(adapters or {})
        weight: Any = getattr(self._output_embedding, "weight", None)
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(
                f"the output embedding of {type(self.causal_lm).__name__} is quantised ({type(weight).__name__}), but "
                "it is needed as it is to make logits; leave it out by the quantisation config "
                "(llm_int8_skip_modules or modules_to_not_convert: [lm_head])"
            )
        rows = self._output_embedding.weight.shape[0]
        if rows < vocabulary:
            raise ValueError(
                f"the tokenizer has {vocabulary} tokens but the model's output embedding has {rows} rows; "
                "give the tokenizer that belongs to the model"
            )

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model itself, without adapter wrappers."""
        model: Any = self.hf
        return model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def quantized(self) -> bool:
        """True if its linear layers are quantised; they stay on the device where they were created."""
        return bool(getattr(self.causal_lm, "is_quantized", False))

    @property
    def _output_embedding(self) -> Any:
        return self.causal_lm.get_output_embeddings()

    @cached_property
    def keeps_a_state(self) -> bool:
        """True if some layer's past is a state that each token changes, not a list of keys and values."""
        hf: Any = self.causal_lm
        kinds = getattr(hf.config.get_text_config(decoder=True), "layer_types", None) or ()
        return bool(getattr(hf, "_is_stateful", False)) or not _ATTENTION.issuperset(kinds)

    @cached_property
    def _needs_mask(self) -> bool:
        """False for attention as transformers writes it: no token sees the padding on its right."""
        config = self.causal_lm.config
        return self.keeps_a_state or reads_images(config) or bool(getattr(config, "auto_map", None))

    def compile_body(self) -> None:
        """``torch.compile`` the body: once or a few times for micro-batches of any size."""
        # Their lengths and row counts differ. With static shapes, the second of each would compile again.
        # Under gradient checkpointing PyTorch fails on sizes that are dynamic from the start.
        checkpointed = self.causal_lm.is_gradient_checkpointing
        self.causal_lm.base_model.compile(dynamic=None if checkpointed else True)

    def hidden_states(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, images: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return [B, T, D], the last hidden states after the final norm: the head's input.

        Args:
            input_ids_BT: rows padded on the right.
            attention_mask_BT: 1 on real tokens. Where it is 0, hidden states mean nothing.
            images: of the rows (``TokenStream.images``), if they have any.
        """
        return self._padded(input_ids_BT, attention_mask_BT, images).last_hidden_state

    def _padded(
        self, input_ids_BT: Tensor, attention_mask_BT: Tensor, images: Mapping[str, Tensor] | None, **options: Any
    ) -> Any:
        """Run the body on rows padded on the right; return its output."""
        body = self.causal_lm.base_model
        accepted = inspect.signature(body.forward).parameters
        if "use_cache" in accepted or "kwargs" in accepted:
            options["use_cache"] = False
        if self._needs_mask:
            options["attention_mask"] = attention_mask_BT
        if images is not None:
            options |= image_inputs(self.causal_lm, images, input_ids_BT)
        with one_row_each():
            return body(input_ids=input_ids_BT, **options)

    def forward(self, rows: TokenStream) -> Head:
        """Run the body; return the head of the rows' N valid tokens, without prompt and padding."""
        return self.head(rows)

    def head(self, rows: TokenStream) -> Head:
        """As ``forward``, for use inside a sharded module.

        The sharded model's head then stays whole until that module's ``forward`` returns.
        """
        if rows.packed is not None:
            return self.head_of(self.packed_hidden_states(rows.packed).flatten(0, 1)[rows.packed.valid])
        hidden_BTD = self.hidden_states(rows.input_ids, rows.attention_mask, rows.images)
        return self.head_of(rows.at_valid(hidden_BTD))

    def head_and_router_loss(self, rows: TokenStream) -> tuple[Head, Tensor]:
        """As ``head``, with the loss that balances the model's experts over the real tokens (``router_loss``)."""
        if rows.packed is not None:
            # Padding at the ends of sequences counts as rows, as it does for attention.
            output, mask_BT = self._packed(rows.packed, output_router_logits=True), None
            hidden_ND = output.last_hidden_state.flatten(0, 1)[rows.packed.valid]
        else:
            mask_BT = rows.attention_mask
            output = self._padded(rows.input_ids, mask_BT, rows.images, output_router_logits=True)
            hidden_ND = rows.at_valid(output.last_hidden_state)
        return self.head_of(hidden_ND), router_loss(self.causal_lm, output.router_logits, mask_BT)

    def packed_hidden_states(self, rows: PackedRows) -> Tensor:
        """Return [S, L, D]: as ``hidden_states``, of rows that lie end to end (``check_packing``)."""
        return self._packed(rows).last_hidden_state.view(*rows.input_ids.shape, -1)

    def _packed(self, rows: PackedRows, **options: Any) -> Any:
        """Run the body on rows that lie end to end; return its output."""
        input_ids, position_ids = rows.input_ids, rows.position_ids
        if "flash" in str(self.causal_lm.config._attn_implementation):
            # Flash attention takes one sequence, and where its rows start.
            input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
            options |= {"cu_seq_lens_q": rows.starts, "cu_seq_lens_k": rows.starts}
            options |= {"max_length_q": rows.longest, "max_length_k": rows.longest}
        with many_rows_each():
            body = self.causal_lm.base_model
            return body(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)

    def head_of(self, hidden_ND: Tensor) -> Head:
        """Return the head over given hidden states, cut to the vocabulary."""
        bias = getattr(self._output_embedding, "bias", None)
        softcap, scale = _logit_transform(self.causal_lm.config)
        return Head(
            hidden=hidden_ND,
            weight=_effective_weight(self._output_embedding)[: self.vocabulary],
            bias=None if bias is None else bias[: self.vocabulary],
            softcap=softcap,
            scale=scale,
        )

    def empty_head(self) -> Head:
        """Return the head over no tokens: its sizes and its output embedding."""
        weight_VD = self.head_of(torch.empty(0)).weight
        return self.head_of(weight_VD.new_empty(0, weight_VD.shape[1]))

    @contextmanager
    def as_role(self, role: str) -> Iterator[None]:
        """Switch to a role's adapter for a while; a model that is one role's alone stays as it is."""
        if role not in self.adapters:
            yield
            return
        model: Any = self.hf
        adapter, before = self.adapters[role], model.active_adapter
        if adapter == before:
            yield
            return
        try:
            if adapter is None:
                with model.disable_adapter():
                    yield
            else:
                model.set_adapter(adapter, inference_mode=True)
                yield
        finally:
            model.set_adapter(before, inference_mode=True)
            # Switching an adapter on again makes it trainable.
            model.requires_grad_(False)

    def with_roles(self, roles: Mapping[str, str]) -> LanguageModel:
        """Return the same weights under other roles; the model itself if it has no adapters.

        Args:
            roles: other role -> role of this model, or of another one.
        """
        if not self.adapters:
            return self
        adapters = {other: self.adapters[role] for other, role in roles.items() if role in self.adapters}
        return LanguageModel(self.hf, self.vocabulary, adapters)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Disable the LoRA adapter and enable eval mode; restore both on exit."""
        was_training = self.training
        model: Any = self.hf
        self.eval()
        try:
            with model.disable_adapter():
                yield
        finally:
            self.train(was_training)

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare body and head with the model's own logits on a few tokens.

        Otherwise, an architecture that transforms its logits in a way ``Head`` lacks would train on wrong logits.

        Raises:
            ValueError: they differ, or the model can't be run.
        """
        was_training = self.training
        self.eval()
        device = self._output_embedding.weight.device
        length = min(6, position_limit(self.causal_lm) or 6)
        ids_BT = torch.arange(1, 1 + length, device=device).remainder(self.vocabulary)[None]
        mask_BT = torch.ones_like(ids_BT)
        try:
            own_NV = self.causal_lm(input_ids=ids_BT, attention_mask=mask_BT).logits[0, :, : self.vocabulary].float()
        except (RuntimeError, ValueError) as failure:
            reason = (str(failure).splitlines() or [type(failure).__name__])[0]
            raise ValueError(f"{type(self.causal_lm).__name__} fails on a row of {length} tokens: {reason}") from None
        ours_NV = self.head_of(self.hidden_states(ids_BT, mask_BT)[0]).logits().float()
        self.train(was_training)
        # Half-precision models round their own logits; ours are computed in float32 from the same hidden states.
        tolerance = 1e-4 if self._output_embedding.weight.dtype in (torch.float32, torch.float64) else 3e-2
        error = (own_NV - ours_NV).abs().max().item()
        if not error <= tolerance * max(1.0, own_NV.abs().max().item()):
            raise ValueError(
                f"{type(self.causal_lm).__name__}: body and head differ from the model's own logits by {error:.3g}; "
                "this architecture transforms its logits in a way that deltakd does not know"
            )


def _logit_transform(config: Any) -> tuple[float | None, float]:
    """Return (softcap, scale) for architectures that transform their logits: Gemma, xLSTM, Cohere, Granite."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None))), None), scale / divisor


def _effective_weight(layer: Any) -> Tensor:
    """Return the layer's weight [V, D], including LoRA's update if the head has an adapter."""
    if not hasattr(layer, "get_delta_weight"):
        return layer.weight
    weight = layer.get_base_layer().weight
    if layer.disable_adapters:
        return weight
    return weight + sum(layer.get_delta_weight(name) for name in layer.active_adapters)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformers model: its longest ``ModuleList``."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])
