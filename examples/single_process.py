"""All modules in one process (`colocate`): a start, a way to debug, and a reference for other layouts.

    uv run python -m examples.single_process

Questions about real handwritten digits: the model and data of configs/digits_vlm.yaml in Python instead of YAML. The
output is the loss of the first and the last of 20 steps. `examples.four_processes` prints the same numbers.
"""

import lightning as L

from examples.digits.data import DigitsData
from examples.digits.model import DigitsModule
from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.models import TransformerSize


class FirstAndLast(L.Callback):
    """Prints the loss, which is the same on every rank."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in (1, trainer.max_steps):
            trainer.print(f"step {trainer.global_step}: loss {outputs['loss']:.4f}")


def train(strategy: MimoStrategy, *, devices: int, num_nodes: int = 1) -> None:
    """Train for 20 steps in any layout."""
    L.seed_everything(1)
    size = TransformerSize(num_layers=2, hidden_size=32, num_attention_heads=4)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        max_steps=20,
        limit_val_batches=0,
        callbacks=[FirstAndLast()],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(DigitsModule(vision=size, language=size, warmup_steps=5), DigitsData(global_batch_size=64))


if __name__ == "__main__":
    modules = {"images": ModuleParallelism(), "language": ModuleParallelism()}
    train(MimoStrategy(modules, global_batch_size=64, colocate=True), devices=1)
