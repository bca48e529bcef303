"""The group ``strategy`` of the config: how a run is spread over processes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

#: ZeRO 3 keeps parameters with fewer elements whole on every rank (DeepSpeed's default).
PERSISTENCE_THRESHOLD = 100_000


@dataclass(frozen=True, kw_only=True)
class StrategySettings:
    """The group ``strategy`` (``conf/strategy/*.yaml``).

    Args:
        name: ``auto`` is one process on one device, and Lightning's choice on several.
        stage: of DeepSpeed's ZeRO.
        persistence_threshold: ZeRO 3 keeps parameters with fewer elements whole on every rank, references' included.
        offload: keep ZeRO 3's parameters and optimiser state in CPU memory.
    """

    name: Literal["auto", "ddp", "deepspeed", "fsdp"] = "auto"
    stage: Literal[1, 2, 3] | None = None
    persistence_threshold: Annotated[int, Ge(0)] = PERSISTENCE_THRESHOLD
    offload: bool = False

    @property
    def shards_parameters(self) -> bool:
        """True if no rank holds the whole student."""
        return self.name == "fsdp" or (self.name == "deepspeed" and self.stage == 3)

    def problems(self) -> list[str]:
        """Return the problems with ``strategy``, one sentence each."""
        if self.name != "deepspeed":
            return []
        found = []
        if self.stage is None:
            found.append("strategy.stage is null; ZeRO has the stages 1, 2 and 3")
        if self.offload and self.stage != 3:
            found.append(f"strategy.offload=true needs strategy.stage=3; it is {self.stage}")
        if importlib.util.find_spec("deepspeed") is None:
            found.append(
                "strategy=deepspeed_* needs DeepSpeed, which is not installed: pip install 'deltakd[deepspeed]'"
            )
        return found
