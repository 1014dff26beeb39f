"""Learning rates, weight decay and momentum on their way from a scheduler to megatron-core's groups."""

from __future__ import annotations

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from lightning_mimo import OptimizerOverride
from lightning_mimo.optim.param_groups import ParamGroupSpec, groups_for_schedulers, pass_on


def spec(name: str, **override: float) -> ParamGroupSpec:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    return ParamGroupSpec(name=name, override=OptimizerOverride(**override), clipped_with=None, parameters=parameters)


def test_group_has_what_schedulers_read() -> None:
    config = OptimizerConfig(optimizer="adam", lr=0.1, min_lr=0.01, weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.9)
    images, language = groups_for_schedulers(config, [spec("images", lr=0.3, weight_decay=0.0), spec("language")])
    assert (images["lr"], images["max_lr"], images["min_lr"], images["weight_decay"]) == (0.3, 0.3, 0.01, 0.0)
    assert (language["lr"], language["weight_decay"], language["end_wd"]) == (0.1, 0.2, 0.2)
    assert language["betas"] == (0.8, 0.9)
    assert "momentum" in groups_for_schedulers(OptimizerConfig(optimizer="sgd", lr=0.1), [spec("language")])[0]


def test_what_a_scheduler_wrote_reaches_every_inner_group_in_proportion() -> None:
    config = OptimizerConfig(optimizer="adam", lr=0.1, weight_decay=0.2)
    groups = groups_for_schedulers(config, [spec("images"), spec("language")])
    groups[1].update(lr=0.05, weight_decay=0.4, betas=(0.5, 0.6))
    usual = {"wd_mult": 1.0, "lr_mult": 1.0, "max_lr": 0.1, "betas": (0.9, 0.99)}
    inner = [
        {"group_name": "language", **usual},
        {"group_name": "language", **usual, "wd_mult": 0.0},
        {"group_name": "language", **usual, "max_lr": 0.02},  # Megatron's decoupled_lr: a fifth
        {**usual, "lr": "as it was"},
    ]
    pass_on(groups, inner, config)
    assert [group["lr"] for group in inner] == pytest.approx([0.05, 0.05, 0.01, "as it was"])
    assert [group["weight_decay"] for group in inner[:3]] == [0.4, 0.0, 0.4]
    assert inner[0]["betas"] == (0.5, 0.6)


def test_negative_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"OptimizerOverride\(clip_grad=-1\): must not be negative"):
        OptimizerOverride(clip_grad=-1)
