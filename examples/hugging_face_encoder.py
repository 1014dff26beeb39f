"""An encoder from Hugging Face: transformers' ViT on two ranks, and a GPT with tensor parallelism on two others.

    uv run --extra hf python -m examples.hugging_face_encoder

The ViT is small and starts from random weights, so nothing is downloaded; with `options={"pretrained": FOLDER}` it
starts from a folder of the hub. The task: which row of the image is bright? The output is a table of modules and their
ranks, and at the end "loss: 0.0…". The encoder has no tensor parallelism (tp=1), but any number of replicas that divide
the batch; the results are the same up to rounding. A whole pretrained model: lightning_mimo.HuggingFaceModule.
"""

import lightning as L
import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTModel

from lightning_mimo import MimoModule, MimoStrategy, ModuleParallelism
from lightning_mimo.models import TransformerSize, encoder_spec, gpt_spec

IMAGE, QUESTION, WIDTH = 8, 9, 32  # tokens, of which 0 to 7 are the answers; hidden size of the GPT
TOKENS_PER_IMAGE = 4  # an image of 8 x 8 pixels has four patches of 4 x 4


VIT = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


class HuggingFaceEncoder(torch.nn.Module):
    """A ViT of transformers. Built on the ranks of `images` only."""

    def __init__(self, pretrained: str | None = None) -> None:
        super().__init__()
        if pretrained is None:
            self.vit = ViTModel(ViTConfig(**VIT), add_pooling_layer=False)
        else:
            self.vit = ViTModel.from_pretrained(pretrained, add_pooling_layer=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[items, 1, 8, 8] -> [items, 4 tokens, 48]``, without the class token."""
        return self.vit(pixel_values=pixel_values).last_hidden_state[:, 1:]


def projector() -> torch.nn.Module:
    """From the ViT's features to the GPT's hidden size."""
    return torch.nn.Linear(VIT["hidden_size"], WIDTH)


class RowModule(MimoModule):
    def configure_mimo(self, infra):
        size = TransformerSize(num_layers=2, hidden_size=WIDTH, num_attention_heads=4)
        gpt = gpt_spec(infra, size, vocab_size=16, max_sequence_length=TOKENS_PER_IMAGE + 1)
        images = encoder_spec(infra, "images", HuggingFaceEncoder, options={"pretrained": None}, projector=projector)
        return MimoModelConfig(gpt, {"images": images}, {"images": IMAGE})

    def configure_optimizers(self):
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3))


def sample(row: int) -> dict:
    """Four placeholders for an image, then the question; the answer is the row."""
    image = torch.rand(1, 1, 8, 8) + (torch.arange(8) == row)[:, None]
    return {
        "input_ids": torch.tensor([*[IMAGE] * TOKENS_PER_IMAGE, QUESTION]),
        "labels": torch.tensor([*[QUESTION] * TOKENS_PER_IMAGE, row]),
        "loss_mask": torch.tensor([*[0] * TOKENS_PER_IMAGE, 1]),
        "modality_inputs": {"images": {"encoder": {"pixel_values": image}}},
    }


if __name__ == "__main__":
    L.seed_everything(1)
    strategy = MimoStrategy({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}, 32)
    options = {"logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", devices=4, strategy=strategy, max_epochs=2, **options)
    trainer.fit(RowModule(), DataLoader([sample(i % 8) for i in range(1024)], batch_size=32, shuffle=True))
    trainer.print(f"loss: {trainer.callback_metrics['train/loss']:.3f}")
