"""The oracle: one process, sample by sample, autograd, torch's AdamW, float64.

It shares nothing with what is tested but the layers and the samples: no DataLoader, no batches, no padding, no bridge,
no schedule, no DDP, no optimizer of Megatron's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo import MimoModelInfra, ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.gradient_flow import freeze
from lightning_mimo.initialization import global_named_parameters
from lightning_mimo.layout import MimoLayout
from lightning_mimo.model import SampleAlignedMimoModel, build_mimo_model, module_and_name
from lightning_mimo.parallelism import LANGUAGE
from lightning_mimo.random_state import seed_megatron
from tests.multiprocess.parity.model import (
    BETAS,
    CLIP,
    EPSILON,
    IMAGE,
    LR,
    WEIGHT_DECAY,
    Model,
    ParityModule,
    PicturesSoundsAndText,
    Samples,
)

SEED = 7

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained on what; no layout changes it.

    Attributes:
        model: the model.
        samples: the samples.
        batch: samples in a global batch.
        accumulate: batches to an optimizer step.
        steps: optimizer steps.
        dtype: of weights and activations.
    """

    model: Model = field(default_factory=Model)
    samples: Samples = field(default_factory=Samples)
    batch: int = 12
    accumulate: int = 1
    steps: int = 2
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a task must come to.

    Attributes:
        losses: of every batch.
        norms: gradient norm of every step, before clipping.
        initial: weights before the first step, by global name.
        gradients: for every step, before clipping, by global name; trained parameters only.
        final: weights after the last step.
    """

    losses: list[float]
    norms: list[float]
    initial: Tensors
    gradients: list[Tensors]
    final: Tensors


def windows(task: Task) -> Iterator[list[list[int]]]:
    """Samples of the batches of every optimizer step, epoch after epoch; the last window of an epoch may be short."""
    indices = range(task.samples.number)
    batches = [list(indices[i : i + task.batch]) for i in range(0, len(indices), task.batch)]
    while True:
        for i in range(0, len(batches), task.accumulate):
            yield batches[i : i + task.accumulate]


def truth(task: Task) -> Truth:
    """Train a task in this one process, whose world must have one rank."""
    names = ["images", *(["audio"] if task.model.audio else []), LANGUAGE]
    layout = MimoLayout.resolve({name: ModuleParallelism() for name in names}, world_size=1, colocate=True)
    with megatron_on_cpu():
        infra = MimoModelInfra.build(layout)
        seed_megatron(layout, 0, seed=SEED)
        model = build_mimo_model(ParityModule(task.model).configure_mimo(infra), infra, seed=SEED)
        freeze(model, infra, task.model.frozen)
        _to_dtype(model, task.dtype)
        result = _train(task, model, dict(_named_parameters(model, infra)))
        infra.destroy()
    return result


def _train(task: Task, model: SampleAlignedMimoModel, parameters: Mapping[str, torch.nn.Parameter]) -> Truth:
    dataset = PicturesSoundsAndText(task.samples)
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=BETAS,
        eps=EPSILON,
    )
    initial = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses, norms, gradients = [], [], []
    for _, window in zip(range(task.steps), windows(task), strict=False):
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        tokens = sum(float(dataset[index]["loss_mask"].sum()) for batch in window for index in batch)
        for batch in window:
            batch_loss, batch_tokens = 0.0, 0.0
            for index in batch:
                loss = sample_loss(model, dataset[index], task.dtype)
                if loss.requires_grad:
                    loss.backward()
                batch_loss += float(loss)
                batch_tokens += float(dataset[index]["loss_mask"].sum())
            losses.append(batch_loss / max(batch_tokens, 1.0))
        for parameter in trained.values():
            parameter.grad /= max(tokens, 1.0)
        gradients.append({name: parameter.grad.clone() for name, parameter in trained.items()})
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), task.model.clip_grad)))
        optimizer.step()
    return Truth(
        losses=losses,
        norms=norms,
        initial=initial,
        gradients=gradients,
        final={name: parameter.detach().clone() for name, parameter in parameters.items()},
    )


def sample_loss(model: SampleAlignedMimoModel, sample: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Sum of the token losses of one sample."""
    ids = sample["input_ids"]
    language = model.language_model
    embedded = language.embedding.word_embeddings(torch.where(ids < 4, 0, ids)[None])[0]
    for module, token in (("images", IMAGE), ("audio", CLIP)):
        places = (ids == token).nonzero().flatten()
        if len(places):
            inputs = sample["modality_inputs"][module]
            rows = model.modality_submodules[module](encoder_inputs=_to(inputs, dtype))
            embedded = embedded.index_copy(0, places, rows)
    logits = language(input_ids=None, position_ids=None, attention_mask=None, decoder_input=embedded[:, None])[0]
    losses = torch.nn.functional.cross_entropy(logits, sample["labels"], reduction="none")
    return (losses * sample["loss_mask"].to(dtype)).sum()


def _to(inputs: Mapping[str, Mapping[str, torch.Tensor]], dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    return {
        encoder: {name: value.to(dtype) if value.is_floating_point() else value for name, value in arguments.items()}
        for encoder, arguments in inputs.items()
    }


def _to_dtype(model: SampleAlignedMimoModel, dtype: torch.dtype) -> None:
    for part in model.modules():
        config = getattr(part, "config", None)
        if isinstance(config, TransformerConfig):
            config.params_dtype = dtype
            config.moe_router_dtype = "fp64" if config.num_moe_experts and dtype == torch.float64 else None
    model.to(dtype)


def _named_parameters(model: SampleAlignedMimoModel, infra: MimoModelInfra) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name in infra.participating_modules:
        module, prefix = module_and_name(model, name)
        yield from global_named_parameters(module, prefix=prefix, groups=infra.pg_collections[name])
