"""A small model with a fault that only some layouts show, for the tests of ``lightning-mimo verify``."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch.utils.data import DataLoader

from lightning_mimo import MimoModelInfra, MimoModule
from lightning_mimo.models import TransformerSize, encoder_spec, gpt_spec

IMAGE, VOCABULARY, WIDTH = 8, 16, 32

Fault = Literal["none", "batch_statistics", "low_rank", "tokens_first", "shape_of_shard", "mean_loss"]


class Encoder(torch.nn.Module):
    """Two tokens for each image."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault
        self.layer = torch.nn.Linear(32, WIDTH)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(input.flatten(1).unflatten(1, (2, 32)))
        if self._fault == "batch_statistics":
            hidden = hidden - hidden.mean(0)
        return hidden.transpose(0, 1) if self._fault == "tokens_first" else hidden


class LowRank(torch.nn.Module):
    """A hand-made adapter of a column-parallel layer, which does not sum the gradient of what all ranks hold."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Parameter(torch.linspace(-0.1, 0.1, 4 * WIDTH, dtype=layer.weight.dtype).view(4, WIDTH))
        self.up = torch.nn.Parameter(torch.full((layer.weight.shape[0], 4), 0.1, dtype=layer.weight.dtype))
        set_tensor_model_parallel_attributes(self.up, is_parallel=True, dim=0, stride=1)

    def forward(self, hidden: torch.Tensor) -> Any:
        output, bias = self.layer(hidden)
        return output + hidden @ self.down.T @ self.up.T, bias


class FaultyModule(MimoModule):
    def __init__(self, size: TransformerSize, fault: Fault = "none") -> None:
        super().__init__()
        self.size, self.fault = size, fault

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        gpt = gpt_spec(infra, self.size, vocab_size=VOCABULARY, max_sequence_length=4)
        images = encoder_spec(infra, "images", Encoder, options={"fault": self.fault})
        return MimoModelConfig(gpt, {"images": images}, {"images": IMAGE})

    def configure_model(self) -> None:
        super().configure_model()
        language = self.mimo_model.language_model
        if language is None:
            return
        mlp = language.decoder.layers[0].mlp
        if self.fault == "low_rank":
            mlp.linear_fc1 = LowRank(mlp.linear_fc1)
        if self.fault == "shape_of_shard":
            torch.nn.init.constant_(mlp.linear_fc1.weight, mlp.linear_fc1.weight.shape[0] ** -0.5)

    def loss(self, output: torch.Tensor, batch: Any) -> Any:
        total, tokens, metrics = super().loss(output, batch)
        return (total / tokens, 1, metrics) if self.fault == "mean_loss" else (total, tokens, metrics)

    def configure_optimizers(self) -> Any:
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3))


class RowData(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader([sample(index) for index in range(16)], batch_size=64)


def sample(index: int) -> dict[str, Any]:
    """An image of two tokens, and one or two labels."""
    generator = torch.Generator().manual_seed(index)
    return {
        "input_ids": torch.tensor([IMAGE, IMAGE, 9]),
        "labels": torch.tensor([index % 8, -100 if index % 3 else 9, index % 5]),
        "modality_inputs": {"images": {"encoder": {"input": torch.rand(1, 1, 8, 8, generator=generator)}}},
    }
