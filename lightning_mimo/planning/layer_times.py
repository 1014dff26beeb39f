"""Times one layer of a module on this machine's device: the user's own code, at the shapes and sizes of a plan.

The shapes of the layer's inputs come from a microbatch on fake tensors; the layer itself then runs with real weights.
Its process groups do not communicate, so what is timed is the rank's own work; messages are priced.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.planning.costs import ModuleCosts, PassSeconds
from lightning_mimo.planning.depths import with_layers
from lightning_mimo.planning.fake_world import as_rank, build_on_meta
from lightning_mimo.planning.layer_costs import LayerCosts, LayerSettings, Place
from lightning_mimo.planning.rank_step import balance_experts
from lightning_mimo.upstream.torch import _disable_current_modes, tree_map

LONGEST = 10.0
"""Seconds that one layer may take forward and backward; others are priced, so that a plan is not kept waiting."""
_BUDGET = 0.6  # seconds for one layer, unless a single run takes longer
_ROUNDS = 20
_FEW, _MORE = 1, 4  # samples of a microbatch that are timed


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """How a module calls its first layer.

    Attributes:
        args: positional arguments; tensors on the CPU, empty ones on the meta device for those that were fake.
        kwargs: keyword arguments, likewise.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class TimedLayerCosts:
    """Costs of layers with the seconds that they take on this machine's device.

    One layer is timed with one sample and with four; other numbers of samples follow from these two.

    Attributes:
        priced: module -> why layers of it were not timed.
        timed: number of layers that were timed.
    """

    def __init__(
        self, layer_costs: LayerCosts, *, device: torch.device, flops: float, dtype_policy: DtypePolicy
    ) -> None:
        """
        Args:
            layer_costs: everything else that layers cost.
            device: of this machine.
            flops: FLOP/s of its matrix products. Layers that would take too long with these are not tried.
            dtype_policy: dtypes of the run.
        """
        self.priced: dict[str, str] = {}
        self.timed = 0
        self._flops = flops
        self._layer_costs, self._timer, self._dtype_policy = layer_costs, _LayerTimer(device), dtype_policy
        self._known: dict[LayerSettings, PassSeconds | None] = {}

    def __call__(self, settings: LayerSettings) -> ModuleCosts:
        """As :meth:`LayerCosts.__call__`."""
        costs = self._layer_costs(settings)
        if not costs.num_layers:
            self.priced[settings.module] = "the module has no TransformerConfig of several layers"
            return costs
        few, more = (self._seconds(replace(settings, samples=samples)) for samples in (_FEW, _MORE))
        if few is None or more is None:
            return costs
        times = (settings.samples - _FEW) / (_MORE - _FEW)
        return replace(costs, layer=replace(costs.layer, seconds=few.towards(more, times)))

    def _seconds(self, settings: LayerSettings) -> PassSeconds | None:
        if settings.module in self.priced:
            return None
        if settings not in self._known:
            self._known[settings] = self._measure(settings)
        return self._known[settings]

    def _measure(self, settings: LayerSettings) -> PassSeconds | None:
        work = self._layer_costs(settings).layer.work
        if (expected := (work.forward.flops + work.backward.flops) / self._flops) > LONGEST:
            what = f"{settings.samples} samples, tp={settings.tp}"
            self.priced[settings.module] = f"one would take about {expected:.0f} s here ({what})"
            return None
        place, name = self._layer_costs.place(settings), settings.module
        calls: list[LayerCall] = []
        self._layer_costs.run(place, settings, depth=1, watch=partial(_note_first_call, calls, name))
        if not calls:
            self.priced[name] = "they are none of megatron-core's TransformerLayer"
            return None
        configure = with_layers(place.configure, place.layout, {name: 1})
        try:
            seconds = self._timer(replace(place, configure=configure), name, calls[0], self._dtype_policy)
        except torch.OutOfMemoryError:
            self.priced[name] = f"one does not fit the memory of this machine ({settings.samples} samples)"
            return None
        except _TooSlowError as error:
            self.priced[name] = (
                f"one takes {error.seconds:.0f} s forward ({settings.samples} samples, tp={settings.tp})"
            )
            return None
        self.timed += 1
        return seconds


def _note_first_call(calls: list[LayerCall], module: str, model: RaggedMimoModel) -> None:
    """Note how a module calls its first layer when the model runs."""

    def note(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with _disable_current_modes():
            calls.append(LayerCall(args=_each_tensor(args, _on_meta), kwargs=_each_tensor(kwargs, _on_meta)))

    layer = first_layer(model, module)
    if layer is not None:
        layer.register_forward_pre_hook(note, with_kwargs=True)


def first_layer(model: RaggedMimoModel, module: str) -> torch.nn.Module | None:
    """The first transformer layer of a module on this rank, or ``None`` if there is none of megatron-core's kind."""
    if module != LANGUAGE and module not in model.modality_submodules:
        return None
    inside, _ = module_and_name(model, module)
    return next((each for each in inside.modules() if isinstance(each, TransformerLayer)), None)


class _LayerTimer:
    """Times layers on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, place: Place, module: str, call: LayerCall, policy: DtypePolicy) -> PassSeconds:
        """Seconds of a module's first layer. torch.distributed must not be initialized in this process.

        Raises:
            _TooSlowError: if it takes more than :data:`LONGEST`.
            torch.OutOfMemoryError: if it does not fit the device.
        """
        with as_rank(place.layout, place.rank, device=self._device) as infra:
            model = build_on_meta(place.configure, infra, policy)
            balance_experts(model)
            layer = first_layer(model, module)
            assert layer is not None, "its call has been noted"
            return self._timed(_materialized(layer, self._device), call, policy)

    def _timed(self, layer: torch.nn.Module, call: LayerCall, policy: DtypePolicy) -> PassSeconds:
        layer.train()
        for parameter in layer.parameters():
            _accumulate_as_ddp(parameter, torch.float32 if policy.mixed else parameter.dtype)
        best: PassSeconds | None = None
        end = time.perf_counter() + _BUDGET
        for number in range(_ROUNDS):
            args, kwargs = (_each_tensor(each, self._real) for each in (call.args, call.kwargs))
            seconds = self._run(layer, args, kwargs)
            if number:  # the first run fills caches and chooses kernels
                best = seconds if best is None else best.least(seconds)
            if best is not None and time.perf_counter() > end:
                break
        assert best is not None, "there are several rounds"
        return best

    def _run(self, layer: torch.nn.Module, args: Any, kwargs: Any) -> PassSeconds:
        begin = self._now()
        output = layer(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        middle = self._now()
        if middle - begin > LONGEST / 3:
            raise _TooSlowError(middle - begin)
        gradient = torch.ones_like(hidden)
        between = self._now()
        hidden.backward(gradient)
        return PassSeconds(forward=middle - begin, backward=self._now() - between)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _real(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "meta":
            return tensor.to(self._device)
        made = _filled(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device))
        return made.requires_grad_(tensor.requires_grad)


class _TooSlowError(Exception):
    """A layer takes too long.

    Attributes:
        seconds: of its forward pass.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


def _materialized(layer: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The layer with memory of its own; weights are small random numbers."""
    requires_grad = [parameter.requires_grad for parameter in layer.parameters()]
    layer.to_empty(device=device)
    for tensor in (*layer.parameters(), *layer.buffers()):
        _filled(tensor.data)
    for parameter, trained in zip(layer.parameters(), requires_grad, strict=True):
        parameter.requires_grad_(trained)
    return layer


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.uniform_(-0.02, 0.02) if tensor.is_floating_point() else tensor.zero_()


def _accumulate_as_ddp(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    """Add gradients to a buffer as soon as they are there, as Megatron's DistributedDataParallel does."""
    if not parameter.requires_grad:
        return
    buffer = torch.zeros_like(parameter, dtype=dtype)

    def add(trained: torch.Tensor) -> None:
        assert trained.grad is not None
        buffer.add_(trained.grad)
        trained.grad = None

    parameter.register_post_accumulate_grad_hook(add)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Whole numbers that are known stay; of everything else only shape and dtype."""
    if type(tensor) is torch.Tensor and not tensor.is_floating_point() and tensor.device.type != "meta":
        return tensor.detach().clone()
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return empty.requires_grad_(tensor.requires_grad)


def _each_tensor(values: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Values with their tensors changed, also those in dataclasses, such as megatron-core's PackedSeqParams."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if is_dataclass(value) and not isinstance(value, type):
            changed = copy.copy(value)
            for field in fields(value):
                with suppress(AttributeError):  # fields that the class computes
                    setattr(changed, field.name, _each_tensor(getattr(value, field.name), change))
            return changed
        return value

    return tree_map(one, values)
