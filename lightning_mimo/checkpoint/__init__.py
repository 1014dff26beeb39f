"""Checkpoint directories that all ranks write in parallel and that any layout can read.

Imports ``data``, ``optim`` and below.
"""
