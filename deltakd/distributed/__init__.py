"""How a run is spread over processes: launchers, ranks, sharding, strategies, and the lifeline between ranks."""
