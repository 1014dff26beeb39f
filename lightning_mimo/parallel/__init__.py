"""Builds HyperCommGrids, process groups and seeds from a layout. This is the only owner of process groups.

Imports ``layout``, ``observe`` and megatron-core.
"""
