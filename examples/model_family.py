"""Template for a model family: a tensor-parallel transformer over time series, and a GPT.

    uv run python -m examples.model_family

The task: which of four channels rises? The output is a table of modules and their ranks, and at the end "loss: 0.0…".
Families in `lightning_mimo/models` have the same parts: how an item becomes tokens, the encoder, its ModuleSpec, and a
MimoModelConfig. `tests/parity/test_model_family.py` trains this one in several layouts.
"""

from dataclasses import dataclass

import lightning as L
import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.utils.data import DataLoader

from lightning_mimo import ConfigError, MimoModule, MimoStrategy, ModuleParallelism
from lightning_mimo.models import PatchEncoder, PipelinedVisionSubmodules, TransformerSize, gpt_spec, transformer_config

SERIES, QUESTION = 8, 9  # tokens, of which 0 to 3 are the answers


@dataclass(frozen=True, kw_only=True)
class SeriesPatches:
    """Splits a time series into tokens: 8 steps of 4 channels with ``steps_per_patch=4`` are 2 tokens of 16 values."""

    steps: int
    channels: int
    steps_per_patch: int
    patches_per_token: int = 1

    def __post_init__(self) -> None:
        if self.steps % self.steps_per_patch:
            raise ConfigError(f"steps={self.steps} is not a multiple of steps_per_patch={self.steps_per_patch}.")

    @property
    def num_patches(self) -> int:
        return self.steps // self.steps_per_patch

    @property
    def values_per_patch(self) -> int:
        return self.steps_per_patch * self.channels

    @property
    def tokens_per_item(self) -> int:
        return self.num_patches


class SeriesEncoder(PatchEncoder):
    """A transformer over patches. Megatron's layers implement tp, the base class pp."""

    def forward(self, values: torch.Tensor | None = None, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """``[n, steps, channels] -> [n, tokens, hidden]``; ``hidden_states`` come from the previous pipeline stage."""
        if values is not None:
            values = values.reshape(len(values), self.patches.num_patches, self.patches.values_per_patch)
        return self.encode(values, hidden_states)


def series_spec(infra, module: str, patches: SeriesPatches, size: TransformerSize) -> ModuleSpec:
    """ModuleSpec of the modality. Its hidden size is that of the language module, so it needs no projector."""
    groups = infra.pg_collections.get(module)
    config = transformer_config(infra.layout, module, size)
    params = {"transformer_config": config, "patches": patches, "pg_collection": groups}
    encoders = {"transformer": ModuleSpec(module=SeriesEncoder, params=params)}
    return ModuleSpec(PipelinedVisionSubmodules, params={"pg_collection": groups}, submodules={"encoders": encoders})


class SeriesModule(MimoModule):
    def configure_mimo(self, infra):
        size = TransformerSize(num_layers=2, hidden_size=32, num_attention_heads=4)
        patches = SeriesPatches(steps=8, channels=4, steps_per_patch=4)
        gpt = gpt_spec(infra, size, vocab_size=16, max_sequence_length=3)
        return MimoModelConfig(gpt, {"series": series_spec(infra, "series", patches, size)}, {"series": SERIES})

    def configure_optimizers(self):
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3))


def sample(index: int) -> dict:
    """Two placeholders for a series, then the question; the answer is the channel that rises."""
    channel, generator = index % 4, torch.Generator().manual_seed(index)
    values = torch.randn(1, 8, 4, generator=generator)
    values[:, :, channel] += torch.linspace(-3, 3, 8)
    return {
        "input_ids": torch.tensor([SERIES, SERIES, QUESTION]),
        "labels": torch.tensor([SERIES, QUESTION, channel]),
        "loss_mask": torch.tensor([0, 0, 1]),
        "modality_inputs": {"series": {"transformer": {"values": values}}},
    }


if __name__ == "__main__":
    L.seed_everything(1)
    strategy = MimoStrategy({"series": ModuleParallelism(tp=2), "language": ModuleParallelism()}, 32)
    trainer = L.Trainer(accelerator="cpu", devices=3, strategy=strategy, max_epochs=2, enable_checkpointing=False)
    trainer.fit(SeriesModule(), DataLoader([sample(i) for i in range(1024)], batch_size=32, shuffle=True))
    trainer.print(f"loss: {trainer.callback_metrics['train/loss']:.3f}")
