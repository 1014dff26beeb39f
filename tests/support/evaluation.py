"""A tiny vision-language model trained twice: by the strategy in some layout, and by plain PyTorch in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from torch.utils.data import DataLoader, Dataset

from lightning_mimo import MimoModelInfra, MimoModule, MimoStrategy, ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.data.loader import shard_dataloader
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layers.vocab_parallel import greedy_tokens
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.mimo.model import build_mimo_model
from lightning_mimo.models.vision import ImagePatches
from lightning_mimo.models.vision_language import TransformerSize, vision_language_config
from lightning_mimo.parallel.random import seed_megatron
from tests.parity.layouts import PoolEnvironment

IMAGE, VOCABULARY, SEED = 3, 32, 7
CLIP, LR, WEIGHT_DECAY = 0.5, 1e-2, 0.01
# Adam divides by the gradient's size, so where a gradient is all rounding error (the bias of the keys, which softmax
# cancels) it would blow the error up to the size of the learning rate. A larger epsilon keeps it small.
EPSILON = 1e-4


class PicturesAndText(Dataset):
    """Samples with 0, 1 or 2 images, of different lengths, some without a single loss token."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        images = index % 3
        length = 6 + index % 4
        text = torch.randint(4, VOCABULARY, (length + 1,), generator=generator)
        text[1 : 1 + images] = IMAGE
        labels = torch.where(text[1:] == IMAGE, 5, text[1:])
        mask = (torch.rand(length, generator=generator) < 0.5).float() * (index % 7 != 0)
        mask[: 1 + images] = 0  # as in any prompt, what is asked for comes after the images
        pixels = torch.randn(images, 1, 4, 4, generator=generator)
        return {
            "input_ids": text[:-1],
            "labels": labels,
            "loss_mask": mask,
            "modality_inputs": {"images": {"vit": {"pixel_values": pixels}}},
        }


class TinyModule(MimoModule):
    """Two layers each, four heads, so that tp and pp of 2 fit both modules."""

    num_layers = 2

    def __init__(self, *, sequence_parallel: bool = False) -> None:
        super().__init__(pad_token_id=0, max_new_tokens=2)
        self._sequence_parallel = sequence_parallel

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        size = TransformerSize(num_layers=self.num_layers, hidden_size=32, num_attention_heads=4)
        return vision_language_config(
            infra,
            patches=ImagePatches(image_size=4, patch_size=2, channels=1),
            vision=size,
            language=size,
            vocab_size=VOCABULARY,
            max_sequence_length=16,
            image_token_id=IMAGE,
            sequence_parallel=self._sequence_parallel,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=LR,
                weight_decay=WEIGHT_DECAY,
                adam_beta1=0.9,
                adam_beta2=0.99,
                adam_eps=EPSILON,
                clip_grad=CLIP,
            )
        )


@dataclass(frozen=True, kw_only=True)
class History:
    """What a run logged: one entry per optimizer step (of the modules' norms the last), then the validation."""

    loss: list[float]
    grad_norm: list[float]
    module_grad_norms: dict[str, float]
    val_loss: float
    val_exact_match: float
    answers: list[list[int]]


class Recorder(pl.Callback):
    """Keeps the loss of every batch and the gradient norm of every optimizer step."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.grad_norm: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.loss.append(float(trainer.callback_metrics["train/loss"]))
        optimizer = trainer.optimizers[0]
        if trainer.global_step > len(self.grad_norm):
            self.grad_norm.append(optimizer.outcome.grad_norm)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Numbers that a layout does not change."""

    samples: int = 48
    global_batch_size: int = 12
    steps: int = 4


def make_trainer(run: Run, strategy: MimoStrategy, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_steps=run.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=2,
        **arguments,
    )


def train_in_layout(
    run: Run,
    modules: Mapping[str, ModuleParallelism],
    *,
    colocate: bool,
    num_microbatches: int,
    sequence_parallel: bool = False,
) -> History:
    """Train with ``Trainer(strategy=MimoStrategy(...))`` on the ranks of the pool."""
    torch.manual_seed(SEED)
    strategy = MimoStrategy(
        dict(modules),
        run.global_batch_size,
        num_microbatches,
        colocate=colocate,
        cluster_environment=PoolEnvironment(),
    )
    recorder = Recorder()
    trainer = make_trainer(run, strategy, callbacks=[recorder])
    module = TinyModule(sequence_parallel=sequence_parallel)
    loader = DataLoader(PicturesAndText(run.samples), batch_size=run.global_batch_size)
    trainer.fit(module, loader, loader)
    metrics = trainer.callback_metrics
    answers = trainer.predict(module, DataLoader(PicturesAndText(10), batch_size=run.global_batch_size))
    strategy.infra.destroy()
    return History(
        loss=recorder.loss,
        grad_norm=recorder.grad_norm,
        module_grad_norms={name: float(metrics[f"train/grad_norm/{name}"]) for name in modules},
        val_loss=float(metrics["val/loss"]),
        val_exact_match=float(metrics["val/exact_match"]),
        answers=[answer["tokens"] for answer in answers[0]],
    )


def train_plainly(run: Run) -> History:
    """The oracle: one process, the model's modules called in turn, autograd, torch's AdamW; no DDP, no schedule."""
    layout = MimoLayout.resolve(
        {"images": ModuleParallelism(), LANGUAGE: ModuleParallelism()}, world_size=1, colocate=True
    )
    with megatron_on_cpu():
        infra = MimoModelInfra.build(layout)
        seed_megatron(layout, 0, seed=SEED)
        module = TinyModule()
        model = build_mimo_model(module.configure_mimo(infra), infra, seed=SEED)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
            lr=LR,
            betas=(0.9, 0.99),
            eps=EPSILON,
        )
        group = infra.pg_collections[LANGUAGE].tp

        def batches(dataset: Dataset, size: int) -> list[dict[str, Any]]:
            plan = RankBatchPlan.build(layout, 0, global_batch_size=size, num_microbatches=1)
            loader = shard_dataloader(
                DataLoader(dataset, batch_size=size),
                plan,
                sample_format=SampleFormat(special_token_ids=model.special_token_ids, pad_token_id=0),
                seed=SEED,
            )
            return [microbatch for (microbatch,) in loader]

        def forward(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits, _ = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                modality_inputs=batch["modality_inputs"],
                modality_counts=batch["modality_counts"],
            )
            right = ((greedy_tokens(logits, group) == batch["labels"]) | (batch["loss_mask"] == 0)).all(dim=1)
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
            return (losses * batch["loss_mask"]).sum(), batch["loss_mask"].sum(), right

        history: dict[str, list[float]] = {"loss": [], "grad_norm": []}
        data = batches(PicturesAndText(run.samples), run.global_batch_size)
        for step in range(run.steps):
            optimizer.zero_grad()
            total, tokens, _ = forward(data[step % len(data)])
            history["loss"].append(float(total / tokens))
            (total / tokens).backward()
            by_module = {"images": model.modality_submodules, LANGUAGE: model.language_model}
            module_norms = {
                name: float(torch.nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None]))
                for name, part in by_module.items()
            }
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            history["grad_norm"].append(float(norm))
            optimizer.step()
        with torch.no_grad():
            held_out = [(forward(batch), batch["loss_mask"].any(dim=1)) for batch in data[:2]]
        answers = _answer_plainly(model, batches(PicturesAndText(10), 10)[0], group, new_tokens=2)
        infra.destroy()
    tokens = sum(float(count) for (_, count, _), _ in held_out)
    return History(
        **history,
        module_grad_norms=module_norms,
        val_loss=sum(float(total) for (total, _, _), _ in held_out) / tokens,
        val_exact_match=sum(int((right & asked).sum()) for (_, _, right), asked in held_out)
        / sum(int(asked.sum()) for _, asked in held_out),
        answers=answers,
    )


@torch.no_grad()
def _answer_plainly(model: Any, batch: dict[str, Any], group: Any, *, new_tokens: int) -> list[list[int]]:
    """Greedy decoding sample by sample, without padding."""
    answers = []
    start = 0
    for row, images in enumerate(batch["modality_counts"]["images"].items):
        counted = batch["loss_mask"][row] > 0
        length = int(counted.int().argmax()) + 1 if counted.any() else int(batch["lengths"][row])
        tokens = batch["input_ids"][row, :length].tolist()
        pixels = batch["modality_inputs"]["images"]["vit"]["pixel_values"][start : start + images]
        start += images
        for _ in range(new_tokens):
            text = model.get_text_embeddings(torch.tensor([tokens]), torch.arange(len(tokens))[None], {"images": IMAGE})
            embeddings = {"text": text}
            if images:
                embeddings["images"] = model.modality_submodules["images"](
                    encoder_inputs={"vit": {"pixel_values": pixels}}
                )
            combined = model.align_embeddings_by_token_positions(embeddings, torch.tensor([tokens]), {"images": IMAGE})
            logits = model.language_model(
                input_ids=None, position_ids=None, attention_mask=None, decoder_input=combined
            )
            last = logits[0, -1].clone()
            last[IMAGE] = -torch.inf  # stands for an embedding, and none belongs to an answer
            tokens.append(int(last.argmax()))
        answers.append(tokens[length:])
    return answers
