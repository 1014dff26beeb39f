"""The same folder in this package, in some layout, on the ranks of the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig
from torch.utils.data import DataLoader

from lightning_mimo import HuggingFaceModule, MimoPrecision, MimoStrategy, ModuleParallelism
from lightning_mimo.checkpoint.shards import ShardSpec
from lightning_mimo.mimo.parameter_names import named_parameters_of
from tests.hugging_face.reference import LEARNING_RATE, NEW_TOKENS, STEPS, Conversation, conversations, exactly
from tests.hugging_face.tiny_models import ITEMS
from tests.parity.layouts import PoolEnvironment


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where modules run.

    Attributes:
        modules: sizes; a missing dp is 1.
        colocate: all modules on all ranks.
        num_microbatches: pipeline microbatches.
        options: further arguments of HuggingFaceModule.
    """

    modules: Mapping[str, ModuleParallelism]
    colocate: bool = False
    num_microbatches: int = 1
    options: Mapping[str, Any] | None = None

    @property
    def sizes(self) -> dict[str, ModuleParallelism]:
        """With every dp given."""
        return {name: replace(sizes, dp=sizes.dp or 1) for name, sizes in self.modules.items()}

    @property
    def ranks(self) -> int:
        sizes = [sizes.size for sizes in self.sizes.values()]
        return max(sizes) if self.colocate else sum(sizes)


@dataclass(frozen=True)
class Found:
    """What one rank saw.

    Attributes:
        logits: sample -> this rank's part of the vocabulary, where it has the last stage.
        trained_logits: the same after training.
        tp_rank: which part that is.
        losses: of validation, then of each step.
        answers: of each sample.
        gradients: of each step: parameter's global name -> where the shard lies, and the shard.
        untrained: global names of the parameters that have none.
    """

    logits: dict[int, torch.Tensor]
    trained_logits: dict[int, torch.Tensor]
    tp_rank: int
    losses: list[float]
    answers: list[list[int]]
    gradients: list[dict[str, tuple[ShardSpec, torch.Tensor]]]
    untrained: set[str]


class Observed(HuggingFaceModule):
    """Keeps the logits of evaluations."""

    def __init__(self, pretrained: str, **options: Any) -> None:
        super().__init__(pretrained, lr=LEARNING_RATE, max_new_tokens=NEW_TOKENS, **options)
        self.logits: dict[int, torch.Tensor] = {}

    def configure_optimizers(self) -> Any:
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=self.lr, weight_decay=0.0, clip_grad=0.0))

    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        if not self.training:
            for row, index in enumerate(batch["sample_indices"]):
                self.logits[index] = output[row, : int(batch["lengths"][row])].detach().clone()
        return super().loss(output, batch)


class Gradients(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.untrained: set[str] = set()
        self.steps: list[dict[str, tuple[ShardSpec, torch.Tensor]]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Observed, optimizer: Any) -> None:
        infra = trainer.strategy.infra
        self.steps.append(
            {
                name: (ShardSpec.of(parameter, infra.pg_collections[module]), parameter.main_grad.detach().clone())
                for module in infra.participating_modules
                for name, parameter in named_parameters_of(pl_module.model, infra, module)
                if parameter.requires_grad
            }
        )
        self.untrained = {
            name
            for module in infra.participating_modules
            for name, parameter in named_parameters_of(pl_module.model, infra, module)
            if not parameter.requires_grad
        }

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def as_samples(conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    """Samples as this package wants them."""
    result = []
    for each in conversations:
        sample: dict[str, Any] = {
            "input_ids": each.ids[:-1],
            "labels": each.ids[1:],
            "loss_mask": (each.labels[1:] != -100).float(),
        }
        if each.items and each.inputs:
            sample["modality_inputs"] = {each.items.module: {each.items.encoder: each.inputs}}
        result.append(sample)
    return result


def make_trainer(layout: Layout, batch: int, *, precision: str = "64-true", **options: Any) -> pl.Trainer:
    strategy = MimoStrategy(
        layout.sizes,
        batch,
        layout.num_microbatches,
        colocate=layout.colocate,
        precision_plugin=MimoPrecision(precision),
        cluster_environment=PoolEnvironment(),
    )
    defaults = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **options},
    )


def run(
    folder: Path,
    conversations: Sequence[Conversation],
    layout: Layout,
    checkpoint: Path,
    *,
    frozen: Sequence[str] = (),
) -> Found:
    """Evaluate, answer, and train two steps. Collective over the world.

    Args:
        folder: of the pretrained model.
        conversations: one global batch.
        layout: on which ranks.
        checkpoint: is written at the end.
        frozen: as for HuggingFaceModule.
    """
    torch.manual_seed(1)
    samples = as_samples(conversations)
    gradients = Gradients()
    trainer = make_trainer(layout, len(samples), max_steps=STEPS, max_epochs=STEPS, callbacks=[gradients])
    module = Observed(str(folder), frozen=frozen, **(layout.options or {}))
    loader = DataLoader(samples, batch_size=len(samples))
    # Without a mixture of experts nothing in the model rounds to float32 that transformers does not.
    with exactly():
        (metrics,) = trainer.validate(module, loader, verbose=False)
        before, module.logits = module.logits, {}
        answers = {each["sample_index"]: each["tokens"] for batch in trainer.predict(module, loader) for each in batch}
        trainer.fit(module, loader)
        trainer.save_checkpoint(checkpoint)
        trainer.validate(module, loader, verbose=False)
    infra = trainer.strategy.infra
    tp_rank = infra.pg_collections["language"].tp.rank() if "language" in infra.pg_collections else 0
    found = Found(
        before,
        module.logits,
        tp_rank,
        [metrics["val/loss"], *gradients.losses],
        [answers[i] for i in range(len(samples))],
        gradients.steps,
        gradients.untrained,
    )
    infra.destroy()
    return found


def load_and_save(kind: str, folder: Path, layout: Layout, checkpoint: Path, precision: str) -> None:
    """Start a training, end it before the first step, and write a checkpoint. Collective over the world."""
    samples = as_samples(conversations(2, ITEMS.get(kind)))
    trainer = make_trainer(layout, len(samples), precision=precision, max_steps=1, callbacks=[_SaveAtStart(checkpoint)])
    trainer.fit(Observed(str(folder), **(layout.options or {})), DataLoader(samples, batch_size=len(samples)))
    trainer.strategy.infra.destroy()


class _SaveAtStart(pl.Callback):
    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self._path)
