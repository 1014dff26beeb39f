"""The data: images of 8 x 8 pixels, and the question which row is bright. Put your own here."""

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

PIXELS = 8
IMAGE, QUESTION = 8, 9  # tokens; 0 to 7 are the answers
VOCAB_SIZE, SEQUENCE_LENGTH = 16, 2


class Rows(Dataset):
    def __init__(self, indices: range) -> None:
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        """One sample, the same whenever and on whichever rank it is asked for."""
        number = self._indices[index]
        row = number % PIXELS
        image = torch.rand(1, 1, PIXELS, PIXELS, generator=torch.Generator().manual_seed(number))  # 1 image, 1 channel
        image[:, :, row] += 0.5
        return {
            "input_ids": torch.tensor([IMAGE, QUESTION]),
            "labels": torch.tensor([QUESTION, row]),  # the token to predict at each position
            "loss_mask": torch.tensor([0, 1]),  # only the answer counts
            "modality_inputs": {"images": {"encoder": {"input": image}}},
        }


class RowData(L.LightningDataModule):
    """Written as for one process: ``batch_size`` is the global batch. Which samples a rank loads is not its concern."""

    def __init__(self, *, global_batch_size: int, train_samples: int = 1024, val_samples: int = 128) -> None:
        """
        Args:
            global_batch_size: samples per step over all ranks; the same as the strategy's.
            train_samples: images to train on.
            val_samples: other images, to see whether it reads those, too.
        """
        super().__init__()
        self.global_batch_size = global_batch_size
        self.train_set = Rows(range(train_samples))
        self.val_set = Rows(range(train_samples, train_samples + val_samples))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.global_batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, self.global_batch_size)
