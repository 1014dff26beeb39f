"""Layers that megatron-core lacks or that every layout must compute alike.

Imports ``parallel`` and below, and megatron-core.
"""
