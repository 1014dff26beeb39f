"""Which module runs on which ranks and which samples each rank takes, validated before any process starts.

Pure Python: neither torch, Lightning nor megatron-core is imported. Imports ``errors`` only.
"""
