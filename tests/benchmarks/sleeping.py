"""A MimoModel whose compute is sleep: ranks truly overlap, however few cores there are, and nothing else is measured.

Every module sleeps a given time for each sample, divided by its tensor- and pipeline-parallel size, forward and
backward. Parameters are a few numbers, activations are as wide as asked for.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.data import Dataset

from lightning_mimo import MimoModelInfra, MimoModule
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.models.patches import PipelinedSubmodules

VOCABULARY, FIRST_PLACEHOLDER = 16, 8
_LATE = 0.0002  # seconds; the busiest rank spends less than a hundredth of its time on it


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds that a whole module takes for one sample.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass.
    """

    forward: float
    backward: float


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.seconds = backward
        _sleep_exactly(forward)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        _sleep_exactly(ctx.seconds)
        return gradient, None, None


def _sleep_exactly(seconds: float) -> None:
    """``time.sleep`` wakes up late; the last of it is spent awake."""
    end = time.perf_counter() + seconds
    time.sleep(max(0.0, seconds - _LATE))
    while time.perf_counter() < end:
        pass


class SleepingEncoder(torch.nn.Module):
    """One pipeline stage of an encoder that makes some tokens of every item."""

    def __init__(
        self,
        cost: Cost,
        tokens: int,
        width: int,
        groups: Any,
        weights: int = 0,
        uneven: Sequence[float] = (1.0,),
        by_item: bool = False,
    ) -> None:
        super().__init__()
        self._by_item = by_item
        share = _share(cost, groups)
        self._costs = itertools.cycle(Cost(forward=share.forward * f, backward=share.backward * f) for f in uneven)
        self._tokens = tokens
        self._first, self._last = groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
        # By stage: no two stages may hold a parameter of the same name.
        self.scale = torch.nn.ParameterDict({f"stage{groups.pp.rank()}": torch.ones(width)})
        self.ballast = _ballast(weights, groups)

    def forward(self, input: torch.Tensor | None = None, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """``[n, 1]`` or, from the stage before, ``[tokens, n, width]`` -> the latter, or ``[n, tokens, width]``."""
        samples = float(input.sum()) if self._by_item else 0.0
        if self._first:
            hidden_states = input.expand(self._tokens, *input.shape)
        scale = _scale(self.scale, self.ballast)
        hidden_states = _sleep(hidden_states * scale, next(self._costs), samples=samples or hidden_states.size(1))
        return hidden_states.transpose(0, 1).contiguous() if self._last else hidden_states


class PipelinedSleepers(PipelinedSubmodules, VisionModalitySubmodules):
    """Modality of a SleepingEncoder over pipeline stages."""


class SleepingLanguage(MegatronModule):
    """One pipeline stage of a language module: embedding, sleep, vocabulary-parallel head."""

    share_embeddings_and_output_weights = False

    def __init__(self, config: TransformerConfig, cost: Cost, groups: Any, weights: int = 0) -> None:
        super().__init__(config=config)
        stage, last = groups.pp.rank(), groups.pp.size() - 1
        self.pre_process, self.post_process = stage == 0, stage == last
        self._cost = _share(cost, groups)
        self.work: float | None = None  # of the next microbatch, in samples; None counts these
        self._input: torch.Tensor | None = None
        self.scale = torch.nn.ParameterDict({f"stage{stage}": torch.ones(config.hidden_size)})
        self.ballast = _ballast(weights, groups)
        self.embedding = _Embedding(config.hidden_size) if self.pre_process else None
        self.head = None
        if self.post_process:
            self.head = ColumnParallelLinear(
                config.hidden_size,
                VOCABULARY,
                config=config,
                init_method=config.init_method,
                bias=False,
                tp_group=groups.tp,
            )

    def set_input_tensor(self, tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """What the stage before sent."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        decoder_input: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """``[s, b, width]``, or logits ``[b, s, vocabulary / tp]`` on the last stage."""
        hidden = decoder_input if self.embedding is not None else self._input
        scale = _scale(self.scale, self.ballast)
        hidden = _sleep(hidden * scale, self._cost, samples=hidden.size(1) if self.work is None else self.work)
        return hidden if self.head is None else self.head(hidden)[0].transpose(0, 1).contiguous()


class _Embedding(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(VOCABULARY, width)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        return self.words(input_ids).transpose(0, 1).contiguous()


class SleepingModule(MimoModule):
    """Trains a model of sleeping modules."""

    def __init__(
        self,
        costs: Mapping[str, Cost],
        *,
        tokens: int = 4,
        width: int = 16,
        weights: Mapping[str, int] | None = None,
        optimizer: str = "sgd",
        uneven: Sequence[float] = (1.0,),
        work: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            costs: of every module, ``language`` last.
            tokens: embeddings of one item, of every encoder.
            width: hidden size of everything.
            weights: module name -> parameters that it has for their memory only, over all its ranks.
            optimizer: Megatron's name of it.
            uneven: how much longer encoders take for one microbatch and the next, over and over.
            work: float64 ``[samples]``, how much longer the language module takes for each; encoders then take as much
                longer as their items say. The modules have one stage.
        """
        super().__init__(pad_token_id=0)
        self._work = work
        self._weights, self._optimizer, self._uneven = dict(weights or {}), optimizer, tuple(uneven)
        self._costs, self._tokens, self._width = dict(costs), tokens, width

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        language = infra.pg_collections.get(LANGUAGE)
        sizes = infra.layout.modules[LANGUAGE]
        config = TransformerConfig(
            num_layers=sizes.pp,
            hidden_size=self._width,
            num_attention_heads=sizes.tp,
            tensor_model_parallel_size=sizes.tp,
            pipeline_model_parallel_size=sizes.pp,
            pipeline_dtype=torch.float32,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
        encoders = [name for name in self._costs if name != LANGUAGE]
        return MimoModelConfig(
            language_model_spec=ModuleSpec(
                module=SleepingLanguage,
                params={
                    "config": config,
                    "cost": self._costs[LANGUAGE],
                    "groups": language,
                    "weights": self._weights.get(LANGUAGE, 0),
                },
            ),
            modality_submodules_spec={name: self._encoder(infra, name) for name in encoders},
            special_token_ids={name: FIRST_PLACEHOLDER + i for i, name in enumerate(encoders)},
        )

    def training_step(self, batch: Microbatch, batch_idx: int) -> Any:
        language = self.mimo_model.language_model
        if self._work is not None and language is not None:
            unwrapped = getattr(language, "module", language)
            unwrapped.work = float(self._work[list(batch["sample_indices"])].sum())
        return self(batch)

    def configure_optimizers(self):
        return self.build_optimizer(OptimizerConfig(optimizer=self._optimizer, lr=1e-3))

    def _encoder(self, infra: MimoModelInfra, name: str) -> ModuleSpec:
        groups = infra.pg_collections.get(name)
        params = {
            "cost": self._costs[name],
            "tokens": self._tokens,
            "width": self._width,
            "groups": groups,
            "weights": self._weights.get(name, 0),
            "uneven": self._uneven,
            "by_item": self._work is not None,
        }
        return ModuleSpec(
            module=PipelinedSleepers,
            params={"pg_collection": groups},
            submodules={"encoders": {"encoder": ModuleSpec(module=SleepingEncoder, params=params)}},
        )


class SleepingData(Dataset):
    """Samples of one item for each encoder, and a question after them."""

    def __init__(self, encoders: list[str], *, tokens: int = 4, length: int = 1 << 20) -> None:
        self._encoders, self._length = encoders, length
        placeholders = [FIRST_PLACEHOLDER + i for i in range(len(encoders)) for _ in range(tokens)]
        self._input_ids = torch.tensor([*placeholders, 1, 2])
        self._mask = torch.zeros(len(self._input_ids), dtype=torch.long)
        self._mask[-1] = 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.load(index, frozenset(self._encoders))

    def load(self, index: int, modules: frozenset[str]) -> dict[str, Any]:
        inputs = {
            name: {"encoder": {"input": torch.full((1, 1), 1.0 + index % 7)}}
            for name in self._encoders
            if name in modules
        }
        labels = torch.full_like(self._input_ids, index % 7)
        return {"input_ids": self._input_ids, "labels": labels, "loss_mask": self._mask, "modality_inputs": inputs}


def _ballast(weights: int, groups: Any) -> torch.nn.ParameterDict:
    """This rank's share of parameters that are there for their memory: they get gradients, of zero."""
    ballast = torch.nn.ParameterDict()
    if weights:
        share = torch.nn.Parameter(torch.zeros(weights // (groups.tp.size() * groups.pp.size())))
        share.tensor_model_parallel, share.partition_dim, share.partition_stride = True, 0, 1
        ballast[f"stage{groups.pp.rank()}"] = share
    return ballast


def _scale(scale: torch.nn.ParameterDict, ballast: torch.nn.ParameterDict) -> torch.Tensor:
    (values,) = scale.values()
    for share in ballast.values():
        values = values + 0 * share[0]
    return values


def _share(cost: Cost, groups: Any) -> Cost:
    ranks = groups.tp.size() * groups.pp.size()
    return Cost(forward=cost.forward / ranks, backward=cost.backward / ranks)


def _sleep(tensor: torch.Tensor, cost: Cost, *, samples: float) -> torch.Tensor:
    if cost.forward == cost.backward == 0:
        return tensor
    return _Sleep.apply(tensor, cost.forward * samples, cost.backward * samples)
