"""The model: an encoder of plain torch layers, and a GPT that reads what it says. Put your own here."""

import torch
from lightning_mimo import MimoModule
from lightning_mimo.models import TransformerSize, encoder_spec, gpt_spec
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig

from data import IMAGE, PIXELS, SEQUENCE_LENGTH, VOCAB_SIZE


class RowModule(MimoModule):
    """Modules ``images`` and ``language``: the names that config.yaml gives ranks to."""

    def __init__(self, *, language: TransformerSize, lr: float) -> None:
        """
        Args:
            language: size of the GPT.
            lr: learning rate.
        """
        super().__init__()
        self.language = language
        self.lr = lr

    def configure_mimo(self, infra):
        """Called on every rank; a rank builds the modules that are on it, and no others."""
        hidden_size = self.language.hidden_size

        class Encoder(torch.nn.Sequential):  # [images, 1, 8, 8] -> [images, 1 token, hidden_size]
            def __init__(self):
                super().__init__(
                    torch.nn.Flatten(2),
                    torch.nn.Linear(PIXELS * PIXELS, 64),
                    torch.nn.GELU(),
                    torch.nn.Linear(64, hidden_size),
                )

        gpt = gpt_spec(infra, self.language, vocab_size=VOCAB_SIZE, max_sequence_length=SEQUENCE_LENGTH)
        # IMAGE is the token in whose place the GPT reads an embedding of the encoder.
        return MimoModelConfig(gpt, {"images": encoder_spec(infra, "images", Encoder)}, {"images": IMAGE})

    def configure_optimizers(self):
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=self.lr))
