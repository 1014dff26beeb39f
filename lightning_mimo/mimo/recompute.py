"""Lets recomputed layers be trained behind something that is frozen.

megatron-core's activation checkpoint is a reentrant autograd function: its output requires a gradient only if one of
its inputs does. Behind a frozen embedding or encoder no input does, and the layers inside would silently get a gradient
of zero. Here such an input becomes a leaf that requires a gradient, which is computed and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from lightning_mimo.errors import ConfigError


def let_recomputed_layers_train(model: torch.nn.Module) -> None:
    """Add hooks to all of Megatron's transformers in a model whose config recomputes activations.

    Whether parameters are frozen is looked at in every forward pass, so they may be frozen before or afterwards.

    Args:
        model: the model, with its modules built.

    Raises:
        ConfigError: if a backward pass with the config would not end.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if not isinstance(config, TransformerConfig):
            continue
        if isinstance(module, TransformerLayer) and module.recompute_mlp and config.add_bias_linear:
            # Its bias is an output of the checkpoint, which then becomes its own input in the backward pass.
            raise ConfigError(
                "Recompute(granularity='selective', modules=('mlp', ...)) does not work with an MLP that has biases: "
                "megatron-core's backward pass would not end. Use TransformerSize(style='llama'), which has none, "
                "another module such as 'core_attn', or Recompute(granularity='full')."
            )
        # A full checkpoint encloses layers; a selective one encloses parts of a layer.
        enclosing = {"full": TransformerBlock, "selective": TransformerLayer}.get(config.recompute_granularity)
        if enclosing is not None and isinstance(module, enclosing):
            module.register_forward_pre_hook(_require_input_gradient, with_kwargs=True)


def _require_input_gradient(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace hidden states ``[s, b, hidden]`` that require no gradient, unless nothing behind them is trained."""
    if not torch.is_grad_enabled() or not _is_trained(module):
        return None
    if isinstance(module, TransformerBlock) and not module.pre_process:
        if not module.input_tensor.requires_grad:
            module.set_input_tensor(_as_leaf(module.input_tensor))
        return None
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": _as_leaf(kwargs["hidden_states"])}
    return (_as_leaf(args[0]), *args[1:]), kwargs


def _as_leaf(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states if hidden_states.requires_grad else hidden_states.detach().requires_grad_()


def _is_trained(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in _parameters(module))


def _parameters(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    yield from (module.layers if isinstance(module, TransformerBlock) else module).parameters()
