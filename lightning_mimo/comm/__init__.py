"""Activations and gradients on their way between modules and pipeline stages.

Imports ``parallel`` and below, and megatron-core.
"""
