"""Estimates the memory of every rank in one process, before a run starts.

Imports ``optim`` and below; runs on the meta device.
"""
