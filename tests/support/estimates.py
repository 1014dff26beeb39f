"""A small model of images and text whose steps are estimated, and measured on real ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from torch.utils.data import Dataset

from lightning_mimo import MimoModelInfra, MimoModule, MimoPrecision, MimoStrategy, ModuleParallelism
from lightning_mimo.models.audio import ClipPatches
from lightning_mimo.models.multimodal import Encoder, multimodal_config
from lightning_mimo.models.sizes import Recompute, TransformerSize
from lightning_mimo.models.vision import ImagePatches
from lightning_mimo.planning.costs import ModuleCosts, RankEstimate
from lightning_mimo.planning.layer_costs import LayerCosts, LayerSettings
from lightning_mimo.planning.step_estimate import step_estimate
from lightning_mimo.strategy.program import step_settings, training_program

IMAGE, CLIP = 3, 4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model and its samples."""

    hidden: int = 64
    heads: int = 4
    vocabulary: int = 256
    tokens: int = 96
    tokens_per_image: int = 16
    tokens_per_clip: int = 8
    samples_per_microbatch: int = 4
    num_microbatches: int = 6


SIZES = Sizes()


class EstimatedModule(MimoModule):
    """A ViT, optionally an encoder of clips, and a GPT, with sizes such that no overhead counts for much."""

    def __init__(
        self,
        *,
        layers: int = 4,
        sequence_parallel: bool = False,
        recompute: Recompute | None = None,
        experts: int | None = None,
        audio: bool = False,
        frozen: tuple[str, ...] = (),
        lr: float = 1e-3,
    ) -> None:
        super().__init__(frozen=frozen)
        sizes = {"hidden_size": SIZES.hidden, "num_attention_heads": SIZES.heads, "recompute": recompute}
        self._encoder = TransformerSize(num_layers=layers, **sizes)
        # Every token goes to every expert: which ones it would go to, an estimate does not know.
        self._language = TransformerSize(
            num_layers=layers, num_experts=experts, experts_per_token=experts or 2, **sizes
        )
        self._sequence_parallel, self._audio, self._lr = sequence_parallel, audio, lr

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        encoders = {
            "images": Encoder(
                patches=ImagePatches(image_size=32, patch_size=4, tokens_per_image=SIZES.tokens_per_image),
                size=self._encoder,
                token_id=IMAGE,
            )
        }
        if self._audio:
            clips = ClipPatches(frames=32, bins=8, frames_per_patch=2, tokens_per_clip=SIZES.tokens_per_clip)
            encoders["audio"] = Encoder(patches=clips, size=self._encoder, token_id=CLIP)
        return multimodal_config(
            infra,
            encoders=encoders,
            language=self._language,
            vocab_size=SIZES.vocabulary,
            max_sequence_length=SIZES.tokens,
            sequence_parallel=self._sequence_parallel,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=self._lr, clip_grad=1.0))


class EqualSamples(Dataset):
    """Samples with one image, and one clip if there is audio, all of the same size."""

    def __init__(self, *, audio: bool = False, number: int = 1024) -> None:
        self._audio, self._number = audio, number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.arange(SIZES.tokens) % (SIZES.vocabulary - 8) + 8
        ids[: SIZES.tokens_per_image] = IMAGE
        inputs: dict[str, Any] = {"images": {"vit": {"pixel_values": torch.ones(1, 3, 32, 32)}}}
        if self._audio:
            ids[SIZES.tokens_per_image : SIZES.tokens_per_image + SIZES.tokens_per_clip] = CLIP
            inputs["audio"] = {"clips": {"features": torch.ones(1, 32, 8)}}
        return {"input_ids": ids, "labels": ids.clamp(min=8), "modality_inputs": inputs}


def strategy_of(
    modules: Mapping[str, ModuleParallelism],
    *,
    colocate: bool = False,
    ddp: Mapping[str, Any] | None = None,
    precision: str = "32-true",
    encoder_run_ahead: int = 1,
    num_microbatches: int = SIZES.num_microbatches,
    **options: Any,
) -> MimoStrategy:
    """The strategy of a run or an estimate."""
    return MimoStrategy(
        dict(modules),
        SIZES.samples_per_microbatch * num_microbatches,
        num_microbatches,
        colocate=colocate,
        ddp=DistributedDataParallelConfig(**(ddp or {})),
        encoder_run_ahead=encoder_run_ahead,
        precision_plugin=MimoPrecision(precision),
        **options,
    )


def trainer_of(strategy: MimoStrategy, *, ranks: int, **options: Any) -> pl.Trainer:
    """A Trainer on CPUs that shows and writes nothing."""
    return pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


def ranks_of(modules: Mapping[str, ModuleParallelism], *, colocate: bool) -> int:
    sizes = [each.size for each in modules.values()]
    return max(sizes) if colocate else sum(sizes)


def estimate(
    modules: Mapping[str, ModuleParallelism],
    *,
    colocate: bool = False,
    ddp: Mapping[str, Any] | None = None,
    precision: str = "32-true",
    encoder_run_ahead: int = 1,
    num_microbatches: int = SIZES.num_microbatches,
    all_layers: bool = False,
    **model: Any,
) -> tuple[RankEstimate, ...]:
    """Estimate a step of an EstimatedModule in a layout."""
    strategy = strategy_of(
        modules,
        colocate=colocate,
        ddp=ddp,
        precision=precision,
        encoder_run_ahead=encoder_run_ahead,
        num_microbatches=num_microbatches,
    )
    trainer = trainer_of(strategy, ranks=ranks_of(modules, colocate=colocate), max_steps=2)
    sample = EqualSamples(audio="audio" in modules)[0]
    with training_program(EstimatedModule(audio="audio" in modules, **model), trainer) as program:
        return step_estimate(
            step_settings(strategy, strategy.validate(), "cpu"), program, sample, all_layers=all_layers
        )


def costs_of(*settings: LayerSettings, precision: str = "32-true", **model: Any) -> list[ModuleCosts]:
    """Costs of the layers of an EstimatedModule."""
    modules = {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}
    strategy = strategy_of(modules, precision=precision)
    trainer = trainer_of(strategy, ranks=2, max_steps=2)
    with training_program(EstimatedModule(**model), trainer) as program:
        policy = strategy.precision_plugin.dtype_policy
        costs = LayerCosts(program, EqualSamples()[0], modules=modules, dtype_policy=policy)
        return [costs(each) for each in settings]
