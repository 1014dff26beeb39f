"""Data that is read in order: shards on disk with an index, and streams that can only be iterated.

``files`` and ``records`` are below ``tar`` and ``parquet``, which read shards on disk; ``shards`` makes a dataset of
them and ``sampler`` an order that keeps reading local. Imports ``errors`` and ``data.packages``.
"""
