"""Transfer of activations and gradients between modules and between pipeline stages.

Imports ``parallel`` and below, and megatron-core.
"""
