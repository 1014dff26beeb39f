"""From a layout to HyperCommGrids, process groups and seeds. The only owner of process groups.

Imports ``layout``, ``observe`` and megatron-core.
"""
