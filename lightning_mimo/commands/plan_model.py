"""The model of a config as the planner needs it: what it supports, what it costs, and which keys change that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from megatron.core.models.mimo import MimoModelConfig

from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE, ModuleParallelism, ResolvedParallelism
from lightning_mimo.planning.candidate import Candidate, Model, Variant
from lightning_mimo.planning.degrees import degrees_of
from lightning_mimo.planning.depths import transformer_of
from lightning_mimo.planning.example_sample import ExampleSample, example_sample
from lightning_mimo.planning.fake_world import as_rank
from lightning_mimo.planning.hardware import Hardware
from lightning_mimo.planning.layer_costs import LayerCosts
from lightning_mimo.planning.model_costs import ModelCosts
from lightning_mimo.planning.samples import longest_sample, look_at
from lightning_mimo.planning.search import Space
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.program import step_settings, training_program
from lightning_mimo.strategy.strategy import MimoStrategy

ModuleWith = Callable[[Mapping[str, Any]], MimoModule]
"""Makes the module of the config, with other values for some keys below ``model.init_args``."""


@dataclass(frozen=True, kw_only=True)
class ModelKeys:
    """Keys of a config below ``model.init_args`` that change what layers cost.

    Attributes:
        recompute: of recomputation, one for each transformer.
        sequence_parallel: of sequence parallelism.
    """

    recompute: tuple[str, ...]
    sequence_parallel: tuple[str, ...]


def keys_in(arguments: Any) -> ModelKeys:
    """Find the keys among the arguments of a model: its own, and those of every TransformerSize."""
    found = list(_keys(arguments, ""))
    return ModelKeys(
        recompute=tuple(key for key in found if key.rpartition(".")[2] == "recompute"),
        sequence_parallel=tuple(key for key in found if key == "sequence_parallel"),
    )


def _keys(value: Any, path: str) -> Iterator[str]:
    entries = vars(value) if isinstance(value, Namespace) else value
    if not isinstance(entries, MutableMapping):
        return
    for key, each in entries.items():
        place = f"{path}.{key}" if path else str(key)
        if key in ("recompute", "sequence_parallel"):
            yield place
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
    """

    def __init__(
        self,
        module_with: ModuleWith,
        trainer: pl.Trainer,
        keys: ModelKeys,
        *,
        data: Callable[[], Sequence[Any]] | None = None,
    ) -> None:
        """
        Args:
            module_with: makes the module.
            trainer: trainer with a MimoStrategy.
            keys: keys of the config.
            data: returns samples of the training data, the largest of which is planned for; ``None`` plans for the
                longest sample that the model describes.

        Raises:
            ConfigError: if the shapes of a sample are unknown.
        """
        strategy = trainer.strategy
        assert isinstance(strategy, MimoStrategy), "MimoCLI refuses any other"
        self._strategy, self.keys = strategy, keys
        self._ddp = tuple(strategy.ddp_by_module.values())
        # Costs are those of a whole optimizer, which a distributed one divides by the replicas of a layout.
        strategy.ddp = None
        ranks = strategy.num_nodes * strategy.num_processes
        self.padded = frozenset({LANGUAGE}) if strategy.pack_to is None else frozenset[str]()
        self.layout = MimoLayout.resolve(strategy.modules, world_size=ranks, colocate=strategy.colocate)
        self.modules = tuple(self.layout.modules)
        self.dtype = str(strategy.precision_plugin.dtype_policy.dtype).removeprefix("torch.")
        full = Namespace(granularity="full", method="uniform", num_layers=1, modules=("core_attn",))
        parallel = dict.fromkeys(keys.sequence_parallel, True)
        given = self._describe(module_with({}))
        with_recompute = self._describe(module_with({**dict.fromkeys(keys.recompute, full), **parallel}))
        self._module = module_with({**dict.fromkeys(keys.recompute, None), **parallel})
        without = self._describe(self._module)
        self._recomputable = frozenset(
            name for name in self.modules if _recomputes(with_recompute, name) and not _recomputes(without, name)
        )
        self._given_recomputes = any(_recomputes(given, name) for name in self._recomputable)
        self._open = ExitStack()
        self._program = self._open.enter_context(training_program(self._module, trainer))
        self._is_of_data = data is not None
        self._example = self._longest(without) if data is None else _largest(data(), without)
        self._degrees: dict[tuple[int, int], dict[str, Any]] = {}

    def _describe(self, module: MimoModule) -> MimoModelConfig:
        """The model in one process."""
        layout = MimoLayout.resolve(
            {name: ModuleParallelism(dp=1) for name in self.modules}, world_size=1, colocate=True
        )
        module.check_layout(layout)
        with as_rank(layout, 0) as infra:
            return module.configure_mimo(infra)

    def _longest(self, config: MimoModelConfig) -> ExampleSample:
        found = example_sample(config)
        if isinstance(found, ExampleSample):
            return found
        # The description does not tell what the encoders take, but they may.
        sample = longest_sample(step_settings(self._strategy, self.layout), self._program)
        if isinstance(sample, str):
            raise ConfigError(
                f"plan cannot tell the shapes of a sample from the model: {sample}. --sample=data takes the largest "
                f"sample of the training data."
            )
        return ExampleSample(sample=sample, tokens=len(sample["input_ids"]))

    @cached_property
    def model(self) -> Model:
        """Costs and batches."""
        layer_costs = LayerCosts(
            self._program,
            self._example.sample,
            modules=self.modules,
            dtype_policy=self._strategy.precision_plugin.dtype_policy,
        )
        costs = ModelCosts(layer_costs, recomputable=self._recomputable)
        variant, whole = Variant(recompute=False, sequence_parallel=False), ResolvedParallelism(dp=1, rank_offset=0)
        measured = {name: costs(name, whole, variant, 1) for name in self.modules}
        return Model(
            costs=costs,
            global_batch_size=self._strategy.global_batch_size,
            tokens=self._example.tokens,
            dtype=self.dtype,
            trains={n: any(part.gradients for part in (c.layer, c.first, c.last)) for n, c in measured.items()},
        )

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
        recompute = (False, True) if self._recomputable else (False,)
        return Space(
            degrees=self.degrees(world_size=gpus, largest_tp=min(8, hardware.devices_per_node)),
            variants=tuple(Variant(recompute=each, sequence_parallel=self._is_parallel) for each in recompute),
            distributed_optimizer=(True, False) if may_distribute else (False,),
            overlap=any(each.overlap_grad_reduce for each in self._ddp),
        )

    @property
    def says(self) -> str:
        """Where the sample is from, if it is not the longest one that the model describes."""
        return " as in the largest sample of the data" if self._is_of_data else ""

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
            variant=Variant(recompute=self._given_recomputes, sequence_parallel=self._is_parallel),
        )


def _recomputes(config: MimoModelConfig, name: str) -> bool:
    transformer = transformer_of(config, name)
    return transformer is not None and transformer.recompute_granularity == "full"


def _largest(samples: Sequence[Any], config: MimoModelConfig) -> ExampleSample:
    if not samples:
        raise ConfigError("--sample=data: the training data is empty.")
    _, sample = look_at(samples, config.special_token_ids)
    return ExampleSample(sample=sample, tokens=len(sample["input_ids"]))
