"""Warnings of the libraries below that a user of this package can do nothing about, by message and with the reason."""

from __future__ import annotations

import warnings

KNOWN_WARNINGS = {
    # megatron-core, on import: optional companions that CPUs do not have and GPUs do not need
    r"(Transformer Engine and )?Apex (is|are) not installed": UserWarning,
    r"absl.logging is not installed": UserWarning,
    # megatron-core: the API that this package is built on; its version is pinned
    r".*is experimental and still under active development": UserWarning,
    # megatron-core: experts that are not cut, in a module whose sequence is
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1": UserWarning,
    # megatron-core: its own layer specs leave out what its own MLP wants to be given
    r"MLP requires ffn_hidden_size, but it was not provided": DeprecationWarning,
    # megatron-core: a default of its own TransformerConfig, and a note to its own developers
    r"full scope is deprecated": UserWarning,
    r"The following imports from `dynamic_context.py` will be removed": DeprecationWarning,
    # Lightning: what the strategy logs is the same on every rank already
    r"It is recommended to use `self.log\(.*sync_dist=True": UserWarning,
    # Lightning: MimoModule has all steps, so that users need not write them
    r"You defined a `validation_step` but have no `val_dataloader`": UserWarning,
    # Lightning, behind torch and jsonargparse
    r"\s*By default only one JsonargparseDeprecationWarning": DeprecationWarning,
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": Warning,
    r"\s*.+ was deprecated in v4[\d.]+ and will be removed in v5": DeprecationWarning,
}


def hush_known_warnings() -> None:
    """Have these messages, and no others, ignored in this process."""
    for message, category in KNOWN_WARNINGS.items():
        warnings.filterwarnings("ignore", message=message, category=category)
