"""A Llama of transformers under Lightning's DDPStrategy: what a user has without this package."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from tests.gpu.measure import StepMeter
from tests.gpu.model import CopiedText
from tests.gpu.run import Run


class Llama(pl.LightningModule):
    """The language module's size; the image's tokens are text like others."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def configure_model(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM  # large, and only needed here

        run = self._run
        config = LlamaConfig(
            vocab_size=run.vocabulary,
            hidden_size=run.hidden,
            intermediate_size=4 * run.hidden,
            num_hidden_layers=run.layers,
            num_attention_heads=run.heads,
            max_position_embeddings=run.length,
            use_cache=False,
            attn_implementation=run.attention or "sdpa",
        )
        self.llama = LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.llama(input_ids=batch["input_ids"]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        # Lightning's refuses fused optimizers in mixed precision, because of loss scales, which bfloat16 has not.
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


class _Steps(pl.Callback):
    """Tells the meter of optimizer steps, each of several batches."""

    def __init__(self, run: Run, meter: StepMeter) -> None:
        self._run, self._meter, self._every = run, meter, run.microbatches

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._run.accelerator == "gpu":
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index % self._every == 0:
            self._meter.begin(index // self._every)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if (index + 1) % self._every == 0:
            self._meter.end(outputs["loss"] * self._every)


def train_llama(run: Run) -> dict[str, Any]:
    """Steps of the same number of tokens, in as many pieces."""
    pl.seed_everything(1)
    meter = StepMeter(run)
    module = Llama(run)
    trainer = pl.Trainer(
        accelerator=run.accelerator,
        devices=1,
        precision=run.precision,
        strategy=DDPStrategy(gradient_as_bucket_view=True),
        accumulate_grad_batches=run.microbatches,
        max_steps=run.steps,
        callbacks=[_Steps(run, meter)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(CopiedText(run), batch_size=run.batch // run.microbatches, num_workers=2)
    trainer.fit(module, loader)
    return meter.result() | {"parameters": {"language": sum(each.numel() for each in module.parameters())}}
