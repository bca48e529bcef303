"""Configs: composed by Hydra, checked, and turned into objects."""
