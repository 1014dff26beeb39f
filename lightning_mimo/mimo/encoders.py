"""What a module may have for an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_mimo.errors import DataError


def check_one_encoder(name: str, encoders: Sequence[torch.nn.Module]) -> None:
    """Refuse encoders whose embeddings would go to each other's samples.

    Args:
        name: of the module.
        encoders: of the module.

    Raises:
        DataError: if there are several.
    """
    if len(encoders) > 1:
        raise DataError(
            f"Module {name!r} has {len(encoders)} encoders ({', '.join(type(each).__name__ for each in encoders)}): "
            f"MimoModel puts the embeddings of all samples by the first one before those by the second, so samples "
            f"would get each other's. Give each encoder a module and a placeholder of its own, or write one encoder "
            f"that calls both and puts their tokens side by side: [items, tokens, hidden]."
        )
