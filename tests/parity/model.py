"""What is trained in the parity cases: a small model of images, audio and text, and samples hard to share out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.utils.data import Dataset

from lightning_mimo import MimoModelInfra, MimoModule, OptimizerOverride
from lightning_mimo.layers.attention import AttentionKind
from lightning_mimo.models.audio import ClipPatches
from lightning_mimo.models.multimodal import Encoder, multimodal_config
from lightning_mimo.models.sizes import Recompute, TransformerSize
from lightning_mimo.models.vision import ImagePatches

IMAGE, CLIP, TEXT, VOCABULARY = 3, 2, 4, 32
TOKENS_PER_IMAGE, LONGEST_CLIP, FEATURES, HIDDEN = 2, 3, 5, 16
CLIP_PATCHES = ClipPatches(frames=12, bins=FEATURES, frames_per_patch=2, tokens_per_clip=LONGEST_CLIP)
MAX_LENGTH = 32
LR, WEIGHT_DECAY, BETAS, EPSILON = 1e-2, 0.1, (0.9, 0.99), 1e-8
LOSS_SCALE = 2.0**8


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Which samples there are, and what of each modality is in them.

    Attributes:
        number: samples in an epoch.
        images: images of the samples 0, 1, 2, …, over and over.
        clips: audio clips of the same; empty where the model has no audio.
        dense: clips for an AudioEncoder, all of one length, in place of clips for a ClipEncoder.
        masked: which samples have no loss token, over and over.
        bare: leave modality_inputs out where a sample has none, in place of empty tensors.
    """

    number: int = 24
    images: Sequence[int] = (0, 1, 2, 2, 0, 3, 1)
    clips: Sequence[int] = ()
    dense: bool = False
    masked: Sequence[bool] = (False, False, False, True, False)
    bare: bool = False


class PicturesSoundsAndText(Dataset):
    """Samples of different lengths. Clips have different lengths too: one embedding for each frame."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        kinds = self._samples
        generator = torch.Generator().manual_seed(index)
        images = kinds.images[index % len(kinds.images)] if kinds.images else 0
        clips = kinds.clips[index % len(kinds.clips)] if kinds.clips else 0
        frames = torch.randint(LONGEST_CLIP if kinds.dense else 1, LONGEST_CLIP + 1, (clips,), generator=generator)
        placeholders = [IMAGE] * (images * TOKENS_PER_IMAGE) + [CLIP] * int(frames.sum())
        length = 3 + len(placeholders) + index % 4
        text = torch.randint(TEXT, VOCABULARY, (length + 1,), generator=generator)
        # Before, after and between text, and not the same places in every sample.
        places = torch.randperm(length - 1, generator=generator)[: len(placeholders)].sort().values
        text[places] = torch.tensor(placeholders, dtype=torch.int64)
        mask = (torch.rand(length, generator=generator) < 0.6).float()
        mask[-1] = 1.0
        inputs: dict[str, Any] = {}
        if images or not kinds.bare:
            inputs["images"] = {"vit": {"pixel_values": torch.randn(images, 1, 4, 4, generator=generator)}}
        if kinds.clips and (clips or not kinds.bare):
            longest = CLIP_PATCHES.frames if kinds.dense else LONGEST_CLIP
            sound = torch.randn(clips, longest, FEATURES, generator=generator)
            arguments = {"features": sound} if kinds.dense else {"frames": sound, "lengths": frames}
            inputs["audio"] = {"clips": arguments}
        sample = {
            "input_ids": text[:-1],
            "labels": torch.where(text[1:] < TEXT, TEXT, text[1:]),
            "loss_mask": mask * (not kinds.masked[index % len(kinds.masked)]),
        }
        return {**sample, "modality_inputs": inputs} if inputs else sample


class ClipEncoder(torch.nn.Module):
    """An encoder as a user would bring it: plain PyTorch, its own initial values, a part that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(FEATURES))
        self.inner = torch.nn.Linear(FEATURES, HIDDEN)
        torch.nn.init.trunc_normal_(self.inner.weight, std=0.5, a=-0.6, b=0.6)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """``[n, longest, features], [n] -> [sum(lengths), hidden]``"""
        encoded = torch.tanh(self.inner(frames * self.scale))
        return encoded[torch.arange(frames.size(1)) < lengths.unsqueeze(1)]


class SequenceFirst(torch.nn.Module):
    """What goes wrong most easily: an encoder that returns (tokens, items, hidden), as Megatron's transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(FEATURES, HIDDEN)

    def forward(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.inner(frames).transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which model is trained, the same in every layout.

    Attributes:
        image_layers: of the image encoder.
        audio: with a second encoder.
        clip_encoder: the class of that encoder; None is an AudioEncoder, which wants Samples(dense=True).
        style: of the language module, with fewer heads of keys and values where it is "llama".
        experts: experts of every language MLP; None is a dense model.
        tied: whether the head shares the weights of the word embeddings.
        frozen: as for MimoModule.
        dropout: probability, everywhere.
        clip_grad: largest global gradient norm.
        overrides: as for build_optimizer.
    """

    image_layers: int = 2
    audio: bool = False
    clip_encoder: type[torch.nn.Module] | None = ClipEncoder
    style: Literal["gpt", "llama"] = "gpt"
    experts: int | None = None
    tied: bool = False
    frozen: tuple[str, ...] = ()
    dropout: float = 0.0
    clip_grad: float = 0.05
    overrides: Mapping[str, OptimizerOverride] = field(default_factory=dict)


def optimizer_config(model: Model) -> OptimizerConfig:
    """How a model is trained."""
    return OptimizerConfig(
        optimizer="adam",
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPSILON,
        clip_grad=model.clip_grad,
        initial_loss_scale=LOSS_SCALE,
    )


class ParityModule(MimoModule):
    """The model of a case; four language layers, and of everything four heads."""

    def __init__(
        self,
        model: Model,
        *,
        sequence_parallel: bool = False,
        recompute: Recompute | None = None,
        attention: AttentionKind = "sdpa",
    ) -> None:
        super().__init__(pad_token_id=0, frozen=model.frozen)
        self._choice = model
        self._sequence_parallel = sequence_parallel
        self._recompute = recompute
        self._attention = attention

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        choice = self._choice
        small = TransformerSize(
            num_layers=2,
            hidden_size=8,
            num_attention_heads=4,
            ffn_hidden_size=16,
            dropout=choice.dropout,
            recompute=self._recompute,
            attention=self._attention,
        )
        patches = ImagePatches(image_size=4, patch_size=2, channels=1, tokens_per_image=TOKENS_PER_IMAGE)
        pictures = replace(small, num_layers=choice.image_layers)
        encoders = {"images": Encoder(patches=patches, size=pictures, token_id=IMAGE)}
        if choice.audio and choice.clip_encoder is None:
            encoders["audio"] = Encoder(patches=CLIP_PATCHES, size=small, token_id=CLIP)
        config = multimodal_config(
            infra,
            encoders=encoders,
            language=TransformerSize(
                num_layers=4,
                hidden_size=HIDDEN,
                num_attention_heads=4,
                num_query_groups=2 if choice.style == "llama" else None,
                ffn_hidden_size=32,
                style=choice.style,
                dropout=choice.dropout,
                num_experts=choice.experts,
                recompute=self._recompute,
                attention=self._attention,
            ),
            vocab_size=VOCABULARY,
            max_sequence_length=MAX_LENGTH,
            tie_embeddings=choice.tied,
            sequence_parallel=self._sequence_parallel,
        )
        if choice.audio and choice.clip_encoder is not None:
            encoder = ModuleSpec(module=choice.clip_encoder)
            config.modality_submodules_spec["audio"] = ModuleSpec(
                module=AudioModalitySubmodules,
                params={"pg_collection": infra.pg_collections.get("audio")},
                submodules={"encoders": {"clips": encoder}},
            )
            config.special_token_ids["audio"] = CLIP
        return config

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build_optimizer(optimizer_config(self._choice), overrides=self._choice.overrides)
