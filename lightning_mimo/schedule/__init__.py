"""One global batch: forward and backward, evaluation, generation, and the search for NaN and infinity.

Imports ``optim``, ``mimo_parallel_utils`` and below, and megatron-core.
"""
