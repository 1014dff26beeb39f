"""Where the ranks of one machine meet, and a module that an earlier Trainer has built."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from lightning_mimo import ConfigError, MimoModule, ModuleParallelism
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.dtypes import FLOAT32, DtypePolicy
from lightning_mimo.strategy import world
from lightning_mimo.strategy.module_check import check_module_for
from lightning_mimo.strategy.world import loopback_store


def test_ranks_of_one_machine_meet_on_the_loopback_interface_only() -> None:
    environment = LightningEnvironment()
    store = loopback_store(environment, timedelta(seconds=30))
    store.set("key", "value")
    assert store.get("key") == b"value"
    listening = [each.laddr for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    assert [each.ip for each in listening if each.port == environment.main_port] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("environment", "is_ours"),
    [(LightningEnvironment, True), (TorchElasticEnvironment, False)],
    ids=["own", "torchrun"],
)
def test_store_of_torchrun_is_left_to_it(
    environment: type[LightningEnvironment | TorchElasticEnvironment], is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(world, "loopback_store", lambda *args: "ours")
    monkeypatch.setattr(world, "_init_dist_connection", lambda *args, **options: seen.update(options))
    world.join_world(environment(), torch.device("cpu"), "gloo", timedelta(seconds=30))
    assert ("store" in seen) == is_ours


def test_module_that_was_built_for_something_else_is_refused() -> None:
    one, other = (
        MimoLayout.resolve({"images": ModuleParallelism(), "language": ModuleParallelism()}, world_size=n, colocate=c)
        for n, c in ((2, False), (1, True))
    )
    module = MimoModule()
    check_module_for(module, other, FLOAT32)  # not built yet
    module.built_for = one, FLOAT32
    check_module_for(module, one, FLOAT32)
    with pytest.raises(ConfigError, match=r"built by an earlier Trainer for another layout, .* with ckpt_path="):
        check_module_for(module, other, FLOAT32)
    with pytest.raises(ConfigError, match=r"for another precision"):
        check_module_for(module, one, DtypePolicy(mixed=True))
