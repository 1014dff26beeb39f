"""Real processes that are really killed."""

STEPS = 24
"""Optimizer steps of a run."""
