"""Checkpoint directories that all ranks write and any layout reads.

Imports ``data``, ``optim`` and below.
"""
