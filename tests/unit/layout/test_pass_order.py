"""The order of passes, held against Megatron's own schedule."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.known_warnings import hush_known_warnings
from lightning_mimo.layout.module_parallelism import ModuleParallelism
from lightning_mimo.layout.pass_order import order_of_passes, stages_behind


class _OneRank(torch.distributed.ProcessGroup):
    """Process group of one rank, for code that only asks for its size."""

    def __init__(self) -> None:
        super().__init__(0, 1)


class _Recorder:
    """Communicator of a stage in the middle of a pipeline that notes what it is asked for."""

    def __init__(self, behind: int) -> None:
        self.config = None
        self.total_stages, self.current_stage = behind + 2, 1
        self.is_pp_first_stage = self.is_pp_last_stage = False
        self.forwards = self.backwards = 0
        self.order: list[tuple[str, int]] = []

    def recv_forward(self, *_: Any) -> torch.Tensor:
        return torch.zeros(1, requires_grad=True)

    def recv_backward(self, *_: Any) -> torch.Tensor:
        return torch.zeros(1)

    def send_forward(self, *_: Any) -> None:
        self.order.append(("forward", self.forwards))
        self.forwards += 1

    def send_backward(self, *_: Any) -> None:
        self.order.append(("backward", self.backwards))
        self.backwards += 1

    def send_forward_recv_backward(self, *arguments: Any) -> torch.Tensor:
        self.send_forward(*arguments)
        return self.recv_backward()

    def send_backward_recv_forward(self, *arguments: Any) -> torch.Tensor:
        self.send_backward(*arguments)
        return self.recv_forward()


def _order_of_megatron(behind: int, num_microbatches: int) -> list[tuple[str, int]]:
    recorder = _Recorder(behind)
    model = torch.nn.Linear(1, 1)
    model.config = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1, pipeline_dtype=torch.float32)
    model.set_input_tensor = lambda tensor: setattr(model, "input", tensor[0] if isinstance(tensor, list) else tensor)

    def step(iterator: Any, module: Any) -> tuple[torch.Tensor, Any]:
        return module(module.input), None

    groups = ProcessGroupCollection()
    groups.tp = groups.cp = _OneRank()
    forward_backward_pipelining_without_interleaving(
        forward_step_func=step,
        data_iterator=iter(range(num_microbatches)),
        model=model,
        num_microbatches=num_microbatches,
        seq_length=1,
        micro_batch_size=1,
        p2p_communicator=recorder,
        pg_collection=groups,
    )
    return recorder.order


@pytest.mark.parametrize(("behind", "num_microbatches"), [(0, 1), (0, 4), (1, 4), (3, 4), (3, 8), (5, 2)])
def test_order_is_that_of_megatron(behind: int, num_microbatches: int) -> None:
    with megatron_on_cpu(), warnings.catch_warnings():
        hush_known_warnings()
        assert order_of_passes(behind, num_microbatches) == _order_of_megatron(behind, num_microbatches)


def test_stages_behind() -> None:
    modules = {name: ModuleParallelism(pp=pp, dp=1) for name, pp in (("images", 3), ("sounds", 1), ("language", 2))}
    places = [("images", 0), ("images", 2), ("sounds", 0), ("language", 0), ("language", 1)]
    assert [stages_behind(modules, *place) for place in places] == [4, 2, 2, 1, 0]
    assert [stages_behind(modules, *place, encoder_run_ahead=2) for place in places] == [6, 4, 4, 1, 0]


def test_every_microbatch_runs_once_in_each_direction() -> None:
    order = order_of_passes(3, 5)
    assert sorted(order) == [(way, i) for way in ("backward", "forward") for i in range(5)]
    assert all(order.index(("forward", i)) < order.index(("backward", i)) for i in range(5))
