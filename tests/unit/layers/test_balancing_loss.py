"""The balancing loss of experts: its weights, and the settings of megatron-core that it takes the place of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo import ConfigError
from lightning_mimo.layers.balancing_loss import check_experts, token_weights
from lightning_mimo.models import TransformerSize


def test_weights_of_a_sequence_do_not_depend_on_its_padding() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 1, 1]])
    shares, counted = token_weights(torch.tensor([4, 5]), mask).unbind(dim=-1)
    assert shares.tolist() == [[0.25] * 4 + [0.0], [0.2] * 5]
    assert counted.sum(dim=1).tolist() == pytest.approx([2, 4])
    padded = token_weights(torch.tensor([4]), torch.tensor([[0, 1, 1, 0, 0, 0, 0]]))
    assert torch.equal(padded[0, :5, 1], counted[0])


@pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning")  # TransformerConfig about itself
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01},
            "'aux_loss', moe_aux_loss_coeff=0.01",
        ),
        ({"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01}, "'seq_aux_loss'"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn'"),
        ({"moe_z_loss_coeff": 0.001}, "moe_z_loss_coeff=0.001"),
        ({"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor=1.0"),
    ],
    ids=["aux_loss", "seq_aux_loss", "sinkhorn", "z_loss", "capacity"],
)
def test_settings_that_depend_on_the_layout_are_refused(settings: dict[str, Any], named: str) -> None:
    plain = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 8,
    }
    check_experts(TransformerConfig(**plain, add_bias_linear=False))
    config = TransformerConfig(**plain, add_bias_linear=False)
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=rf"TransformerConfig\(.*{named}.*TransformerSize\(balancing_loss=0\.01\)"):
        check_experts(config)


@pytest.mark.parametrize(("experts", "coefficient"), [(None, 0.01), (4, -1.0)])
def test_balancing_loss_needs_experts(experts: int | None, coefficient: float) -> None:
    with pytest.raises(ConfigError, match=r"a balancing loss is 0 or above, and needs num_experts"):
        TransformerSize(
            num_layers=1, hidden_size=8, num_attention_heads=2, num_experts=experts, balancing_loss=coefficient
        )
