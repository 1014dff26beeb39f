"""Your own dataset: images in files, and ranks that open only the files that their modules need.

    uv run python -m examples.own_dataset

A dataset with `load(index, modules)` is told for which modules the sample is. Here 64 images are in files under
logs/own_dataset. Each of two encoder ranks opens its half of every batch, and the two ranks of the language module open
none. At the end the example prints how many files each rank opened in one epoch: 32, 32, 0, 0.
"""

from pathlib import Path

import lightning as L
import numpy as np
import torch
from megatron.core.optimizer import OptimizerConfig
from torch.utils.data import DataLoader, Dataset

from lightning_mimo import MimoModule, MimoStrategy, ModuleParallelism
from lightning_mimo.models import ImagePatches, TransformerSize, vision_language_config

IMAGE, QUESTION, SAMPLES = 8, 9, 64
FOLDER = Path("logs/own_dataset")


class FilesAndText(Dataset):
    """Which row of the image is bright? The answers are the tokens 0 to 7."""

    def __init__(self) -> None:
        self.opened = 0

    def __len__(self) -> int:
        return SAMPLES

    def load(self, index: int, modules: frozenset[str]) -> dict:
        """Return the part of a sample that these modules need. Text is always included: every rank needs its length."""
        sample = {
            "input_ids": torch.tensor([IMAGE, QUESTION]),
            "labels": torch.tensor([QUESTION, index % 8]),
            "loss_mask": torch.tensor([0, 1]),
        }
        if "images" in modules:
            self.opened += 1
            pixels = torch.from_numpy(np.load(FOLDER / f"{index}.npy"))
            sample["modality_inputs"] = {"images": {"vit": {"pixel_values": pixels}}}
        return sample


class FileData(L.LightningDataModule):
    """Written as for one process; MimoStrategy distributes the samples."""

    def prepare_data(self) -> None:
        """Write the files. Lightning calls this on one rank per node, and all others wait for it."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        for index in range(SAMPLES):
            pixels = np.random.default_rng(index).random((1, 1, 8, 8), dtype=np.float32)  # images, channels, 8 x 8
            pixels[:, :, index % 8] += 1
            np.save(FOLDER / f"{index}.npy", pixels)

    def setup(self, stage: str) -> None:
        self.dataset = FilesAndText()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_size=16, shuffle=True)


class RowModule(MimoModule):
    def configure_mimo(self, infra):
        size = TransformerSize(num_layers=2, hidden_size=32, num_attention_heads=4)
        return vision_language_config(
            infra,
            patches=ImagePatches(image_size=8, patch_size=4, channels=1),
            vision=size,
            language=size,
            vocab_size=16,
            max_sequence_length=2,
            image_token_id=IMAGE,
        )

    def configure_optimizers(self):
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=3e-3))


if __name__ == "__main__":
    L.seed_everything(1)
    data = FileData()
    strategy = MimoStrategy({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}, 16)
    options = {"logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", devices=4, strategy=strategy, max_epochs=1, **options)
    trainer.fit(RowModule(), data)
    opened: list = [None] * 4
    torch.distributed.all_gather_object(opened, data.dataset.opened)
    trainer.print(f"images opened by ranks 0 to 3: {', '.join(map(str, opened))}")
