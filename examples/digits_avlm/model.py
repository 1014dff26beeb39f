"""The digits model with a second encoder: a small transformer over the spectra of keypad tones."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.models.mimo import MimoModelConfig

from examples.digits.model import DigitsModule
from examples.digits_avlm.data import MOST, SEQUENCE_LENGTH, VOCAB_SIZE, Token
from examples.digits_avlm.tones import BINS, FRAMES
from lightning_mimo import MimoModelInfra, OptimizerOverride
from lightning_mimo.models import ClipPatches, Encoder, ImagePatches, TransformerSize, multimodal_config


class DigitsAvlmModule(DigitsModule):
    """Modules ``images`` and ``audio`` (encoder and projector, one token per image or tone) and ``language``."""

    def __init__(
        self,
        *,
        vision: TransformerSize,
        audio: TransformerSize,
        language: TransformerSize,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 50,
        clip_grad: float = 1.0,
        frozen: Sequence[str] = (),
        overrides: dict[str, OptimizerOverride] | None = None,
    ) -> None:
        """
        Args:
            vision: size of the ViT.
            audio: size of the audio encoder.
            language: size of the GPT.
            lr: peak learning rate after the warm-up; decays to 0 along a cosine.
            weight_decay: weight decay, applied to matrices only.
            warmup_steps: optimizer steps of linear warm-up.
            clip_grad: maximum gradient norm over all modules.
            frozen: modules or parts of modules that are not trained, such as ``audio.encoders``.
            overrides: other learning rate, weight decay or clipping by module or part of a module.
        """
        super().__init__(
            vision=vision,
            language=language,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            clip_grad=clip_grad,
            frozen=frozen,
            overrides=overrides,
        )
        self.audio = audio
        self.max_new_tokens = 2 * MOST + 1

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        return multimodal_config(
            infra,
            encoders={
                "images": Encoder(
                    patches=ImagePatches(image_size=8, patch_size=4, channels=1),
                    size=self.vision,
                    token_id=int(Token.IMAGE),
                ),
                "audio": Encoder(
                    patches=ClipPatches(frames=FRAMES, bins=BINS), size=self.audio, token_id=int(Token.CLIP)
                ),
            },
            language=self.language,
            vocab_size=VOCAB_SIZE,
            max_sequence_length=SEQUENCE_LENGTH + self.max_new_tokens,
        )
