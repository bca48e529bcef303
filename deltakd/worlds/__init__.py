"""Invented data sets for the studies: written by functions, the same files every time."""
