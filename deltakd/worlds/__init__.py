"""Invented data sets for the studies, generated deterministically."""
