"""A ViT, a projector and a language model of any size."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig

from examples.digits.schedule import warmup_then_cosine
from lightning_mimo import MimoModelInfra, MimoModule, OptimizerOverride
from lightning_mimo.models import Encoder, ImagePatches, TransformerSize, multimodal_config


class LlavaModule(MimoModule):
    """Modules ``images`` (ViT and projector) and ``language``."""

    def __init__(
        self,
        *,
        vision: TransformerSize,
        language: TransformerSize,
        image_size: int,
        patch_size: int,
        tokens_per_image: int,
        vocab_size: int,
        max_sequence_length: int,
        image_token_id: int,
        pad_token_id: int = 0,
        sequence_parallel: bool = True,
        lr: float = 2e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        clip_grad: float = 1.0,
        frozen: Sequence[str] = (),
        overrides: dict[str, OptimizerOverride] | None = None,
        init_from: str | None = None,
        init_missing: Sequence[str] = (),
    ) -> None:
        """
        Args:
            vision: size of the ViT.
            language: size of the language model.
            image_size: height and width of an image in pixels.
            patch_size: height and width of a patch in pixels.
            tokens_per_image: number of language tokens per image.
            vocab_size: number of token ids, including the image token; the language module's tp must divide it.
            max_sequence_length: maximum sequence length in tokens, including those of images.
            image_token_id: placeholder in ``input_ids``, one for each language token of an image.
            pad_token_id: pads ``input_ids`` if samples of a microbatch differ in length.
            sequence_parallel: split the sequence over the language module's tensor-parallel ranks outside attention
                and MLP.
            lr: peak learning rate after the warm-up; decays to 0 along a cosine.
            weight_decay: weight decay, applied to matrices only.
            warmup_steps: optimizer steps of linear warm-up.
            clip_grad: maximum gradient norm over all modules.
            frozen: modules or parts of modules that are not trained, such as ``images.encoders``.
            overrides: other learning rate, weight decay or clipping by module or part of a module.
            init_from: checkpoint or safetensors files that the weights start from; see MimoModule.
            init_missing: modules or parts of modules that these do not hold.
        """
        super().__init__(pad_token_id=pad_token_id, frozen=frozen, init_from=init_from, init_missing=init_missing)
        self.vision = vision
        self.language = language
        self.patches = ImagePatches(image_size=image_size, patch_size=patch_size, tokens_per_image=tokens_per_image)
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self.image_token_id = image_token_id
        self.sequence_parallel = sequence_parallel
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.clip_grad = clip_grad
        self.overrides = overrides

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        return multimodal_config(
            infra,
            encoders={"images": Encoder(patches=self.patches, size=self.vision, token_id=self.image_token_id)},
            language=self.language,
            vocab_size=self.vocab_size,
            max_sequence_length=self.max_sequence_length,
            sequence_parallel=self.sequence_parallel,
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = OptimizerConfig(
            optimizer="adam",
            lr=self.lr,
            weight_decay=self.weight_decay,
            adam_beta1=0.9,
            adam_beta2=0.95,
            clip_grad=self.clip_grad,
        )
        optimizer = self.build_optimizer(config, overrides=self.overrides)
        steps = int(self.trainer.estimated_stepping_batches)
        return warmup_then_cosine(optimizer, warmup_steps=self.warmup_steps, steps=steps)
