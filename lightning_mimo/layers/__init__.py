"""Layers that take the place of megatron-core's own."""
