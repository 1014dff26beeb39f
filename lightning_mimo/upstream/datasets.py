"""What is private in Hugging Face's datasets, which need not be installed: nothing is imported here."""

from __future__ import annotations

from lightning_mimo.upstream import Attribute

ATTRIBUTES = (
    Attribute("datasets.IterableDataset", "_distributed", "whether split_dataset_by_node has divided the stream"),
)
