"""The digits model: a small ViT that encodes images, and a small GPT that answers a question about them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig

from examples.digits.data import VOCAB_SIZE, Token, sequence_length
from examples.digits.schedule import warmup_then_cosine
from lightning_mimo import MimoModelInfra, MimoModule, OptimizerOverride
from lightning_mimo.models import ImagePatches, TransformerSize, vision_language_config


class DigitsModule(MimoModule):
    """Modules ``images`` (ViT and projector, one token per image) and ``language`` (GPT)."""

    def __init__(
        self,
        *,
        vision: TransformerSize,
        language: TransformerSize,
        max_images: int = 2,
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
            language: size of the GPT.
            max_images: maximum number of images in a sample; must be equal to that of the data.
            lr: peak learning rate after the warm-up; decays to 0 along a cosine.
            weight_decay: weight decay, applied to matrices only.
            warmup_steps: optimizer steps of linear warm-up.
            clip_grad: maximum gradient norm over all modules.
            frozen: modules or parts of modules that are not trained, such as ``images.encoders``.
            overrides: other learning rate, weight decay or clipping by module or part of a module.
        """
        super().__init__(pad_token_id=int(Token.PAD), max_new_tokens=max_images + 1, frozen=frozen)
        self.vision = vision
        self.language = language
        self.sequence_length = sequence_length(max_images)
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.clip_grad = clip_grad
        self.overrides = overrides

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        return vision_language_config(
            infra,
            patches=ImagePatches(image_size=8, patch_size=4, channels=1),
            vision=self.vision,
            language=self.language,
            vocab_size=VOCAB_SIZE,
            max_sequence_length=self.sequence_length + self.max_new_tokens,
            image_token_id=int(Token.IMAGE),
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.build_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=self.lr,
                weight_decay=self.weight_decay,
                adam_beta1=0.9,
                adam_beta2=0.99,
                clip_grad=self.clip_grad,
            ),
            overrides=self.overrides,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        return warmup_then_cosine(optimizer, warmup_steps=self.warmup_steps, steps=steps)
