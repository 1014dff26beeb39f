"""Checkpoints: a directory that all ranks write at once, that appears whole or not at all, and fits any layout."""
