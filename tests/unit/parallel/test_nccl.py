"""Options of NCCL: what reaches torch, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_nccl_timeout

from lightning_mimo import ConfigError, ModuleParallelism, NcclGroupOptions, NcclOptions
from lightning_mimo.layout.communicators import Use
from lightning_mimo.strategy.strategy import MimoStrategy

needs_nccl = pytest.mark.skipif(not dist.is_nccl_available(), reason="torch was built without NCCL")


@needs_nccl
def test_options_reach_torch() -> None:
    chosen = NcclGroupOptions(high_priority_stream=True, min_ctas=2, max_ctas=8, cga_cluster_size=4, net_name="Socket")
    options = NcclOptions(gradients=chosen).for_use("gradients")
    config = options.config
    assert options.is_high_priority_stream
    assert (config.min_ctas, config.max_ctas, config.cga_cluster_size, config.net_name) == (2, 8, 4, "Socket")
    again = NcclOptions(gradients=chosen).for_use("gradients")
    assert again is not options, "torch writes the name of a group into its options"
    assert options._timeout == default_pg_nccl_timeout, "torch warns of another one"


@needs_nccl
@pytest.mark.parametrize(
    ("field", "uses"),
    [
        ("model", ["model"]),
        ("gradients", ["gradients"]),
        ("expert_gradients", ["expert gradients"]),
        ("transfers", ["activations sent", "gradients sent"]),
    ],
)
def test_each_use_has_its_options(field: str, uses: list[Use]) -> None:
    options = NcclOptions(**{field: NcclGroupOptions(high_priority_stream=True)})
    every: list[Use] = ["model", "gradients", "expert gradients", "activations sent", "gradients sent"]
    assert [use for use in every if options.for_use(use) is not None] == uses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_ctas": 0}, "min_ctas=0) must be a whole number from 1 to 64, or None"),
        ({"max_ctas": 2.5}, "max_ctas=2.5) must be a whole number"),
        ({"cga_cluster_size": 9}, "cga_cluster_size=9) must be a whole number from 0 to 8"),
        ({"min_ctas": 8, "max_ctas": 4}, "min_ctas=8, max_ctas=4): min_ctas must not be larger"),
        ({"net_name": "ib"}, "net_name='ib'): choose 'IB', 'Socket' or None"),
    ],
)
def test_values_that_nccl_would_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        NcclGroupOptions(**options)


def test_without_nccl_they_are_refused_and_defaults_are_not() -> None:
    options = NcclOptions(transfers=NcclGroupOptions(max_ctas=4))
    with pytest.raises(ConfigError, match=r"use gloo\. Leave nccl out"):
        options.check_backend("gloo")
    options.check_backend("nccl")
    NcclOptions().check_backend("gloo")


def test_strategy_refuses_them_on_cpus_before_any_rank_starts() -> None:
    from lightning.pytorch import Trainer

    strategy = MimoStrategy(
        {"language": ModuleParallelism()}, 4, nccl=NcclOptions(model=NcclGroupOptions(high_priority_stream=True))
    )
    Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match="sets options of NCCL, but the process groups of this run use gloo"):
        strategy.validate()
