"""Reads rows from files and the hub, and finds rows with the same task."""
