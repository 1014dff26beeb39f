"""The model of a config as the planner needs it: what it supports, what it costs, and which keys change that."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from megatron.core.models.mimo import MimoModelConfig

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE, ModuleParallelism, ResolvedParallelism
from lightning_mimo.planning.candidate import Candidate, Model, Variant
from lightning_mimo.planning.degrees import degrees_of, stage_layers
from lightning_mimo.planning.depths import transformer_of
from lightning_mimo.planning.example_sample import ExampleSample, example_sample
from lightning_mimo.planning.fake_world import as_rank
from lightning_mimo.planning.gpu_kernels import DeviceType
from lightning_mimo.planning.hardware import Hardware
from lightning_mimo.planning.layer_costs import LayerCosts
from lightning_mimo.planning.layer_times import TimedLayerCosts
from lightning_mimo.planning.model_costs import ModelCosts
from lightning_mimo.planning.samples import SampleSizes, longest_sample, look_at
from lightning_mimo.planning.search import Space
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.program import step_settings, training_program
from lightning_mimo.strategy.strategy import MimoStrategy

_LARGEST_TP = 64
_KEYS = ("recompute", "sequence_parallel", "first_stage_layers", "last_stage_layers")

ModuleWith = Callable[[Mapping[str, Any]], MimoModule]
"""Makes the module of the config, with other values for some keys below ``model.init_args``."""


@dataclass(frozen=True, kw_only=True)
class ModelKeys:
    """Keys of a config below ``model.init_args`` that change what layers cost.

    Attributes:
        recompute: of recomputation, one for each transformer; see :attr:`PlannedModel.recompute_keys`.
        sequence_parallel: of sequence parallelism.
        stage_layers: of layers of the first and the last pipeline stage, where the config gives any. They are for its
            own pp; a plan divides layers evenly, or as the model does by itself.
    """

    recompute: tuple[str, ...]
    sequence_parallel: tuple[str, ...]
    stage_layers: tuple[str, ...] = ()


def keys_in(arguments: Any) -> ModelKeys:
    """Find the keys among the arguments of a model: its own, and those of every TransformerSize."""
    found = dict(_keys(arguments, ""))
    return ModelKeys(
        recompute=tuple(key for key in found if key.rpartition(".")[2] == "recompute"),
        sequence_parallel=tuple(key for key in found if key == "sequence_parallel"),
        stage_layers=tuple(key for key, value in found.items() if key.endswith("_stage_layers") and value is not None),
    )


def _keys(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Keys and their values."""
    entries = vars(value) if isinstance(value, Namespace) else value
    if not isinstance(entries, MutableMapping):
        return
    for key, each in entries.items():
        place = f"{path}.{key}" if path else str(key)
        if key in _KEYS:
            yield place, each
        else:
            yield from _keys(each, place)


def set_keys(arguments: Any, values: Mapping[str, Any]) -> None:
    """Set keys of a model's arguments in place."""
    for key, value in values.items():
        into, *rest = arguments, *key.split(".")
        for part in rest[:-1]:
            into = into[part]
        into[rest[-1]] = value


class PlannedModel:
    """A user's model. Its costs are measured on fake tensors when they are asked for.

    Attributes:
        modules: module names, in the order of their ranks.
        dtype: of the matrix products.
        keys: keys of the config that a plan sets.
        layout: layout of the config.
        padded: modules whose samples are padded to the longest of a microbatch.
        recompute_keys: module -> keys of the config that switch its recomputation, below ``model.init_args``.
        sizes: of the samples of the training data; ``None`` if the sample that is planned for is not one of them.
    """

    def __init__(
        self,
        module_with: ModuleWith,
        trainer: pl.Trainer,
        keys: ModelKeys,
        *,
        device_type: DeviceType = "cuda",
        data: Callable[[], Sequence[Any]] | None = None,
    ) -> None:
        """
        Args:
            module_with: makes the module.
            trainer: trainer with a MimoStrategy.
            keys: keys of the config.
            device_type: of the devices that are planned for.
            data: returns samples of the training data, the largest of which is planned for; ``None`` plans for the
                longest sample that the model describes.

        Raises:
            ConfigError: if the shapes of a sample are unknown.
        """
        strategy = trainer.strategy
        assert isinstance(strategy, MimoStrategy), "MimoCLI refuses any other"
        self._strategy, self.keys, self._device_type = strategy, keys, device_type
        self._time_layers: Callable[[LayerCosts], TimedLayerCosts] | None = None
        self._timed: TimedLayerCosts | None = None
        self._ddp = tuple(strategy.ddp_by_module.values())
        # Costs are those of a whole optimizer, which a distributed one divides by the replicas of a layout.
        strategy.ddp = None
        ranks = strategy.num_nodes * strategy.num_processes
        self.padded = frozenset({LANGUAGE}) if strategy.pack_to is None else frozenset[str]()
        self.layout = MimoLayout.resolve(strategy.modules, world_size=ranks, colocate=strategy.colocate)
        self.modules = tuple(self.layout.modules)
        self.dtype = str(strategy.precision_plugin.dtype_policy.dtype).removeprefix("torch.")
        parallel = dict.fromkeys(keys.sequence_parallel, True)
        self._given_module = module_with({})
        given = self._describe(module_with(dict.fromkeys(keys.stage_layers)))
        self.recompute_keys = self._find_recompute_keys(module_with, parallel)
        self._given = frozenset(name for name in self.recompute_keys if _recomputes(given, name))
        self._module = module_with({**dict.fromkeys(keys.recompute, None), **parallel})
        without = self._describe(self._module)
        self._open = ExitStack()
        self._program = self._open.enter_context(training_program(self._module, trainer))
        self.sizes: SampleSizes | None = None
        try:
            if data is None:
                self._example = self._longest(without)
            else:
                self.sizes, self._example = _largest(data(), without)
        except BaseException:
            self.close()
            raise
        self._degrees: dict[tuple[int, int], dict[str, Any]] = {}

    def time_layers(self, device: torch.device, *, flops: float) -> None:
        """Time layers instead of pricing them; before :attr:`model` is asked for.

        Args:
            device: of this machine.
            flops: FLOP/s of its matrix products.
        """
        policy = self._strategy.precision_plugin.dtype_policy
        self._time_layers = partial(TimedLayerCosts, device=device, flops=flops, dtype_policy=policy)

    def close(self) -> None:
        """Detach the module from the trainer."""
        self._open.close()

    def _describe(self, module: MimoModule) -> MimoModelConfig:
        """The model in one process."""
        layout = MimoLayout.resolve(
            {name: ModuleParallelism(dp=1) for name in self.modules}, world_size=1, colocate=True
        )
        module.check_layout(layout)
        with as_rank(layout, 0) as infra:
            return module.configure_mimo(infra)

    def _find_recompute_keys(
        self, module_with: ModuleWith, parallel: Mapping[str, bool]
    ) -> Mapping[str, tuple[str, ...]]:
        """Modules that are recomputed if a key alone is set, and not if none is."""
        full = Namespace(granularity="full", method="uniform", num_layers=1, modules=("core_attn",))
        none = dict.fromkeys(self.keys.recompute, None)
        without = self._describe(module_with({**none, **parallel}))
        found: dict[str, tuple[str, ...]] = {}
        for key in self.keys.recompute:
            config = self._describe(module_with({**none, key: full, **parallel}))
            for name in self.modules:
                if _recomputes(config, name) and not _recomputes(without, name):
                    found[name] = (*found.get(name, ()), key)
        return found

    def _longest(self, config: MimoModelConfig) -> ExampleSample:
        found = example_sample(config)
        if isinstance(found, ExampleSample):
            return found
        # The description does not tell what the encoders take, but they may.
        sample = longest_sample(step_settings(self._strategy, self.layout, self._device_type), self._program)
        if isinstance(sample, str):
            raise ConfigError(
                f"plan cannot tell the shapes of a sample from the model: {sample}. --sample=data takes the largest "
                f"sample of the training data."
            )
        return ExampleSample(sample=sample, tokens=len(sample["input_ids"]))

    @cached_property
    def model(self) -> Model:
        """Costs and batches."""
        policy = self._strategy.precision_plugin.dtype_policy
        layer_costs = LayerCosts(
            self._program,
            self._example.sample,
            modules=self.modules,
            dtype_policy=policy,
            device_type=self._device_type,
        )
        if self._time_layers is not None:
            self._timed = self._time_layers(layer_costs)
        costs = ModelCosts(self._timed or layer_costs, recomputable=self.recompute_keys)
        variant, whole = (
            Variant(recompute=frozenset(), sequence_parallel=False),
            ResolvedParallelism(dp=1, rank_offset=0),
        )
        measured = {name: costs(name, whole, variant, 1) for name in self.modules}
        return Model(
            costs=costs,
            global_batch_size=self._strategy.global_batch_size,
            tokens=self._example.tokens,
            dtype=self.dtype,
            stage_layers=cache(self._stage_layers),
            trains={n: any(part.gradients for part in (c.layer, c.first, c.last)) for n, c in measured.items()},
        )

    def _stage_layers(self, name: str, pp: int) -> tuple[int, ...] | None:
        sizes = {each: pp if each == name else 1 for each in self.modules}
        return stage_layers(self._module.configure_mimo, sizes, name)

    @property
    def model_of_config(self) -> Model:
        """The same with the config's own numbers of layers of pipeline stages."""
        sizes = {name: each.pp for name, each in self.layout.modules.items()}

        @cache
        def layers(name: str, pp: int) -> tuple[int, ...] | None:
            return stage_layers(self._given_module.configure_mimo, sizes, name)

        return replace(self.model, stage_layers=layers)

    def degrees(self, *, world_size: int, largest_tp: int) -> dict[str, Any]:
        """Parallel sizes that the modules support."""
        key = world_size, largest_tp
        if key not in self._degrees:
            self._degrees[key] = degrees_of(
                self._module.configure_mimo,
                self._module.check_layout,
                self.modules,
                world_size=world_size,
                largest_tp=largest_tp,
            )
        return self._degrees[key]

    def space(self, gpus: int, hardware: Hardware) -> Space:
        """What a search may choose from."""
        may_distribute = self.dtype == "float32" or self._strategy.precision_plugin.dtype_policy.mixed
        groups = switched_together(self.recompute_keys)
        recompute = [
            frozenset[str]().union(*chosen)
            for number in range(len(groups) + 1)
            for chosen in itertools.combinations(groups, number)
        ]
        return Space(
            degrees=self.degrees(world_size=gpus, largest_tp=min(_LARGEST_TP, 2 * hardware.devices_per_node)),
            variants=tuple(Variant(recompute=each, sequence_parallel=self._is_parallel) for each in recompute),
            distributed_optimizer=(True, False) if may_distribute else (False,),
            overlap=any(each.overlap_grad_reduce for each in self._ddp),
        )

    @property
    def says(self) -> str:
        """Where the sample is from, if it is not the longest one that the model describes."""
        return "" if self.sizes is None else " as in the largest sample of the data"

    @property
    def timing(self) -> list[str]:
        """Which layers were timed, in words; empty if none were to be."""
        if self._timed is None:
            return []
        timed = [name for name in self.modules if name not in self._timed.priced]
        lines = [f"  layers of {' and '.join(timed)} were timed on this machine"] if timed else []
        lines += [f"  layers of {name} were not timed: {why}" for name, why in self._timed.priced.items()]
        return lines

    @property
    def _is_parallel(self) -> bool:
        return bool(self.keys.sequence_parallel)

    def candidate_of_config(self) -> Candidate:
        """The config's own layout and settings."""
        return Candidate(
            layout=self.layout,
            num_microbatches=self._strategy.num_microbatches,
            encoder_run_ahead=self._strategy.encoder_run_ahead,
            distributed_optimizer=all(each.use_distributed_optimizer for each in self._ddp),
            overlap=all(each.overlap_grad_reduce for each in self._ddp),
            variant=Variant(recompute=self._given, sequence_parallel=self._is_parallel),
        )


def switched_together(keys: Mapping[str, Sequence[str]]) -> list[frozenset[str]]:
    """Modules in groups, those in one that a key switches together.

    Args:
        keys: module -> keys that switch it.
    """
    groups: list[frozenset[str]] = []
    for name, own in keys.items():
        same = [group for group in groups if any(set(own) & set(keys[other]) for other in group)]
        groups = [group for group in groups if group not in same] + [frozenset({name}).union(*same)]
    return groups


def _recomputes(config: MimoModelConfig, name: str) -> bool:
    transformer = transformer_of(config, name)
    return transformer is not None and transformer.recompute_granularity == "full"


def _largest(samples: Sequence[Any], config: MimoModelConfig) -> tuple[SampleSizes, ExampleSample]:
    if not samples:
        raise ConfigError("--sample=data: the training data is empty.")
    sizes, sample = look_at(samples, config.special_token_ids)
    return sizes, ExampleSample(sample=sample, tokens=len(sample["input_ids"]))
