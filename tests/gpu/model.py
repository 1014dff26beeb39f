"""Synthetic images and text, and the vision-language model that learns from them, in any size."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from examples.llava.model import LlavaModule
from lightning_mimo.models.sizes import Recompute, TransformerSize
from tests.gpu.run import Run

IMAGE_TOKENS, IMAGE_SIZE, PATCH_SIZE = 64, 112, 14


class CopiedText(torch.utils.data.Dataset):
    """An image and random tokens, which come again after a while: there is something to learn."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        length, placeholder = self._run.length, self._run.vocabulary - 1
        tokens = torch.randint(0, placeholder, (length + 1,), generator=generator)
        tokens[2 * IMAGE_TOKENS :] = tokens[IMAGE_TOKENS : length + 1 - IMAGE_TOKENS].clone()
        inputs = tokens[:-1].clone()
        inputs[:IMAGE_TOKENS] = placeholder
        mask = torch.ones(length)
        mask[:IMAGE_TOKENS] = 0
        pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        return {
            "input_ids": inputs,
            "labels": tokens[1:],
            "loss_mask": mask,
            "modality_inputs": {"images": {"vit": {"pixel_values": pixels}}},
        }


class Sentences(CopiedText):
    """The same, of different lengths, and with what each is for the modules."""

    def __len__(self) -> int:
        return 2_000

    def length(self, index: int) -> int:
        return self._run.length * (4 + index % 5) // 8

    def cost(self, index: int) -> dict[str, float]:
        return {"images": 1.0, "language": float(self.length(index))}

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample, length = super().__getitem__(index), self.length(index)
        return sample | {key: sample[key][:length] for key in ("input_ids", "labels", "loss_mask")}


def data_of(run: Run) -> CopiedText:
    """The training data of a run."""
    return CopiedText(run) if run.pack_to is None else Sentences(run)


def build_module(run: Run) -> LlavaModule:
    """The model of a run: a ViT of at most 12 layers of width 1024, and a Llama of the run's size."""
    recompute = Recompute() if run.recompute else None
    chosen = {"attention": run.attention} if _has_attention() and run.attention else {}
    language = TransformerSize(
        num_layers=run.layers,
        hidden_size=run.hidden,
        num_attention_heads=run.heads,
        ffn_hidden_size=4 * run.hidden,
        style="llama",
        recompute=recompute,
        **chosen,
    )
    vision = TransformerSize(
        num_layers=min(12, run.layers),
        hidden_size=min(1024, run.hidden),
        num_attention_heads=min(16, run.heads),
        recompute=recompute,
        **chosen,
    )
    return LlavaModule(
        vision=vision,
        language=language,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        tokens_per_image=IMAGE_TOKENS,
        vocab_size=run.vocabulary,
        max_sequence_length=run.length,
        image_token_id=run.vocabulary - 1,
        lr=3e-4,
        warmup_steps=4,
    )


def flops_of_step(run: Run, parameters: int) -> float:
    """Floating-point operations of the forward and backward passes of one step, without what is computed again.

    Six for each token and each parameter that multiplies it (all but the word embeddings; the ViT's few tokens are
    counted as if they were its share of the language module's), and causal attention's two products.

    Args:
        run: its batch and lengths.
        parameters: of the language module.
    """
    tokens = run.batch * run.length
    matrices = parameters - run.vocabulary * run.hidden
    attention = run.layers * run.hidden * run.length  # 2 products * 2 operations * s * h / 2 (causal) -> / 2 * 3
    return 6.0 * tokens * matrices + 6.0 * tokens * attention


def _has_attention() -> bool:
    return "attention" in inspect.signature(TransformerSize).parameters
