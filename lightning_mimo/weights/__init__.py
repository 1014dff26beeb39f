"""Weights in other projects' files: rules between their tensors and Megatron's, sharded safetensors, import and export.

Imports ``mimo`` and below: model families, which state their rules, come above.
"""
