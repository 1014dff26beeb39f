"""The oracle: one process, sample by sample, autograd, torch's AdamW; in float64, or in a user's precision.

It shares nothing with what is tested but the layers and the samples: no DataLoader, no batches, no padding, no bridge,
no schedule, no DDP, no optimizer of Megatron's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from megatron.core.transformer.moe.router import TopKRouter

from lightning_mimo import MimoModelInfra, MimoPrecision, ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.data.packing import Packing, pack_rows
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.mimo.freezing import freeze
from lightning_mimo.mimo.initialization import global_named_parameters
from lightning_mimo.mimo.model import RaggedMimoModel, build_mimo_model, module_and_name
from lightning_mimo.mimo.parameter_names import lies_under
from lightning_mimo.parallel.random import seed_megatron
from tests.parity.model import (
    BETAS,
    CLIP,
    EPSILON,
    IMAGE,
    LOSS_SCALE,
    LR,
    TEXT,
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
        batch: samples in a global batch; rows of samples, if they are packed.
        pack_to: tokens of a row, as for MimoStrategy.
        accumulate: batches to an optimizer step.
        steps: optimizer steps.
        precision: as for the Trainer.
        start: the initial weights are rounded to this dtype.
    """

    model: Model = field(default_factory=Model)
    samples: Samples = field(default_factory=Samples)
    batch: int = 12
    pack_to: int | None = None
    accumulate: int = 1
    steps: int = 2
    precision: str = "64-true"
    start: torch.dtype = torch.float64

    @property
    def dtype_policy(self) -> DtypePolicy:
        return MimoPrecision(self.precision).dtype_policy


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
    rows = [(index,) for index in range(task.samples.number)]
    if task.pack_to is not None:
        dataset = PicturesSoundsAndText(task.samples)
        lengths = np.array([dataset.length(index) for index in range(len(dataset))])
        rows = pack_rows(range(len(dataset)), Packing(budget=task.pack_to, lengths=lengths))
    batches = [list(chain.from_iterable(rows[i : i + task.batch])) for i in range(0, len(rows), task.batch)]
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
        config = ParityModule(task.model).configure_mimo(infra)
        model = build_mimo_model(config, infra, seed=SEED, dtype_policy=task.dtype_policy)
        freeze(model, infra, task.model.frozen)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(task.start).to(task.dtype_policy.dtype)
        result = _train(task, model, dict(_named_parameters(model, infra)))
        infra.destroy()
    return result


def _train(task: Task, model: RaggedMimoModel, parameters: Mapping[str, torch.nn.Parameter]) -> Truth:
    dataset = PicturesSoundsAndText(task.samples)
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    # What the optimizer updates: the parameters themselves, or float32 copies of them.
    mains = {name: p.detach().float().requires_grad_() if task.dtype_policy.mixed else p for name, p in trained.items()}
    optimizer = torch.optim.AdamW(_groups(mains, task), betas=BETAS, eps=EPSILON)
    scale = LOSS_SCALE if task.dtype_policy.needs_loss_scale else 1.0
    initial = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    losses, norms, gradients = [], [], []
    for _, window in zip(range(task.steps), windows(task), strict=False):
        for main in mains.values():
            main.grad = torch.zeros_like(main)
        tokens = sum(float(dataset[index]["loss_mask"].sum()) for batch in window for index in batch)
        for batch in window:
            batch_loss, batch_tokens = 0.0, 0.0
            for index in batch:
                with router_inputs(model) as routed:
                    loss = sample_loss(model, dataset[index], task.dtype_policy.dtype)
                balancing = sum(balancing_loss(*each) for each in routed) if task.model.balancing_loss else 0.0
                counted = float((dataset[index]["loss_mask"] > 0).sum())
                total = loss + task.model.balancing_loss * counted * balancing
                if total.requires_grad:
                    (total * scale).backward()
                if task.dtype_policy.mixed:
                    _collect(trained, mains)
                batch_loss += float(loss)
                batch_tokens += float(dataset[index]["loss_mask"].sum())
            losses.append(batch_loss / max(batch_tokens, 1.0))
        for main in mains.values():
            main.grad /= max(tokens, 1.0) * scale
        gradients.append({name: main.grad.clone() for name, main in mains.items()})
        norms.append(float(_norm(mains.values())))
        _clip(mains, task)
        optimizer.step()
        for name, main in mains.items():
            trained[name].data.copy_(main.data)
    return Truth(
        losses=losses,
        norms=norms,
        initial=initial,
        gradients=gradients,
        final={name: parameter.detach().clone() for name, parameter in parameters.items()},
    )


@contextmanager
def router_inputs(model: RaggedMimoModel) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """What goes into every router of the language model while this is open, and the router's weight."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        part.register_forward_pre_hook(lambda router, args: found.append((args[0], router.weight)))
        for part in model.language_model.modules()
        if isinstance(part, TopKRouter)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def balancing_loss(hidden: torch.Tensor, weight: torch.Tensor, *, chosen: int = 2) -> torch.Tensor:
    """Of one sequence ``[s, 1, hidden]``, by its definition."""
    probabilities = torch.softmax(hidden.squeeze(1) @ weight.t(), dim=-1)
    picks = torch.zeros_like(probabilities).scatter(1, probabilities.topk(chosen).indices, 1.0)
    experts = probabilities.size(1)
    return experts / chosen * (picks.mean(dim=0) * probabilities.mean(dim=0)).sum()


def _collect(trained: Mapping[str, torch.nn.Parameter], mains: Tensors) -> None:
    """Add the gradients of one sample in float32."""
    for name, parameter in trained.items():
        if parameter.grad is not None:
            mains[name].grad += parameter.grad.float()
            parameter.grad = None


def _setting(name: str, task: Task, field: str, default: Any) -> tuple[str | None, Any]:
    """The innermost override around a parameter that sets a field, and what it sets."""
    around = {
        part: getattr(override, field)
        for part, override in task.model.overrides.items()
        if lies_under(_name_in_layout(name), part) and getattr(override, field) is not None
    }
    innermost = max(around, key=len, default=None)
    return innermost, around.get(innermost, default)


def _name_in_layout(name: str) -> str:
    return name.removeprefix("modality_submodules.").replace("language_model.", "language.", 1)


def _groups(mains: Tensors, task: Task) -> list[dict[str, Any]]:
    groups = []
    for name, main in mains.items():
        _, rate = _setting(name, task, "lr", LR)
        _, decay = _setting(name, task, "weight_decay", WEIGHT_DECAY)
        groups.append({"params": [main], "lr": rate, "weight_decay": decay if main.ndim > 1 else 0.0})
    return groups


def _clip(mains: Tensors, task: Task) -> None:
    """Clip what has a limit of its own by its own norm, and the rest together."""
    limited: dict[tuple[str | None, float], list[torch.Tensor]] = {}
    for name, main in mains.items():
        limited.setdefault(_setting(name, task, "clip_grad", task.model.clip_grad), []).append(main)
    for (_, limit), group in limited.items():
        if limit > 0:
            torch.nn.utils.clip_grads_with_norm_(group, limit, _norm(group))


def _norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.grad.double().square().sum() for tensor in tensors]).sum().sqrt()


def sample_loss(model: RaggedMimoModel, sample: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Sum of the token losses of one sample."""
    ids = sample["input_ids"]
    language = model.language_model
    embedded = language.embedding.word_embeddings(torch.where(ids < TEXT, 0, ids)[None])[0]
    if language.embedding.add_position_embedding:
        is_text = (ids >= TEXT)[:, None]
        embedded = embedded + language.embedding.position_embeddings(torch.arange(len(ids))) * is_text
    for module, token in (("images", IMAGE), ("audio", CLIP)):
        places = (ids == token).nonzero().flatten()
        if len(places):
            inputs = sample["modality_inputs"][module]
            rows = model.modality_submodules[module](encoder_inputs=_to(inputs, dtype))
            embedded = embedded.index_copy(0, places, rows)
    positions = sample["position_ids"][:, None] if "position_ids" in sample else None
    logits = language(input_ids=None, position_ids=positions, attention_mask=None, decoder_input=embedded[:, None])[0]
    losses = torch.nn.functional.cross_entropy(logits, sample["labels"], reduction="none")
    weights = sample["loss_mask"].to(dtype)
    if "weight" in sample:
        weights = weights * sample["weight"] * sample["numbers"]
    return (losses * weights).sum()


def _to(inputs: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    def convert(value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    return {
        encoder: {name: apply_to_collection(value, torch.Tensor, convert) for name, value in arguments.items()}
        for encoder, arguments in inputs.items()
    }


def _named_parameters(model: RaggedMimoModel, infra: MimoModelInfra) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name in infra.participating_modules:
        module, prefix = module_and_name(model, name)
        yield from global_named_parameters(module, prefix=prefix, groups=infra.pg_collections[name])
