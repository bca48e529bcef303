"""Configs: composed by Hydra, checked, and made into objects."""
