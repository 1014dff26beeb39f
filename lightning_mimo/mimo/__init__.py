"""The MimoModel of a rank: construction, initial weights, parameter names, freezing, dtypes.

Imports ``comm``, ``layers`` and below, and megatron-core.
"""
