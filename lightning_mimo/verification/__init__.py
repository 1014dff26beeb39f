"""Checks that a user's own model trains the same in a layout as in one process: scaled down, in float64, two steps.

Imports ``strategy`` and below. ``lightning-mimo verify`` is its command.
"""
