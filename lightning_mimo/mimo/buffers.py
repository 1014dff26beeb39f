"""Buffers of a module that belong into a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every buffer that ``state_dict()`` would contain."""
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer
