"""The model and the data of the cases: as few operations as possible, and the same samples in every global batch."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from torch.utils.data import DataLoader, Dataset

from lightning_mimo import MimoModelInfra, MimoModule
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.models.multimodal import Encoder, multimodal_config
from lightning_mimo.models.sizes import TransformerSize
from lightning_mimo.models.vision import ImagePatches
from tests.fake_cuda.cases import Case
from tests.parity.model import (
    CLIP,
    CLIP_PATCHES,
    IMAGE,
    MAX_LENGTH,
    TOKENS_PER_IMAGE,
    VOCABULARY,
    PicturesSoundsAndText,
    Samples,
)

_BATCHES = 8


class SameEveryBatch(Dataset):
    """The same samples in every global batch, so that all steps are alike."""

    def __init__(self, dataset: Dataset, batch_size: int) -> None:
        self._dataset = dataset
        self._batch_size = batch_size

    def __len__(self) -> int:
        return _BATCHES * self._batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._dataset[index % self._batch_size]


def loader_of(case: Case) -> DataLoader:
    samples = Samples(clips=(1, 0, 2), dense=True) if "audio" in case.modules else Samples()
    dataset = SameEveryBatch(PicturesSoundsAndText(samples), case.global_batch_size)
    return DataLoader(dataset, batch_size=case.global_batch_size)


class TinyModule(MimoModule):
    """Encoders and a GPT with one layer for each pipeline stage."""

    def __init__(self, case: Case) -> None:
        super().__init__(frozen=case.frozen, max_new_tokens=2)
        self._case = case

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        patches = {
            "images": (ImagePatches(image_size=4, patch_size=2, channels=1, tokens_per_image=TOKENS_PER_IMAGE), IMAGE),
            "audio": (CLIP_PATCHES, CLIP),
        }
        return multimodal_config(
            infra,
            encoders={
                name: Encoder(patches=each, size=self._size(name, 8), token_id=token)
                for name, (each, token) in patches.items()
                if name in self._case.modules
            },
            language=self._size(LANGUAGE, 16),
            vocab_size=VOCABULARY,
            max_sequence_length=MAX_LENGTH,
            sequence_parallel=self._case.sequence_parallel,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0))

    def _size(self, module: str, hidden_size: int) -> TransformerSize:
        experts = {"num_experts": 4, "balancing_loss": 0.01} if self._case.experts and module == LANGUAGE else {}
        return TransformerSize(
            num_layers=self._case.modules[module].pp,
            hidden_size=hidden_size,
            num_attention_heads=2,
            ffn_hidden_size=16,
            **experts,
        )
