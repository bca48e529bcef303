"""Rollouts: batches of responses that the student writes while it trains."""
