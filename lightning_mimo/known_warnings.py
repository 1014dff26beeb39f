"""Warnings of dependencies that users of this package cannot act on, by message and with the reason."""

from __future__ import annotations

import logging
import warnings

KNOWN_WARNINGS = {
    # megatron-core, on import: optional packages that do not exist for CPUs and are not required on GPUs
    r"(Transformer Engine and )?Apex (is|are) not installed": UserWarning,
    r"absl.logging is not installed": UserWarning,
    # megatron-core: the API that this package uses; its version is pinned
    r".*is experimental and still under active development": UserWarning,
    # megatron-core: experts with expt_tp=1 in a module that uses sequence parallelism
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1": UserWarning,
    # megatron-core: its layer specs omit an argument that its MLP expects
    r"MLP requires ffn_hidden_size, but it was not provided": DeprecationWarning,
    # megatron-core: a default of its TransformerConfig, and a note to its developers
    r"full scope is deprecated": UserWarning,
    r"The following imports from `dynamic_context.py` will be removed": DeprecationWarning,
    # megatron-core: ranks of a module that is frozen as a whole have nothing to update
    r"WARNING: there is no optimizer on RANK": UserWarning,
    # Lightning: values that the strategy logs are already equal on every rank
    r"It is recommended to use `self.log\(.*sync_dist=True": UserWarning,
    # Lightning: MimoModule defines all steps so that users do not have to
    r"You defined a `validation_step` but have no `val_dataloader`": UserWarning,
    # Lightning, which uses deprecated functions of torch and jsonargparse
    r"\s*By default only one JsonargparseDeprecationWarning": DeprecationWarning,
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": Warning,
    r"\s*.+ was deprecated in v4[\d.]+ and will be removed in v5": DeprecationWarning,
}

# torch, on import: what it would build extensions with, on a machine without a GPU. The Trainer looks for GPUs itself.
_KNOWN_LOG = ("torch.utils.cpp_extension", "No CUDA runtime is found")


def hush_known_warnings() -> None:
    """Ignore these messages, and no others, in this process."""
    name, _ = _KNOWN_LOG
    logging.getLogger(name).addFilter(_is_unknown)
    for message, category in KNOWN_WARNINGS.items():
        warnings.filterwarnings("ignore", message=message, category=category)


def _is_unknown(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_KNOWN_LOG[1])
