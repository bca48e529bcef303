"""Structured pruning: drop layers, and narrow what is inside them, before a student is healed by distillation.

As Minitron does (arXiv 2407.14679): cut, then train briefly from the uncut model (``loss=kd data=text``). What stays is
chosen from the weights alone, without data: of heads and intermediate channels those with the largest weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: Model types of the families that can be pruned: Llama's layout, and GPT-2's with fused, transposed projections.
LLAMA_LIKE = ("llama", "qwen2", "qwen3", "mistral", "smollm3")
GPT2_LIKE = ("gpt2",)


@dataclass(frozen=True)
class Cut:
    """What to keep of a model.

    Args:
        layers: numbers of the layers to keep, in this order; None: all.
        intermediate: width of the feed-forward layers; None: as it is.
        heads: attention heads of a layer (query heads, where keys and values have fewer); None: as they are.
        hidden: width of the residual stream; None: as it is.
    """

    layers: Sequence[int] | None = None
    intermediate: int | None = None
    heads: int | None = None
    hidden: int | None = None


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that a cut may change.

    Args:
        layers, intermediate, heads, hidden: as in ``Cut``.
        key_heads: heads of keys and values.
        head: width of a head.
    """

    layers: int
    intermediate: int
    heads: int
    hidden: int
    key_heads: int
    head: int


@dataclass
class Pruned:
    """A pruned model.

    Args:
        model: the model; it shares no weights with the original.
        layers: the layers it kept.
        before, after: parameters, tied ones once.
        changed: setting -> (before, after), of the sizes that changed.
    """

    model: Any
    layers: list[int]
    before: int
    after: int
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)


def shape_of(config: Any) -> Shape:
    """Read a configuration.

    Raises:
        ValueError: it is of no family that can be pruned.
    """
    kind = config.model_type
    if kind in GPT2_LIKE:
        inner = config.n_inner or 4 * config.n_embd
        return Shape(config.n_layer, inner, config.n_head, config.n_embd, config.n_head, config.n_embd // config.n_head)
    if kind in LLAMA_LIKE:
        heads, hidden = config.num_attention_heads, config.hidden_size
        return Shape(
            config.num_hidden_layers,
            config.intermediate_size,
            heads,
            hidden,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or hidden // heads,
        )
    raise ValueError(
        f"models of the type {kind!r} can't be pruned; known are {', '.join((*LLAMA_LIKE, *GPT2_LIKE))}; for others "
        "build the smaller model yourself and give it as model.student.path"
    )


def cut_problems(config: Any, cut: Cut) -> list[str]:
    """Return a sentence for each part of a cut that the model does not allow."""
    try:
        shape = shape_of(config)
    except ValueError as error:
        return [str(error)]
    found = _layer_problems(cut.layers, shape.layers)
    for name in ("intermediate", "heads", "hidden"):
        wanted, there = getattr(cut, name), getattr(shape, name)
        if wanted is not None and not 1 <= wanted <= there:
            found.append(f"{name}={wanted}: the model has {there}; give 1 to {there}")
    group = shape.heads // shape.key_heads
    if cut.heads is not None and 1 <= cut.heads <= shape.heads and cut.heads % group:
        found.append(
            f"heads={cut.heads}: {group} query heads share each of the {shape.key_heads} heads of keys and values, so "
            f"that heads are kept by {group}; the nearest are {_multiples(cut.heads, group, shape.heads)}"
        )
    if config.model_type in GPT2_LIKE and (cut.heads is not None or cut.hidden is not None):
        heads, hidden = cut.heads or shape.heads, cut.hidden or shape.hidden
        if heads * shape.head != hidden and not found:
            found.append(
                f"heads={heads} hidden={hidden}: in {config.model_type} heads share out the hidden width, {shape.head} "
                f"each, so that both change together: heads={heads} hidden={heads * shape.head}"
            )
    if cut.hidden is not None and cut.hidden % 2 and not found:
        found.append(f"hidden={cut.hidden} is odd; give an even width, better a multiple of 64")
    if not found and _is_whole(cut, shape):
        found.append("nothing is cut; give layers=..., intermediate=..., heads=... or hidden=...")
    return found


def _layer_problems(layers: Sequence[int] | None, count: int) -> list[str]:
    if layers is None:
        return []
    found = []
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside:
        found.append(f"layers {_listed(outside)}: the model has {count}; give numbers from 0 to {count - 1}")
    twice = sorted({layer for layer in layers if list(layers).count(layer) > 1})
    if twice:
        found.append(f"layers {_listed(twice)} are given twice; give each once")
    if not layers:
        found.append("layers is empty; keep at least one")
    if list(layers) != sorted(layers) and not twice:
        found.append(f"layers {_listed(layers)} are not in the model's order; give {_listed(sorted(layers))}")
    return found


def _multiples(wanted: int, of: int, most: int) -> str:
    near = [n for n in (wanted // of * of, (wanted // of + 1) * of) if of <= n <= most]
    return " and ".join(map(str, near))


def _listed(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _is_whole(cut: Cut, shape: Shape) -> bool:
    sizes = all(getattr(cut, name) in (None, getattr(shape, name)) for name in ("intermediate", "heads", "hidden"))
    return sizes and (cut.layers is None or list(cut.layers) == list(range(shape.layers)))


@torch.no_grad()
def prune(model: Any, cut: Cut) -> Pruned:
    """Return a smaller copy of a causal language model.

    Of the hidden width, the channels with the largest rows in the token embeddings stay, the same in every layer. Of
    each layer, intermediate channels stay by the product of the norms of what goes in and out, heads (groups of query
    heads with their keys and values) by the norm of the output projection, in the model's order.

    Args:
        model: a transformers model, as ``AutoModelForCausalLM`` gives it, unquantised; unchanged.
        cut: what to keep.

    Raises:
        ValueError: what ``cut_problems`` says.
    """
    problems = cut_problems(model.config, cut)
    if problems:
        raise ValueError("; ".join(problems))
    before = shape_of(model.config)
    small = copy.deepcopy(model)
    layers = list(range(before.layers)) if cut.layers is None else list(cut.layers)
    family = _gpt2 if model.config.model_type in GPT2_LIKE else _llama
    family(small, cut, before, layers)
    # Attention modules hold sizes and their layer's number: a model made from the configuration has them right.
    fresh = type(model)(small.config)
    fresh.load_state_dict(small.state_dict())
    fresh.to(dtype=model.dtype, device=model.device).eval()
    fresh.tie_weights()
    fresh.generation_config = copy.deepcopy(model.generation_config)
    after = shape_of(fresh.config)
    names = ("layers", "intermediate", "heads", "hidden")
    changed = {name: (getattr(before, name), getattr(after, name)) for name in names}
    whole, left = (sum(p.numel() for p in one.parameters()) for one in (model, fresh))
    return Pruned(fresh, layers, whole, left, {name: pair for name, pair in changed.items() if pair[0] != pair[1]})


def _largest(importance: Tensor, count: int) -> Tensor:
    """Return the places of the most important entries, ascending."""
    return importance.float().topk(count).indices.sort().values


def _spread(groups: Tensor, width: int) -> Tensor:
    """Return the channels of groups of ``width`` channels."""
    return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()


def _keep(module: nn.Module, name: str, places: Tensor, dim: int) -> None:
    """Cut a parameter; biases that do not exist are skipped."""
    value = getattr(module, name, None)
    if value is not None:
        setattr(module, name, nn.Parameter(value.data.index_select(dim, places).clone(), value.requires_grad))


def _linear(module: nn.Module, *, out: Tensor | None = None, into: Tensor | None = None) -> None:
    """Cut an ``nn.Linear``, [out, in]."""
    if out is not None:
        _keep(module, "weight", out, 0)
        _keep(module, "bias", out, 0)
    if into is not None:
        _keep(module, "weight", into, 1)


def _conv1d(module: nn.Module, *, out: Tensor | None = None, into: Tensor | None = None) -> None:
    """Cut GPT-2's ``Conv1D``, a linear layer with weights [in, out]."""
    if out is not None:
        _keep(module, "weight", out, 1)
        _keep(module, "bias", out, 0)
    if into is not None:
        _keep(module, "weight", into, 0)


def _llama(model: Any, cut: Cut, shape: Shape, layers: Sequence[int]) -> None:
    body, config = model.model, model.config
    body.layers = nn.ModuleList([body.layers[layer] for layer in layers])
    for layer in body.layers:
        mlp, attention = layer.mlp, layer.self_attn
        if cut.intermediate is not None:
            size = mlp.up_proj.weight.norm(dim=1) * mlp.gate_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
            kept = _largest(size, cut.intermediate)
            _linear(mlp.up_proj, out=kept)
            _linear(mlp.gate_proj, out=kept)
            _linear(mlp.down_proj, into=kept)
        if cut.heads is not None:
            group = shape.heads // shape.key_heads
            of_heads = attention.o_proj.weight.norm(dim=0).view(shape.key_heads, group * shape.head)
            kept = _largest(of_heads.square().sum(1), cut.heads // group)
            queries, keys = _spread(kept, group * shape.head), _spread(kept, shape.head)
            _linear(attention.q_proj, out=queries)
            for name in ("k_proj", "v_proj"):
                _linear(getattr(attention, name), out=keys)
            _linear(attention.o_proj, into=queries)
    if cut.hidden is not None:
        kept = _largest(body.embed_tokens.weight.norm(dim=0), cut.hidden)
        _keep(body.embed_tokens, "weight", kept, 1)
        _keep(body.norm, "weight", kept, 0)
        for layer in body.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                _keep(norm, "weight", kept, 0)
            for name in ("q_proj", "k_proj", "v_proj"):
                _linear(getattr(layer.self_attn, name), into=kept)
            for name in ("up_proj", "gate_proj"):
                _linear(getattr(layer.mlp, name), into=kept)
            _linear(layer.self_attn.o_proj, out=kept)
            _linear(layer.mlp.down_proj, out=kept)
    _cut_head(model, body.embed_tokens, kept if cut.hidden is not None else None)
    config.head_dim = shape.head
    config.num_hidden_layers = len(layers)
    config.intermediate_size = cut.intermediate or shape.intermediate
    config.hidden_size = cut.hidden or shape.hidden
    if cut.heads is not None:
        config.num_attention_heads = cut.heads
        config.num_key_value_heads = cut.heads * shape.key_heads // shape.heads
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[layer] for layer in layers])


def _gpt2(model: Any, cut: Cut, shape: Shape, layers: Sequence[int]) -> None:
    body, config = model.transformer, model.config
    body.h = nn.ModuleList([body.h[layer] for layer in layers])
    for block in body.h:
        if cut.intermediate is not None:
            size = block.mlp.c_fc.weight.norm(dim=0) * block.mlp.c_proj.weight.norm(dim=1)
            kept = _largest(size, cut.intermediate)
            _conv1d(block.mlp.c_fc, out=kept)
            _conv1d(block.mlp.c_proj, into=kept)
        if cut.heads is not None:
            of_heads = block.attn.c_proj.weight.norm(dim=1).view(shape.heads, shape.head)
            channels = _spread(_largest(of_heads.square().sum(1), cut.heads), shape.head)
            _conv1d(block.attn.c_attn, out=torch.cat([part * shape.hidden + channels for part in range(3)]))
            _conv1d(block.attn.c_proj, into=channels)
    if cut.hidden is not None:
        kept = _largest(body.wte.weight.norm(dim=0), cut.hidden)
        for embedding in (body.wte, body.wpe):
            _keep(embedding, "weight", kept, 1)
        norms = [body.ln_f, *(norm for block in body.h for norm in (block.ln_1, block.ln_2))]
        for norm in norms:
            _keep(norm, "weight", kept, 0)
            _keep(norm, "bias", kept, 0)
        for block in body.h:
            _conv1d(block.attn.c_attn, into=kept)
            _conv1d(block.mlp.c_fc, into=kept)
            _conv1d(block.attn.c_proj, out=kept)
            _conv1d(block.mlp.c_proj, out=kept)
    _cut_head(model, body.wte, kept if cut.hidden is not None else None)
    config.n_layer, config.n_inner = len(layers), cut.intermediate or shape.intermediate
    config.n_embd, config.n_head = cut.hidden or shape.hidden, cut.heads or shape.heads


def _cut_head(model: Any, embedding: nn.Module, kept: Tensor | None) -> None:
    """Cut the output head, or tie it to the embeddings, which were cut."""
    head = model.get_output_embeddings()
    if model.config.tie_word_embeddings:
        head.weight = embedding.weight
    elif kept is not None:
        _linear(head, into=kept)


def evenly(count: int, keep: int) -> list[int]:
    """Return ``keep`` of ``count`` layers at even distances, the first and the last among them.

    Raises:
        ValueError: more than there are, or none.
    """
    if not 1 <= keep <= count:
        raise ValueError(f"keep={keep}: the model has {count} layers; give 1 to {count}")
    return [0] if keep == 1 else [round(i * (count - 1) / (keep - 1)) for i in range(keep)]
