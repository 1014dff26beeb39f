"""Which module sits on which ranks, and which samples each rank takes: checked before anything starts.

Pure Python: neither torch, Lightning nor megatron-core is imported. Imports ``errors`` only.
"""
