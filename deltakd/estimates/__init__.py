"""Estimates of a run's memory and cost before it starts."""
