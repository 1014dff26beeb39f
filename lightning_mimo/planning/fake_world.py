"""Acts as any rank of any layout in one process, with process groups that do not communicate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.parallel_state import destroy_global_memory_buffer
from torch.overrides import TorchFunctionMode

from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.known_warnings import hush_known_warnings
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.mimo.initialization import RANDOM_INITIALIZERS
from lightning_mimo.mimo.model import RaggedMimoModel, construct_mimo_model
from lightning_mimo.observe.spans import Spans
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.parallel.random import seed_megatron
from lightning_mimo.upstream.torch import FakeTensorMode, tree_map

Configure = Callable[[MimoModelInfra], MimoModelConfig]
"""Describes the model on a rank, as ``MimoModule.configure_mimo``."""


_WHOLE_NUMBERS = (torch.arange, torch.tensor)


class OnMeta(TorchFunctionMode):
    """Creates every tensor on the meta device, whatever ``device=`` it is given, and draws no values for it.

    But whole numbers are put on the CPU: code may read them, such as the order of experts. Computed with tensors on the
    meta device, they give one that is there, too.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM_INITIALIZERS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        if func in _WHOLE_NUMBERS and not any(isinstance(value, torch.Tensor) for value in args):
            made = func(*args, **{**kwargs, "device": torch.device("cpu")})
            if not made.is_floating_point():
                return made
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if len({value.is_meta for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)}) == 2:
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


class FakeTensorsOnCpu(FakeTensorMode):
    """Makes fake tensors, also of tensors that are real.

    torch asks in every operation whether there is a GPU, for which it opens NVIDIA's library; this asks once.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._has_no_device = super().avoid_device_init

    @property
    def avoid_device_init(self) -> bool:
        """Whether there is no GPU, to which operations could move a tensor."""
        return self._has_no_device


@contextmanager
def as_rank(
    layout: MimoLayout, rank: int, *, spans: Spans | None = None, device: torch.device | None = None
) -> Iterator[MimoModelInfra]:
    """Act as one rank of a layout. torch.distributed must not be initialized in this process.

    Args:
        layout: resolved layout.
        rank: global rank.
        spans: recorder of the rank's work; ``None`` creates a new one.
        device: on which the rank computes; ``None`` is a CPU.
    """
    from torch.testing._internal.distributed.fake_pg import (  # on import it registers the backend
        FakeProcessGroup,
        FakeStore,
    )

    assert not dist.is_initialized(), "this process already belongs to a world"
    options = FakeProcessGroup.Options()
    if hasattr(options, "simulate_uniform_ranks"):  # torch 2.11 does not ask
        options.simulate_uniform_ranks = True  # what is gathered are this rank's values, as often as there are ranks
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size, pg_options=options)
    try:
        with megatron_on_cpu() if device is None or device.type == "cpu" else nullcontext(), warnings.catch_warnings():
            hush_known_warnings()
            destroy_global_memory_buffer()  # scratch space of tensor-parallel layers, which this rank is to make itself
            seed_megatron(layout, rank, seed=0)
            infra = MimoModelInfra.build(layout, spans=spans)
            yield infra
            infra.destroy()
    finally:
        destroy_global_memory_buffer()
        dist.destroy_process_group()


def build_on_meta(configure: Configure, infra: MimoModelInfra, dtype_policy: DtypePolicy) -> RaggedMimoModel:
    """Build a rank's model on the meta device, in the dtypes of a run.

    Args:
        configure: describes the model. Its code must not read the values of weights.
        infra: of :func:`as_rank`.
        dtype_policy: dtypes of the run.

    Raises:
        LayoutError: if the model does not fit the layout.
    """
    with torch.device("meta"), OnMeta():
        model = construct_mimo_model(configure(infra), infra, seed=0, dtype_policy=dtype_policy)
        return dtype_policy.convert(model)
