"""Initial weights where a default device is set, as Lightning does around ``configure_model``: it does not count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.mimo import MimoModelConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.model import build_mimo_model
from lightning_mimo.models.encoder import encoder_spec
from lightning_mimo.models.gpt import TransformerSize, gpt_spec
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.parallel.random import seed_megatron

HIDDEN, IMAGE_TOKEN_ID = 16, 15


class DrawingEncoder(torch.nn.Module):
    """Draws its weights in every way that a user's encoder may."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = torch.nn.Parameter(torch.randn(4, HIDDEN))
        self.truncated = torch.nn.Parameter(torch.nn.init.trunc_normal_(torch.empty(4, HIDDEN)))
        self.linear = torch.nn.Linear(4, HIDDEN)
        self.register_buffer("frequencies", torch.rand(4))


@pytest.fixture
def infra() -> Iterator[MimoModelInfra]:
    """Two replicas, this process being the second one, alone and without communication."""
    sizes = {"images": ModuleParallelism(), "language": ModuleParallelism()}
    layout = MimoLayout.resolve(sizes, world_size=2, colocate=True)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    with megatron_on_cpu():
        seed_megatron(layout, 1, seed=1)
        built = MimoModelInfra.build(layout)
        yield built
        built.destroy()
    dist.destroy_process_group()


def weights(infra: MimoModelInfra) -> dict[str, torch.Tensor]:
    size = TransformerSize(num_layers=1, hidden_size=HIDDEN, num_attention_heads=2)
    config = MimoModelConfig(
        language_model_spec=gpt_spec(infra, size, vocab_size=16, max_sequence_length=8),
        modality_submodules_spec={"images": encoder_spec(infra, "images", DrawingEncoder)},
        special_token_ids={"images": IMAGE_TOKEN_ID},
    )
    state = build_mimo_model(config, infra, seed=1).state_dict()
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # megatron-core's own
def test_weights_are_drawn_on_the_cpu_whatever_the_default_device(infra: MimoModelInfra) -> None:
    without = weights(infra)
    torch.rand(7)  # another place in the run's random numbers, as on another replica
    before = torch.get_rng_state()
    with torch.device("meta"):
        within = weights(infra)
    assert {name: value.device.type for name, value in within.items()} == dict.fromkeys(without, "cpu")
    assert all(torch.equal(value, within[name]) for name, value in without.items())
    assert torch.equal(torch.get_rng_state(), before), "the run's own random numbers go on as if nothing was drawn"


def test_lightning_builds_on_the_cpu_on_gpus_too() -> None:
    strategy = MimoStrategy({"images": ModuleParallelism(), "language": ModuleParallelism()}, 8)
    strategy.parallel_devices = [torch.device("meta")]  # stands for a GPU
    strategy.cluster_environment = type("Environment", (), {"local_rank": staticmethod(lambda: 0)})()
    with strategy.tensor_init_context():
        assert torch.empty(1).device.type == "cpu"
