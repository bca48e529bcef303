"""A model's sizes without its weights: bytes, elements kept for the backward pass, floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltakd.models import ModelSpec, transformer_blocks
from deltakd.models.quantization import weight_bits

#: Activation functions made of several operations, which keep more elements per inner unit.
_COMPOSITE = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "quick_gelu")


@dataclass(frozen=True)
class Skeleton:
    """A model's sizes.

    Args:
        model: the model on ``meta``, with its adapter if it has one.
        spec: where it comes from.
        dtype: the dtype that its parameters are converted to; None: they keep their own.
    """

    model: PreTrainedModel | Any
    spec: ModelSpec
    dtype: torch.dtype | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, tied ones once; quantised layers at their bits per weight."""
        bits = weight_bits(self.spec.quantization or getattr(self.model.config, "quantization_config", None))
        packed = {id(weight) for weight in self._linear_weights()} if bits is not None else set()
        return sum(
            p.numel() * (bits or 0) // 8 if id(p) in packed else p.numel() * self._itemsize(p)
            for p in self.model.parameters()
        )

    @property
    def trained_bytes(self) -> int:
        """Bytes of the trained parameters."""
        return sum(p.numel() * self._itemsize(p) for p in self.model.parameters() if p.requires_grad)

    @property
    def blocks_bytes(self) -> int:
        """Bytes of the parameters in transformer blocks; the rest are embeddings, the last norm and the head."""
        return sum(p.numel() * self._itemsize(p) for block in self._blocks for p in block.parameters())

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block."""
        return max((sum(p.numel() * self._itemsize(p) for p in b.parameters()) for b in self._blocks), default=0)

    def gathered_bytes(self, in_half: bool) -> tuple[int, int]:
        """Return the bytes of all blocks and of the largest one, as FSDP2 gathers them.

        Args:
            in_half: linear layers are gathered in half precision.
        """
        found = [self._gathered(block, in_half) for block in self._blocks]
        return sum(found), max(found, default=0)

    def _gathered(self, block: torch.nn.Module, in_half: bool) -> int:
        linear = (m for m in block.modules() if isinstance(m, torch.nn.Linear | Conv1D)) if in_half else ()
        half = {id(p) for m in linear for p in m.parameters(recurse=False)}
        return sum(
            p.numel() * (min(2, self._itemsize(p)) if id(p) in half else self._itemsize(p)) for p in block.parameters()
        )

    def small_bytes(self, below: int) -> int:
        """Return the bytes of the parameters with fewer than ``below`` elements."""
        return sum(p.numel() * self._itemsize(p) for p in self.model.parameters() if p.numel() < below)

    @property
    def linear_elements(self) -> int:
        """Elements of all linear weights and the head, which autocast copies to half precision."""
        return sum(w.numel() for w in self._linear_weights()) + self.head.numel()

    @property
    def config(self) -> Any:
        """The configuration of the text decoder, which is the model's own unless it reads images."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def head(self) -> torch.Tensor:
        """[V, D]: the output embedding."""
        return self.model.get_output_embeddings().weight

    @property
    def head_itemsize(self) -> int:
        """Bytes per element of the head."""
        return self._itemsize(self.head)

    @property
    def head_bytes(self) -> int:
        """Bytes of the head."""
        return self.head.numel() * self.head_itemsize

    def forward_flops(self, positions: int, row: int) -> int:
        """Return the floating-point operations of the body's forward pass, without the head.

        2 per linear weight and position (a multiplication and an addition), and 4 T per query element: products with T
        keys and the weighted sum of T values. Every pair of positions counts, as is usual for utilisation (Korthikanti
        et al., arXiv 2205.05198, appendix A); a kernel that skips the masked half does half of the 4 T.

        Args:
            positions: B · T.
            row: T.
        """
        return positions * 2 * sum(w.numel() for w in self._multiplied()) + self.forward_flops_of_attention(
            positions, row
        )

    def backward_flops(self, positions: int, row: int) -> int:
        """Return the same for the backward pass: each product counts once per operand that needs a gradient.

        That is twice if everything is trained, once for frozen weights, whose inputs still need a gradient.
        """
        linear = sum(w.numel() * (1 + w.requires_grad) for w in self._multiplied())
        return positions * 2 * linear + 2 * self.forward_flops_of_attention(positions, row)

    def layer_elements(self, positions: int, row: int, attention_matrix: bool) -> int:
        """Return the elements that one layer keeps for its backward pass, after Korthikanti et al. (arXiv 2205.05198).

        Per position: 10 h for norms, projections and dropout; per inner unit of the MLP 2 (input and output of the
        activation), 4 if it is gated, 5 if the activation is made of several operations. If the attention matrix is
        materialised, 3 elements per entry and head (softmax, dropout and their product).

        Args:
            positions: B · T.
            row: T.
            attention_matrix: attention is not one fused operation.
        """
        config = self.config
        hidden = config.hidden_size
        inner = next(
            (int(v) for k in ("intermediate_size", "ffn_dim", "n_inner") if (v := getattr(config, k, None))), 4 * hidden
        )
        activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
        gated = any(name.endswith(("gate_proj", "gate_up_proj")) for name, _ in self.model.named_modules())
        per_unit = 4 if gated else 5 if activation in _COMPOSITE else 2
        matrix = 3 * config.num_attention_heads * row if attention_matrix else 0
        return positions * (10 * hidden + per_unit * inner + matrix)

    def makes_attention_matrix(self, device: str, training: bool) -> bool:
        """True if [heads, T, T] is materialised: eager attention, soft-capping, or training with dropout on a CPU."""
        config = self.config
        dropout = getattr(config, "attn_pdrop", None) or getattr(config, "attention_dropout", None) or 0.0
        eager = config._attn_implementation == "eager" or bool(getattr(config, "attn_logit_softcapping", None))
        return eager or (training and device == "cpu" and dropout > 0)

    @property
    def _blocks(self) -> list[torch.nn.Module]:
        return transformer_blocks(self.model)

    def forward_flops_of_attention(self, positions: int, row: int) -> int:
        """Return the part of ``forward_flops`` that is attention: ``positions`` queries with ``row`` keys each."""
        config = self.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return positions * 4 * row * config.num_attention_heads * int(width) * config.num_hidden_layers

    def _itemsize(self, tensor: torch.Tensor) -> int:
        return tensor.itemsize if self.dtype is None else self.dtype.itemsize

    def _linear_weights(self) -> list[torch.Tensor]:
        """Return the weights of all linear layers except head and adapters."""
        layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
        return [m.weight for name, m in layers if m.weight is not self.head and "lora_" not in name]

    def _multiplied(self) -> list[torch.Tensor]:
        """Return the weights of all linear layers except the head, adapters included."""
        layers = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
        return [m.weight for m in layers if m.weight is not self.head]
