"""Reads rows from files and the hub, and finds rows of the same task."""
