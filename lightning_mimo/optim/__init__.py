"""Gradients, Megatron's DDP and optimizers, parameter groups and learning-rate schedulers.

Imports ``mimo`` and below, and megatron-core.
"""
