"""AdamW for bfloat16 and float16 weights: updates are computed in float32, and none is lost to rounding.

A bfloat16 number has 8 significant bits: an update below 1/512 of a weight is rounded away, step after step. Two
remedies: keep the weights in float32, too, and round a copy (mixed-precision training, arXiv 1710.03740); or round up
or down at random, so that the expected weight is right (arXiv 2010.06192). Moments are in float32 in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

HALF = (torch.bfloat16, torch.float16)
#: Elements updated at once; each needs a few bytes for its float32 copy and the noise.
_AT_ONCE = 2**26
#: An update of AdamW is about ``lr``. Below this it is mostly smaller than half of the last of bfloat16's 8 bits in a
#: usual weight (0.02), and rounded away.
_LEAST_LR_IN_HALF = 1e-4
_MASTER = "master"


def rounding_warning(parameters: Iterable[nn.Parameter], lr: float) -> str | None:
    """Return the remedy if updates to half-precision weights would mostly be lost; None if they would not.

    Args:
        parameters: of the student, as the optimiser will change them.
        lr: peak learning rate.
    """
    half = {p.dtype for p in parameters if p.requires_grad} & set(HALF)
    if not half or lr >= _LEAST_LR_IN_HALF:
        return None
    named = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
    return (
        f"the student's weights are {named}, and with optim.lr={lr:g} most updates are too small for it: they are "
        "rounded away. Give optim.half_weights=masters (or stochastic, which takes less memory, for bfloat16), "
        "model.student.dtype=float32 with trainer.precision=bf16-mixed, or a higher optim.lr"
    )


@final
class HalfPrecisionAdamW(torch.optim.Optimizer):
    """AdamW as PyTorch's, in float32 for weights of any floating-point type.

    Weights in float32 are updated as by ``torch.optim.AdamW``. The noise of stochastic rounding depends only on seed
    and step, so resumed runs and all ranks of DDP draw the same.

    Args:
        params: as for ``torch.optim.AdamW``.
        lr, betas, eps, weight_decay: likewise.
        half_weights: ``masters``: each half-precision weight has a float32 master in the optimiser's state;
            ``stochastic``: it is rounded up or down at random.
        seed: of the noise.

    Raises:
        ValueError: stochastic rounding of float16, whose smallest numbers have fewer bits.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        half_weights: Literal["masters", "stochastic"],
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._half_weights = half_weights
        self._seed = seed
        if half_weights == "stochastic" and any(p.dtype == torch.float16 for p in self._parameters()):
            raise ValueError("optim.half_weights=stochastic is for bfloat16, and the student is float16; give masters")

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all weights that have a gradient; return what ``closure`` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for some in _in_parts(p for p in group["params"] if p.grad is not None):
                self._update(some, group, generators)
        return loss

    def _update(
        self, parameters: list[Tensor], group: dict[str, Any], generators: dict[torch.device, torch.Generator]
    ) -> None:
        states = [self._state_of(p) for p in parameters]
        wide = [state.get(_MASTER, _in_float32(p)) for p, state in zip(parameters, states, strict=True)]
        beta1, beta2 = group["betas"]
        adamw(
            wide,
            [_given(p.grad).to(at.dtype) for p, at in zip(parameters, wide, strict=True)],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for parameter, new, state in zip(parameters, wide, states, strict=True):
            if new is parameter:
                continue
            target, values = _local(parameter), _local(new)
            if _MASTER not in state and parameter.dtype == torch.bfloat16:
                noise = generators.get(values.device) or self._generator(values.device, int(state["step"]))
                generators[values.device] = noise
                values = round_stochastically(values, noise)
            target.copy_(values)

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of a weight, created at its first update."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            wide = _in_float32(parameter)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(wide), torch.zeros_like(wide)
            if self._half_weights == "masters" and wide is not parameter:
                state[_MASTER] = wide
        return state

    def _generator(self, device: torch.device, step: int) -> torch.Generator:
        # Neighbouring seeds give unrelated streams of the generators' counters or twisters.
        return torch.Generator(device).manual_seed((self._seed * 0x9E3779B97F4A7C15 + step) % 2**63)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As inherited, but states keep their dtype: PyTorch would cast them to the weights' dtype."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, parameter in zip(numbers, self._parameters(), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[parameter][name] = value.detach().clone().to(parameter.device)


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down with probabilities that make the expected value right.

    Args:
        values: float32, of any shape.
        generator: on the same device.
    """
    # bfloat16 is the upper half of float32: a random lower half carries into it as often as it should.
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return (values.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


def _in_parts(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    part: list[Tensor] = []
    size = 0
    for parameter in parameters:
        part.append(parameter)
        size += _local(parameter).numel()
        if size >= _AT_ONCE:
            yield part
            part, size = [], 0
    if part:
        yield part


def _in_float32(parameter: Tensor) -> Tensor:
    """Return a float32 copy of a half-precision weight; others as they are."""
    return parameter.float() if parameter.dtype in HALF else parameter


def _given(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
