"""Your own encoder: plain torch layers on one rank, and a GPT with tensor parallelism on two others.

    uv run python -m examples.torch_encoder

The task: which row of the image is bright? Images and questions are generated in this file. The output is a table of
modules and their ranks, a progress bar with the loss, and after a few seconds "loss: 0.0…": the GPT has learned to use
the embeddings of the encoder.
"""

import lightning as L
import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig

from lightning_mimo import MimoModule, MimoStrategy, ModuleParallelism
from lightning_mimo.models import TransformerSize, encoder_spec, gpt_spec

IMAGE, QUESTION, WIDTH = 8, 9, 32  # tokens, of which 0 to 7 are the answers; hidden size of the GPT


class Encoder(torch.nn.Sequential):  # [items, 1, 8, 8] -> [items, 1 token, WIDTH]
    def __init__(self):
        super().__init__(torch.nn.Flatten(2), torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, WIDTH))


class RowModule(MimoModule):
    def configure_mimo(self, infra):
        size = TransformerSize(num_layers=2, hidden_size=WIDTH, num_attention_heads=4)
        gpt = gpt_spec(infra, size, vocab_size=16, max_sequence_length=2)
        return MimoModelConfig(gpt, {"images": encoder_spec(infra, "images", Encoder)}, {"images": IMAGE})

    def configure_optimizers(self):
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3))


def sample(row):
    text = {"input_ids": torch.tensor([IMAGE, QUESTION]), "labels": torch.tensor([QUESTION, row])}
    image = torch.rand(1, 1, 8, 8) + (torch.arange(8) == row)[:, None]
    return {**text, "loss_mask": torch.tensor([0, 1]), "modality_inputs": {"images": {"encoder": {"input": image}}}}


if __name__ == "__main__":
    L.seed_everything(1)
    strategy = MimoStrategy({"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)}, global_batch_size=32)
    options = {"logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", devices=3, strategy=strategy, max_epochs=2, **options)
    trainer.fit(RowModule(), torch.utils.data.DataLoader([sample(i % 8) for i in range(1024)], 32, shuffle=True))
    trainer.print(f"loss: {trainer.callback_metrics['train/loss']:.3f}")
