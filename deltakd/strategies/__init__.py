"""How a run is spread over processes: Lightning's strategies, chosen by config and completed."""

from deltakd.strategies.selection import (
    ShardedDataParallel,
    cluster_plugin,
    loss_factor,
    make_plugins,
    make_strategy,
    optimizer_class,
    reference_engine,
    shards_parameters,
    strategy_problems,
)
from deltakd.strategies.zero import META, ZeroStrategy

__all__ = [
    "META",
    "ShardedDataParallel",
    "ZeroStrategy",
    "cluster_plugin",
    "loss_factor",
    "make_plugins",
    "make_strategy",
    "optimizer_class",
    "reference_engine",
    "shards_parameters",
    "strategy_problems",
]
