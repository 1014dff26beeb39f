"""Balancing loss of a mixture of experts, the same in every layout.

megatron-core's balancing losses are taken over the tokens of one rank and microbatch, padding included, and divided by
the number of loss tokens of the global batch. Here every sequence has a balancing loss of its own, as in DeepSeek-V3:

    experts / k * sum over experts of (share of the sequence's tokens that go there) * (mean probability)

It is 1 where all experts are used alike. Its mean over the sequences of the global batch, weighted by their loss
tokens, times a coefficient is added to the loss.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.errors import ConfigError


class SequenceBalancedRouter(TopKRouter):
    """megatron-core's router with a balancing loss for each sequence.

    Attributes:
        token_weights: result of :func:`token_weights` for the next forward pass; ``None`` adds no balancing loss.
    """

    def __init__(self, *args: Any, coefficient: float, **kwargs: Any) -> None:
        """
        Args:
            args: as for TopKRouter.
            coefficient: factor of the balancing loss.
            kwargs: as for TopKRouter.
        """
        super().__init__(*args, **kwargs)
        self._coefficient = coefficient
        self.token_weights: torch.Tensor | None = None

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route tokens as upstream does, and attach the balancing loss to the probabilities.

        Args:
            logits: ``[s, b, experts]``; with sequence parallelism this rank's part of the sequence. Packed ``[s, 1,
                experts]``, for weights of several sequences.
            padding_mask: as upstream.
        """
        probabilities, chosen = super().routing(logits, padding_mask)
        if self.token_weights is None or not self.training or not torch.is_grad_enabled():
            return probabilities, chosen
        weights = self._own_part(self.token_weights, logits.size(0)).to(logits.dtype)
        shape = -1, weights.size(1), -1  # the sequences of a packed row see the same tokens, with weights of their own
        shares = torch.einsum("sb,sbe->be", weights[..., 0], chosen.view_as(logits).to(logits.dtype).expand(*shape))
        if self.config.sequence_parallel:
            dist.all_reduce(shares, group=self.tp_group)
        means = torch.einsum("sb,sbe->be", weights[..., 1], torch.softmax(logits, dim=-1).expand(*shape))
        loss = self._coefficient * self.config.num_moe_experts / self.topk * (shares.detach() * means).sum()
        return MoEAuxLossAutoScaler.apply(probabilities, loss), chosen

    def _own_part(self, weights: torch.Tensor, length: int) -> torch.Tensor:
        """``[b, s, 2] -> [length, b, 2]``, of this tensor-parallel rank."""
        weights = weights.transpose(0, 1)
        if weights.size(0) == length:
            return weights
        return weights[self.tp_group.rank() * length :][:length]


def token_weights(lengths: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Weights of all tokens in the balancing loss.

    Args:
        lengths: int64 ``[b]``, tokens of each sequence before padding.
        loss_mask: ``[b, s]``, 0 where a token does not count in the loss.

    Returns:
        float64 ``[b, s, 2]``: 1 / tokens of the sequence; and this times its loss tokens. 0 for padding.
    """
    places = torch.arange(loss_mask.size(1), device=loss_mask.device)
    shares = (places < lengths.unsqueeze(1)).double() / lengths.unsqueeze(1)
    return torch.stack([shares, shares * (loss_mask > 0).sum(dim=1, keepdim=True)], dim=-1)


def packed_token_weights(lengths: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """:func:`token_weights` of sequences that follow each other in one row.

    Args:
        lengths: int64 ``[n]``, tokens of each sequence.
        loss_mask: ``[1, s]``, 0 where a token does not count in the loss; may go on after the last sequence.

    Returns:
        float64 ``[n, s, 2]``: as there, and 0 for the tokens of other sequences.
    """
    places = torch.arange(loss_mask.size(1), device=loss_mask.device)
    ends = lengths.cumsum(dim=0).unsqueeze(1)
    is_own = (places < ends) & (places >= ends - lengths.unsqueeze(1))
    shares = is_own.double() / lengths.unsqueeze(1)
    return torch.stack([shares, shares * (is_own & (loss_mask > 0)).sum(dim=1, keepdim=True)], dim=-1)


class BalancingLoss:
    """Gives the routers of a language model the weights of the tokens of each microbatch.

    The weights go through the transformer block as its ``padding_mask``, which layers pass on unread: where activations
    are recomputed, it belongs to the same microbatch as they do.

    Attributes:
        token_weights: weights for the next forward pass, ``[b, s, 2]``.
    """

    def __init__(self, block: torch.nn.Module) -> None:
        """
        Args:
            block: the language model's TransformerBlock, which has a :class:`SequenceBalancedRouter`.
        """
        self.token_weights: torch.Tensor | None = None
        block.register_forward_pre_hook(self._send, with_kwargs=True)
        for layer in block.modules():
            if isinstance(layer, MoELayer):
                layer.register_forward_pre_hook(_receive, with_kwargs=True)

    def _send(self, block: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "padding_mask": self.token_weights}


def _receive(layer: MoELayer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    layer.router.token_weights = kwargs.get("padding_mask")
    return args, {**kwargs, "padding_mask": None}


def balance_experts(language_model: torch.nn.Module) -> BalancingLoss | None:
    """Make the routers of a language model add their balancing loss; ``None`` if it has none."""
    block = getattr(language_model, "decoder", None)
    if block is None or not any(isinstance(part, SequenceBalancedRouter) for part in block.modules()):
        return None
    return BalancingLoss(block)


def balanced_router(coefficient: float) -> Any:
    """Builder of a :class:`SequenceBalancedRouter`, for ``MoESubmodules(router=...)``."""
    return partial(SequenceBalancedRouter, coefficient=coefficient)


def check_experts(config: TransformerConfig) -> None:
    """Refuse settings of a mixture of experts that depend on which samples share a rank.

    Raises:
        ConfigError: naming the setting and the remedy.
    """
    if not config.num_moe_experts:
        return
    kind, coefficient = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    kinds = kind if isinstance(kind, list) else [kind]
    coefficients = coefficient if isinstance(coefficient, list) else [coefficient] * len(kinds)
    # Upstream's default is a loss with a coefficient of 0.
    unsupported = [
        each
        for each, factor in zip(kinds, coefficients, strict=True)
        if each != "none" and (factor or "loss" not in each)
    ]
    settings = {
        f"moe_router_load_balancing_type={kind!r}, moe_aux_loss_coeff={coefficient}": bool(unsupported),
        f"moe_z_loss_coeff={config.moe_z_loss_coeff}": bool(config.moe_z_loss_coeff),
        f"moe_expert_capacity_factor={config.moe_expert_capacity_factor}": config.moe_expert_capacity_factor
        is not None,
        "moe_router_enable_expert_bias=True": config.moe_router_enable_expert_bias,
    }
    for setting, is_set in settings.items():
        if is_set:
            raise ConfigError(
                f"TransformerConfig({setting}) is not supported: it counts the tokens of one rank and microbatch, with "
                f"padding, so results would depend on the layout. Leave it out, and use "
                f"TransformerSize(balancing_loss=0.01), which is the same in every layout."
            )
