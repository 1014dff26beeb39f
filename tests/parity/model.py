"""What is trained in the parity cases: a small model of images, audio and text, and samples hard to share out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.utils.data import Dataset

from lightning_mimo import ItemSizes, MimoModelInfra, MimoModule, OptimizerOverride, Ragged, sum_by_sample
from lightning_mimo.layers.attention import AttentionKind
from lightning_mimo.layers.vocab_parallel import token_losses
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.models.audio import ClipPatches, PipelinedAudioSubmodules
from lightning_mimo.models.multimodal import Encoder, multimodal_config
from lightning_mimo.models.sizes import Recompute, TransformerSize
from lightning_mimo.models.vision import ImagePatches
from lightning_mimo.schedule.forward_backward import Metrics

IMAGE, CLIP, TEXT, VOCABULARY = 3, 2, 4, 32
TOKENS_PER_IMAGE, LONGEST_CLIP, FEATURES, HIDDEN = 2, 3, 5, 16
CLIP_PATCHES = ClipPatches(frames=12, bins=FEATURES, frames_per_patch=2, tokens_per_clip=LONGEST_CLIP)
MERGE, SHAPES = 2, ((1, 2, 2), (1, 2, 4), (2, 2, 2), (1, 4, 2))  # of patches: time, height, width
MAX_LENGTH = 48
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
        sizes: how clips of different lengths are given: padded with their lengths, or as rows with the lengths (Ragged)
            or a grid (time, height, width) of each.
        in_space: give positions of three dimensions.
        weighted: give every sample a weight, a number for each token and a name.
        masked: which samples have no loss token, over and over.
        costly: declare what samples cost, so that batches are balanced.
        bare: leave modality_inputs out where a sample has none, in place of empty tensors.
    """

    number: int = 24
    images: Sequence[int] = (0, 1, 2, 2, 0, 3, 1)
    clips: Sequence[int] = ()
    dense: bool = False
    sizes: Literal["padded", "ragged", "grid"] = "padded"
    in_space: bool = False
    weighted: bool = False
    masked: Sequence[bool] = (False, False, False, True, False)
    costly: bool = False
    bare: bool = False


class PicturesSoundsAndText(Dataset):
    """Samples of different lengths. Clips have different lengths too: one embedding for each frame."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples.number

    def length(self, index: int) -> int:
        return len(self[index]["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        kinds = self._samples
        generator = torch.Generator().manual_seed(index)
        images = kinds.images[index % len(kinds.images)] if kinds.images else 0
        clips = kinds.clips[index % len(kinds.clips)] if kinds.clips else 0
        frames = torch.randint(LONGEST_CLIP if kinds.dense else 1, LONGEST_CLIP + 1, (clips,), generator=generator)
        grids = torch.tensor(SHAPES)[torch.randint(len(SHAPES), (clips,), generator=generator)].view(-1, 3)
        embeddings = grids.prod(dim=-1) // MERGE**2 if kinds.sizes == "grid" else frames
        placeholders = [IMAGE] * (images * TOKENS_PER_IMAGE) + [CLIP] * int(embeddings.sum())
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
            inputs["audio"] = {"clips": _clips(kinds, frames, grids, generator)}
        sample = {
            "input_ids": text[:-1],
            "labels": torch.where(text[1:] < TEXT, TEXT, text[1:]),
            "loss_mask": mask * (not kinds.masked[index % len(kinds.masked)]),
        }
        if kinds.in_space:
            steps = torch.randint(0, 3, (3, length), generator=generator)
            sample["position_ids"] = steps.cumsum(dim=1)
        if kinds.weighted:
            numbers = torch.rand(length, generator=generator, dtype=torch.float64)
            sample |= {"weight": 0.5 + index, "numbers": numbers, "source": {"name": str(index)}}
        return {**sample, "modality_inputs": inputs} if inputs else sample


class CostlyPictures(PicturesSoundsAndText):
    """The same samples, with the work that they are for each module."""

    def cost(self, index: int) -> dict[str, float]:
        sample = self[index]
        inputs = sample.get("modality_inputs", {})
        costs = {"language": float(len(sample["input_ids"]))}
        if "images" in inputs:
            costs["images"] = float(len(inputs["images"]["vit"]["pixel_values"]))
        if "audio" in inputs:
            costs["audio"] = float((sample["input_ids"] == CLIP).sum())
        return costs


def _clips(kinds: Samples, frames: torch.Tensor, grids: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
    """The arguments of the encoder of clips."""
    if kinds.sizes == "grid":
        rows = int(grids.prod(dim=-1).sum())
        return {"pixel_values": torch.randn(rows, FEATURES, generator=generator), "image_grid_thw": grids}
    if kinds.sizes == "ragged":
        rows = torch.randn(int(frames.sum()), FEATURES, generator=generator)
        return {"frames": Ragged(values=rows, lengths=frames)}
    longest = CLIP_PATCHES.frames if kinds.dense else LONGEST_CLIP
    sound = torch.randn(len(frames), longest, FEATURES, generator=generator)
    return {"features": sound} if kinds.dense else {"frames": sound, "lengths": frames}


def _frames(inputs: Mapping[str, Any]) -> torch.Tensor:
    return inputs["lengths"]


class ClipEncoder(torch.nn.Module):
    """An encoder as a user would bring it: plain PyTorch, its own initial values, a part that is never used."""

    item_sizes = ItemSizes(embeddings=_frames)

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


def _with_means(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Add to every row what its item has on average, so that a wrong cut between items is seen."""
    items = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = rows.new_zeros(len(lengths), rows.size(1)).index_add(0, items, rows)
    return rows + (sums / lengths.unsqueeze(1)).index_select(0, items)


class RaggedClipEncoder(torch.nn.Module):
    """Makes an embedding of every row of a Ragged, which it need not declare."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(FEATURES, HIDDEN)

    def forward(self, frames: Ragged) -> torch.Tensor:
        """``[rows, features] -> [rows, hidden]``"""
        return _with_means(torch.tanh(self.inner(frames.values)), frames.lengths)


class GridEncoder(torch.nn.Module):
    """Takes what the processor of a Qwen2.5-VL gives, and makes an embedding of four patches each."""

    item_sizes = ItemSizes.of_grid(merge_size=MERGE)

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(FEATURES, HIDDEN)
        self.merge = torch.nn.Linear(MERGE**2 * HIDDEN, HIDDEN)

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """``[patches, features], [items, 3] -> [embeddings, hidden]``"""
        patches = _with_means(torch.tanh(self.inner(pixel_values)), image_grid_thw.prod(dim=-1))
        return self.merge(patches.view(-1, MERGE**2 * HIDDEN))


class PipelinedGridEncoder(torch.nn.Module):
    """The same cut in two; the second stage needs to know the grids as well."""

    item_sizes = ItemSizes.of_grid(merge_size=MERGE)

    def __init__(self, pg_collection: ProcessGroupCollection) -> None:
        super().__init__()
        self._is_first = pg_collection.pp.rank() == 0
        self._is_last = pg_collection.pp.rank() == pg_collection.pp.size() - 1
        if self._is_first:
            self.inner = torch.nn.Linear(FEATURES, HIDDEN)
        if self._is_last:
            self.merge = torch.nn.Linear(MERGE**2 * HIDDEN, HIDDEN)

    def forward(
        self,
        image_grid_thw: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[items, 3]``, and ``[patches, features]`` or ``[patches, 1, hidden]``"""
        lengths = image_grid_thw.prod(dim=-1)
        hidden = torch.tanh(self.inner(pixel_values)) if self._is_first else hidden_states[:, 0]
        hidden = _with_means(hidden, lengths) if self._is_first else hidden
        if not self._is_last:
            return hidden.unsqueeze(1)
        return self.merge(_with_means(hidden, lengths).view(-1, MERGE**2 * HIDDEN))


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
        in_space: with multimodal rotary positions.
        learned_positions: with learned ones.
        weighted: with a loss that weights samples and tokens.
        style: of the language module, with fewer heads of keys and values where it is "llama".
        experts: experts of every language MLP; None is a dense model.
        balancing_loss: coefficient of their balancing loss.
        tied: whether the head shares the weights of the word embeddings.
        frozen: as for MimoModule.
        dropout: probability, everywhere.
        clip_grad: largest global gradient norm.
        overrides: as for build_optimizer.
    """

    image_layers: int = 2
    audio: bool = False
    clip_encoder: type[torch.nn.Module] | None = ClipEncoder
    in_space: bool = False
    learned_positions: bool = False
    weighted: bool = False
    style: Literal["gpt", "llama"] = "gpt"
    experts: int | None = None
    balancing_loss: float = 0.0
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

    takes_packed = True

    def __init__(
        self,
        model: Model,
        *,
        sequence_parallel: bool = False,
        recompute: Recompute | None = None,
        attention: AttentionKind = "sdpa",
    ) -> None:
        extra_keys = ("weight", "numbers", "source") if model.weighted else ()
        super().__init__(pad_token_id=0, frozen=model.frozen, extra_keys=extra_keys)
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
                balancing_loss=choice.balancing_loss,
                recompute=self._recompute,
                attention=self._attention,
            ),
            vocab_size=VOCABULARY,
            max_sequence_length=MAX_LENGTH,
            tie_embeddings=choice.tied,
            sequence_parallel=self._sequence_parallel,
        )
        if choice.audio and choice.clip_encoder is not None:
            params = {"pg_collection": infra.pg_collections.get("audio")}
            is_pipelined = choice.clip_encoder is PipelinedGridEncoder
            encoder = ModuleSpec(module=choice.clip_encoder, params=params if is_pipelined else {})
            config.modality_submodules_spec["audio"] = ModuleSpec(
                module=PipelinedAudioSubmodules if is_pipelined else AudioModalitySubmodules,
                params=params,
                submodules={"encoders": {"clips": encoder}},
            )
            config.special_token_ids["audio"] = CLIP
        if choice.in_space:
            gpt = config.language_model_spec.params
            gpt["position_embedding_type"] = "mrope"
            gpt["config"].kv_channels, gpt["config"].mrope_section = 8, [1, 2, 1]
        if choice.learned_positions:
            config.language_model_spec.params["position_embedding_type"] = "learned_absolute"
        return config

    def loss(self, output: torch.Tensor, batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """The usual one; or, where the model is weighted, one that looks at what samples have beside."""
        if not self._choice.weighted:
            return super().loss(output, batch)
        assert [each["name"] for each in batch["source"]] == [str(index) for index in batch["sample_indices"]]
        group = self.infra.pg_collections[LANGUAGE].tp
        of_tokens = token_losses(output, batch["labels"], group) * batch["loss_mask"] * batch["numbers"]
        of_samples = sum_by_sample(of_tokens, batch) * batch["weight"]
        return of_samples.sum(), (batch["loss_mask"] > 0).sum(), {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build_optimizer(optimizer_config(self._choice), overrides=self._choice.overrides)
