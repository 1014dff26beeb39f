"""The named cases: which task is trained in which layout."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import torch

from lightning_mimo import LayoutError, ModuleParallelism, OptimizerOverride
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.models.sizes import Recompute
from tests.parity.layouts import Layout
from tests.parity.model import GridEncoder, Model, PipelinedGridEncoder, RaggedClipEncoder, Samples
from tests.parity.oracle import Task

MAX_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    task: Task = field(default_factory=Task)
    layout: Layout


USUAL = Samples()
CLIPS = Samples(clips=(1, 0, 2, 1, 0))
DENSE_CLIPS = replace(CLIPS, dense=True)
RAGGED_CLIPS = replace(CLIPS, sizes="ragged")
GRIDS = replace(CLIPS, sizes="grid")
RARE_GRIDS = replace(GRIDS, clips=(2, *[0] * 6), bare=True)
COSTLY = Samples(costly=True)
COSTLY_GRIDS = replace(GRIDS, costly=True)
IN_SPACE = Samples(in_space=True)
WEIGHTED = Samples(weighted=True)
# One sample in twelve has images, so most microbatches and most replicas see none.
RARE = Samples(images=(3, *[0] * 11))
RARE_AND_BARE = replace(RARE, bare=True)
CHANGING_AND_BARE = Samples(number=48, images=(3, *[0] * 15, 2, 0, 0, 1), bare=True)
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 100}
PROJECTOR_ONLY = ("language", "images.encoders")
PATCH_EMBEDDING = ("images.encoders.vit.patch_embedding", "images.encoders.vit.positions")
FIRST_STAGE = ("images", "language.embedding", "language.decoder.layers.0")
FIRST_HALF = ("images", "language.embedding", "language.decoder.layers.0", "language.decoder.layers.1")

OVERRIDES = {
    "images": OptimizerOverride(lr=3e-3, weight_decay=0.3),
    "images.input_projections": OptimizerOverride(lr=2e-2, clip_grad=0.01),
    "language.decoder": OptimizerOverride(lr=2e-3, clip_grad=0.02),
    "language.decoder.layers.1": OptimizerOverride(weight_decay=0.0),
}


def apart(
    images: ModuleParallelism, language: ModuleParallelism, audio: ModuleParallelism | None = None, **options: object
) -> Layout:
    """Every module on ranks of its own."""
    modules = {"images": images, **({} if audio is None else {"audio": audio}), "language": language}
    return Layout(modules={name: replace(cut, dp=cut.dp or 1) for name, cut in modules.items()}, **options)


def together(
    images: ModuleParallelism, language: ModuleParallelism, audio: ModuleParallelism | None = None, **options: object
) -> Layout:
    """All modules on the same ranks."""
    return apart(images, language, audio, colocate=True, **options)


def task(
    *,
    samples: Samples = USUAL,
    batch: int = 12,
    pack_to: int | None = None,
    accumulate: int = 1,
    steps: int = 2,
    precision: str = "64-true",
    start: torch.dtype = torch.float64,
    **model: object,
) -> Task:
    return Task(
        model=Model(**model),
        samples=samples,
        batch=batch,
        pack_to=pack_to,
        accumulate=accumulate,
        steps=steps,
        precision=precision,
        start=start,
    )


def packed(*, number: int = 48, pack_to: int = 24, samples: Samples = USUAL, **options: object) -> Task:
    """Samples of 3 to 12 tokens in rows of 24, six rows to a batch; the last batch of an epoch is short."""
    return task(samples=replace(samples, number=number), batch=6, pack_to=pack_to, steps=3, **options)


def packed_cases() -> dict[str, Case]:
    """Packed rows in every kind of layout and model."""
    one, two = ModuleParallelism(), ModuleParallelism(dp=2)
    tp2, pp2, tp2dp2 = ModuleParallelism(tp=2), ModuleParallelism(pp=2), ModuleParallelism(tp=2, dp=2)
    three = {"num_microbatches": 3}
    with_experts = {"experts": 4, "balancing_loss": 0.3}
    return {
        "one_rank": Case(task=packed(), layout=together(one, one)),
        "apart": Case(task=packed(), layout=apart(two, two, **three)),
        "colocated": Case(task=packed(), layout=together(two, tp2, **three)),
        "sequence_parallel": Case(task=packed(), layout=apart(two, tp2, sequence_parallel=True, **three)),
        "pipelines": Case(task=packed(image_layers=2), layout=apart(pp2, pp2, **three)),
        "fan_in": Case(task=packed(), layout=apart(two, one, **three)),
        "fan_out": Case(task=packed(), layout=apart(one, two, **three)),
        "colocated-fan_in": Case(task=packed(), layout=together(two, tp2, **three)),
        "colocated-fan_out": Case(task=packed(), layout=together(tp2, two, **three)),
        "two_encoders": Case(
            task=packed(audio=True, samples=CLIPS, pack_to=30),
            layout=apart(two, tp2, one, sequence_parallel=True, **three),
        ),
        "grids-pipelined": Case(
            task=packed(audio=True, clip_encoder=PipelinedGridEncoder, samples=GRIDS, pack_to=30),
            layout=apart(one, two, pp2, **three),
        ),
        "positions_in_space": Case(
            task=packed(in_space=True, samples=IN_SPACE), layout=apart(one, ModuleParallelism(tp=2, pp=2))
        ),
        "positions_in_space-sequence_parallel": Case(
            task=packed(in_space=True, samples=IN_SPACE), layout=apart(two, tp2dp2, sequence_parallel=True, **three)
        ),
        "learned_positions": Case(task=packed(learned_positions=True), layout=apart(one, pp2)),
        "llama": Case(task=packed(style="llama"), layout=apart(two, tp2dp2, **three)),
        "experts": Case(
            task=packed(**with_experts),
            layout=apart(one, ModuleParallelism(tp=2, dp=2, ep=2), sequence_parallel=True, **three),
        ),
        "experts-recompute": Case(
            task=packed(**with_experts, accumulate=2),
            layout=apart(two, ModuleParallelism(dp=2, pp=2), recompute=Recompute(), **three),
        ),
        "weighted": Case(task=packed(weighted=True, samples=WEIGHTED), layout=apart(two, tp2dp2, **three)),
        "frozen": Case(task=packed(frozen=PROJECTOR_ONLY), layout=apart(pp2, pp2)),
        "even_work": Case(task=packed(samples=COSTLY), layout=apart(two, two, **three)),
        "accumulation": Case(task=packed(accumulate=2), layout=together(two, tp2, **three)),
        "recompute": Case(task=packed(), layout=apart(two, pp2, recompute=Recompute(), **three)),
        "rare_images": Case(task=packed(samples=RARE_AND_BARE), layout=apart(two, one, **three)),
    }


LAYOUTS = {
    "images_dp1-language_dp1": apart(ModuleParallelism(), ModuleParallelism()),
    "images_dp2-language_dp2": apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2), num_microbatches=3),
    "images_dp2-language_tp2": apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    "images_tp2-language_pp2": apart(ModuleParallelism(tp=2), ModuleParallelism(pp=2)),
    "images_pp2-language_dp2": apart(ModuleParallelism(pp=2), ModuleParallelism(dp=2)),
    "images_dp1-language_dp4": apart(ModuleParallelism(), ModuleParallelism(dp=4), num_microbatches=3),
    "images_dp4-language_dp2pp2": apart(ModuleParallelism(dp=4), ModuleParallelism(dp=2, pp=2), num_microbatches=3),
    "images_dp4-language_tp2pp2": apart(ModuleParallelism(dp=4), ModuleParallelism(tp=2, pp=2), num_microbatches=3),
    "images_tp2pp2-language_pp4": apart(ModuleParallelism(tp=2, pp=2), ModuleParallelism(pp=4)),
    "images_pp2dp2-language_tp4": apart(ModuleParallelism(pp=2, dp=2), ModuleParallelism(tp=4)),
    "images_tp4-language_dp4": apart(ModuleParallelism(tp=4), ModuleParallelism(dp=4), num_microbatches=3),
    "colocated-one_rank": together(ModuleParallelism(), ModuleParallelism()),
    "colocated-images_dp2-language_tp2": together(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    "colocated-images_dp4-language_tp2dp2": together(
        ModuleParallelism(dp=4), ModuleParallelism(tp=2, dp=2), num_microbatches=3
    ),
    "colocated-images_tp4-language_dp4": together(ModuleParallelism(tp=4), ModuleParallelism(dp=4), num_microbatches=1),
    "colocated-images_tp2dp2-language_tp4": together(ModuleParallelism(tp=2, dp=2), ModuleParallelism(tp=4)),
}

CASES = {
    **{name: Case(layout=layout) for name, layout in LAYOUTS.items()},
    # ---- sequence parallel
    "sequence_parallel-language_tp2": Case(
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2), sequence_parallel=True)
    ),
    "images_pp3-language_dp2": Case(
        task=task(image_layers=3), layout=apart(ModuleParallelism(pp=3), ModuleParallelism(dp=2), num_microbatches=6)
    ),
    "images_pp4-language_tp2pp2": Case(
        task=task(image_layers=4),
        layout=apart(ModuleParallelism(pp=4), ModuleParallelism(tp=2, pp=2), num_microbatches=6),
    ),
    "sequence_parallel-language_tp4pp2": Case(
        layout=apart(ModuleParallelism(), ModuleParallelism(tp=2, pp=2), sequence_parallel=True)
    ),
    "sequence_parallel-colocated-language_tp4": Case(
        layout=together(ModuleParallelism(dp=4), ModuleParallelism(tp=4), num_microbatches=3, sequence_parallel=True)
    ),
    # ---- a mixture of experts
    "experts-one_rank": Case(task=task(experts=4), layout=together(ModuleParallelism(), ModuleParallelism())),
    "experts-language_dp2ep2": Case(
        task=task(experts=4), layout=apart(ModuleParallelism(), ModuleParallelism(dp=2, ep=2))
    ),
    "experts-language_dp2": Case(
        task=task(experts=4), layout=apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2, pp=2))
    ),
    "experts-language_tp2dp2ep2": Case(
        task=task(experts=4),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, dp=2, ep=2), sequence_parallel=True),
    ),
    "experts-language_tp2ep2": Case(
        task=task(experts=4), layout=apart(ModuleParallelism(), ModuleParallelism(tp=2, ep=2), sequence_parallel=True)
    ),
    "experts-language_tp2expt_tp2": Case(
        task=task(experts=4),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, expt_tp=2), sequence_parallel=True),
    ),
    "experts-language_dp2expt_tp2": Case(
        task=task(experts=4), layout=apart(ModuleParallelism(), ModuleParallelism(dp=2, pp=2, expt_tp=2))
    ),
    "experts-language_dp4ep2expt_tp2": Case(
        task=task(experts=4),
        layout=apart(ModuleParallelism(), ModuleParallelism(dp=4, ep=2, expt_tp=2), num_microbatches=3),
    ),
    "experts-colocated-language_dp4ep4": Case(
        task=task(experts=4),
        layout=together(ModuleParallelism(dp=4), ModuleParallelism(dp=4, ep=4), num_microbatches=3),
    ),
    "balanced_experts-one_rank": Case(
        task=task(experts=4, balancing_loss=0.3),
        layout=together(ModuleParallelism(), ModuleParallelism(), num_microbatches=3),
    ),
    "balanced_experts-language_tp2dp2ep2": Case(
        task=task(experts=4, balancing_loss=0.3, samples=Samples(number=31), steps=3),
        layout=apart(ModuleParallelism(), ModuleParallelism(tp=2, dp=2, ep=2), sequence_parallel=True),
    ),
    "balanced_experts-recompute-language_pp2dp2": Case(
        task=task(experts=4, balancing_loss=0.3, accumulate=2, samples=Samples(number=48)),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2, pp=2), num_microbatches=3, recompute=Recompute()),
    ),
    # ---- two encoders
    "two-colocated-one_rank": Case(
        task=task(audio=True, samples=CLIPS),
        layout=together(ModuleParallelism(), ModuleParallelism(), ModuleParallelism()),
    ),
    "two-images_dp2-audio_dp1-language_tp2": Case(
        task=task(audio=True, samples=CLIPS),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2), ModuleParallelism()),
    ),
    "two-images_pp2-audio_tp2dp2-language_dp2": Case(
        task=task(audio=True, samples=CLIPS),
        layout=apart(ModuleParallelism(pp=2), ModuleParallelism(dp=2), ModuleParallelism(tp=2, dp=2)),
    ),
    "two-images_pp2-audio_dp1-language_pp2-7_microbatches": Case(
        task=task(audio=True, samples=replace(CLIPS, number=28), batch=14),
        layout=apart(ModuleParallelism(pp=2), ModuleParallelism(pp=2), ModuleParallelism(), num_microbatches=7),
    ),
    "two-colocated-images_tp2dp2-audio_dp4-language_tp4": Case(
        task=task(audio=True, samples=CLIPS),
        layout=together(
            ModuleParallelism(tp=2, dp=2), ModuleParallelism(tp=4), ModuleParallelism(dp=4), num_microbatches=3
        ),
    ),
    "two-no_clip_at_all": Case(
        task=task(audio=True, samples=Samples(clips=(0,), bare=True)),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2), ModuleParallelism()),
    ),
    "two-clips_are_rare": Case(
        task=task(audio=True, samples=Samples(clips=(2, *[0] * 6), bare=True)),
        layout=apart(ModuleParallelism(), ModuleParallelism(dp=2), ModuleParallelism(dp=2)),
    ),
    "audio_encoder-images_dp2-audio_tp2-language_pp2": Case(
        task=task(audio=True, clip_encoder=None, samples=DENSE_CLIPS),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2), ModuleParallelism(tp=2)),
    ),
    "audio_encoder-images_dp2-audio_tp2pp2-language_tp2": Case(
        task=task(audio=True, clip_encoder=None, samples=DENSE_CLIPS),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2), ModuleParallelism(tp=2, pp=2)),
    ),
    "audio_encoder-colocated-images_dp4-audio_tp4-language_tp2dp2": Case(
        task=task(audio=True, clip_encoder=None, samples=DENSE_CLIPS),
        layout=together(
            ModuleParallelism(dp=4), ModuleParallelism(tp=2, dp=2), ModuleParallelism(tp=4), num_microbatches=3
        ),
    ),
    # ---- items of different sizes
    "ragged_rows-fan_in": Case(
        task=task(audio=True, clip_encoder=RaggedClipEncoder, samples=RAGGED_CLIPS),
        layout=apart(ModuleParallelism(), ModuleParallelism(), ModuleParallelism(dp=2)),
    ),
    "ragged_rows-fan_out": Case(
        task=task(audio=True, clip_encoder=RaggedClipEncoder, samples=RAGGED_CLIPS),
        layout=apart(ModuleParallelism(), ModuleParallelism(dp=2), ModuleParallelism()),
    ),
    "ragged_rows-equal": Case(
        task=task(audio=True, clip_encoder=RaggedClipEncoder, samples=RAGGED_CLIPS),
        layout=apart(ModuleParallelism(), ModuleParallelism(dp=2), ModuleParallelism(dp=2), num_microbatches=3),
    ),
    "ragged_rows-colocated": Case(
        task=task(audio=True, clip_encoder=RaggedClipEncoder, samples=RAGGED_CLIPS),
        layout=together(ModuleParallelism(dp=2), ModuleParallelism(tp=2), ModuleParallelism(dp=2)),
    ),
    "ragged_grid-fan_in-language_tp2": Case(
        task=task(audio=True, clip_encoder=GridEncoder, samples=GRIDS),
        layout=apart(ModuleParallelism(), ModuleParallelism(tp=2), ModuleParallelism(dp=4), num_microbatches=3),
    ),
    "ragged_grid-fan_out-language_dp2pp2": Case(
        task=task(audio=True, clip_encoder=GridEncoder, samples=GRIDS),
        layout=apart(ModuleParallelism(), ModuleParallelism(dp=2, pp=2), ModuleParallelism()),
    ),
    "ragged_grid-equal": Case(
        task=task(audio=True, clip_encoder=GridEncoder, samples=GRIDS),
        layout=apart(ModuleParallelism(), ModuleParallelism(dp=2), ModuleParallelism(dp=2)),
    ),
    "ragged_grid-colocated-fan_in": Case(
        task=task(audio=True, clip_encoder=GridEncoder, samples=GRIDS),
        layout=together(
            ModuleParallelism(tp=2, dp=2), ModuleParallelism(tp=4), ModuleParallelism(dp=4), num_microbatches=3
        ),
    ),
    "ragged_grid-colocated-fan_out": Case(
        task=task(audio=True, clip_encoder=GridEncoder, samples=GRIDS),
        layout=together(ModuleParallelism(dp=2), ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    ),
    "ragged_grid-rare": Case(
        task=task(audio=True, clip_encoder=GridEncoder, samples=RARE_GRIDS),
        layout=apart(ModuleParallelism(), ModuleParallelism(pp=2), ModuleParallelism(dp=2), ddp=OVERLAP),
    ),
    "ragged_grid-audio_pp2-language_tp2": Case(
        task=task(audio=True, clip_encoder=PipelinedGridEncoder, samples=GRIDS),
        layout=apart(ModuleParallelism(), ModuleParallelism(tp=2), ModuleParallelism(pp=2), num_microbatches=3),
    ),
    "ragged_grid-audio_pp2dp2-rare": Case(
        task=task(audio=True, clip_encoder=PipelinedGridEncoder, samples=RARE_GRIDS),
        layout=apart(ModuleParallelism(), ModuleParallelism(), ModuleParallelism(pp=2, dp=2)),
    ),
    # ---- samples divided by their costs
    "even_work-apart": Case(
        task=task(samples=COSTLY), layout=apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2), num_microbatches=3)
    ),
    "even_work-fan_in-language_tp2pp2": Case(
        task=task(samples=COSTLY),
        layout=apart(ModuleParallelism(dp=4), ModuleParallelism(tp=2, pp=2), num_microbatches=3),
    ),
    "even_work-fan_out-images_pp2": Case(
        task=task(samples=COSTLY), layout=apart(ModuleParallelism(pp=2), ModuleParallelism(dp=4), num_microbatches=3)
    ),
    "even_work-colocated": Case(
        task=task(samples=COSTLY),
        layout=together(ModuleParallelism(dp=4), ModuleParallelism(tp=2, dp=2), num_microbatches=3),
    ),
    "even_work-ragged_grid-accumulate_3_of_4": Case(
        task=task(
            audio=True, clip_encoder=GridEncoder, samples=replace(COSTLY_GRIDS, number=48), accumulate=3, steps=3
        ),
        layout=apart(ModuleParallelism(), ModuleParallelism(dp=2, pp=2), ModuleParallelism(dp=2)),
    ),
    "even_work-short_last_batch": Case(
        task=task(samples=replace(COSTLY, number=31), steps=3),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2), num_microbatches=3),
    ),
    # ---- positions of three dimensions
    "positions_in_space-language_tp2pp2": Case(
        task=task(in_space=True, samples=IN_SPACE),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, pp=2)),
    ),
    "positions_in_space-sequence_parallel-fan_out": Case(
        task=task(in_space=True, samples=IN_SPACE),
        layout=apart(ModuleParallelism(), ModuleParallelism(tp=2, dp=2), sequence_parallel=True),
    ),
    "positions_in_space-colocated": Case(
        task=task(in_space=True, samples=IN_SPACE),
        layout=together(ModuleParallelism(tp=2), ModuleParallelism(dp=2)),
    ),
    # ---- several samples in a row
    **{f"packed-{name}": case for name, case in packed_cases().items()},
    # ---- what a loss of one's own looks at
    "weighted_samples-language_tp2dp2": Case(
        task=task(weighted=True, samples=WEIGHTED),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, dp=2)),
    ),
    "weighted_samples-colocated": Case(
        task=task(weighted=True, samples=WEIGHTED),
        layout=together(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    ),
    # ---- RMS norms, gated MLPs, fewer heads of keys and values
    "llama-language_tp2pp2": Case(
        task=task(style="llama"), layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, pp=2))
    ),
    "llama-sequence_parallel-language_tp2dp2": Case(
        task=task(style="llama"),
        layout=apart(ModuleParallelism(), ModuleParallelism(tp=2, dp=2), sequence_parallel=True),
    ),
    # ---- which samples have what
    "rare_images-fan_in": Case(
        task=task(samples=RARE), layout=apart(ModuleParallelism(dp=4), ModuleParallelism(), num_microbatches=3)
    ),
    "rare_images-fan_out": Case(
        task=task(samples=RARE), layout=apart(ModuleParallelism(), ModuleParallelism(dp=4), num_microbatches=3)
    ),
    "rare_images-colocated-fan_in": Case(
        task=task(samples=RARE), layout=together(ModuleParallelism(dp=4), ModuleParallelism(tp=4), num_microbatches=3)
    ),
    "rare_images-colocated-fan_out": Case(
        task=task(samples=RARE), layout=together(ModuleParallelism(tp=4), ModuleParallelism(dp=4), num_microbatches=3)
    ),
    "rare_images-left_out-fan_in": Case(
        task=task(samples=RARE_AND_BARE), layout=apart(ModuleParallelism(dp=4), ModuleParallelism(), num_microbatches=3)
    ),
    "rare_images-left_out-colocated": Case(
        task=task(samples=RARE_AND_BARE),
        layout=together(ModuleParallelism(dp=4), ModuleParallelism(tp=4), num_microbatches=3),
    ),
    "text_only-images_dp2": Case(
        task=task(samples=Samples(images=())), layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2))
    ),
    "text_only-left_out-images_pp2": Case(
        task=task(samples=Samples(images=(), bare=True)), layout=apart(ModuleParallelism(pp=2), ModuleParallelism(dp=2))
    ),
    "text_only-left_out-colocated": Case(
        task=task(samples=Samples(images=(), bare=True)),
        layout=together(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    ),
    "batch_without_a_loss_token": Case(
        task=task(samples=Samples(masked=[True] * 12 + [False] * 12)),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    ),
    "microbatch_without_a_loss_token": Case(
        task=task(samples=Samples(masked=[True] * 6 + [False] * 6)),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2)),
    ),
    # ---- cutting the batch
    "1_microbatch": Case(layout=apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2), num_microbatches=1)),
    "7_microbatches": Case(
        task=task(samples=Samples(number=28), batch=14),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2), num_microbatches=7),
    ),
    "accumulate_3_of_4": Case(
        task=task(samples=Samples(number=48), accumulate=3, steps=3),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2)),
    ),
    "accumulate_3_of_4-colocated": Case(
        task=task(samples=Samples(number=48), accumulate=3, steps=3),
        layout=together(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    ),
    "short_last_batch": Case(
        task=task(samples=Samples(number=31), steps=3),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2), num_microbatches=3),
    ),
    # ---- what is trained
    "frozen_images": Case(
        task=task(frozen=("images",)), layout=apart(ModuleParallelism(pp=2), ModuleParallelism(pp=2))
    ),
    "frozen_images-colocated": Case(
        task=task(frozen=("images",)), layout=together(ModuleParallelism(dp=2), ModuleParallelism(tp=2))
    ),
    "frozen_language": Case(
        task=task(frozen=("language",)), layout=apart(ModuleParallelism(pp=2), ModuleParallelism(dp=2, pp=2))
    ),
    "projector_only": Case(
        task=task(frozen=PROJECTOR_ONLY), layout=apart(ModuleParallelism(pp=2), ModuleParallelism(pp=2))
    ),
    "projector_only-colocated": Case(
        task=task(frozen=PROJECTOR_ONLY), layout=together(ModuleParallelism(dp=2), ModuleParallelism(tp=2))
    ),
    "frozen_first_half": Case(
        task=task(frozen=FIRST_HALF), layout=apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2))
    ),
    "frozen_audio": Case(
        task=task(audio=True, samples=CLIPS, frozen=("audio",)),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2), ModuleParallelism()),
    ),
    "tied-language_tp2pp2": Case(
        task=task(tied=True), layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, pp=2))
    ),
    "tied-language_dp2pp2": Case(
        task=task(tied=True), layout=apart(ModuleParallelism(), ModuleParallelism(dp=2, pp=2))
    ),
    "tied-colocated-language_tp2": Case(
        task=task(tied=True), layout=together(ModuleParallelism(dp=2), ModuleParallelism(tp=2))
    ),
    "own_rates_and_clipping": Case(
        task=task(overrides=OVERRIDES, steps=3),
        layout=apart(ModuleParallelism(pp=2, dp=2), ModuleParallelism(tp=2, pp=2)),
    ),
    "own_rates_and_clipping-colocated": Case(
        task=task(overrides=OVERRIDES, steps=3), layout=together(ModuleParallelism(dp=2), ModuleParallelism(tp=2))
    ),
    "own_rates_and_clipping-audio": Case(
        task=task(audio=True, samples=CLIPS, overrides={"audio": OptimizerOverride(lr=3e-2, clip_grad=0.01)}),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2), ModuleParallelism(tp=2)),
    ),
    "own_rates_and_clipping-experts": Case(
        task=task(overrides=OVERRIDES, experts=4), layout=apart(ModuleParallelism(), ModuleParallelism(dp=2, ep=2))
    ),
    # ---- recomputed activations
    "recompute_full": Case(layout=apart(ModuleParallelism(pp=2), ModuleParallelism(tp=2, pp=2), recompute=Recompute())),
    "recompute_full-frozen_images": Case(
        task=task(frozen=("images",)),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(pp=2), recompute=Recompute(method="block")),
    ),
    "recompute_full-frozen_embedding": Case(
        task=task(frozen=("images", "language.embedding")),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2), recompute=Recompute()),
    ),
    "recompute_full-frozen_first_half-language_pp4": Case(
        task=task(frozen=FIRST_STAGE),
        layout=apart(ModuleParallelism(), ModuleParallelism(pp=4), recompute=Recompute()),
    ),
    "recompute_full-frozen_patch_embedding": Case(
        task=task(frozen=PATCH_EMBEDDING, image_layers=2),
        layout=apart(ModuleParallelism(pp=2), ModuleParallelism(dp=2), recompute=Recompute(method="block")),
    ),
    "recompute_full-frozen_embedding-rare_images-colocated": Case(
        task=task(frozen=("language.embedding",), samples=RARE_AND_BARE),
        layout=together(ModuleParallelism(dp=2), ModuleParallelism(tp=2), recompute=Recompute(), num_microbatches=3),
    ),
    "recompute_selective-colocated": Case(
        layout=together(
            ModuleParallelism(dp=2),
            ModuleParallelism(tp=2),
            sequence_parallel=True,
            recompute=Recompute(granularity="selective"),
        )
    ),
    "recompute_full-overlapped-experts": Case(
        task=task(experts=4),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2, ep=2), recompute=Recompute(), ddp=OVERLAP),
    ),
    # ---- Megatron's own attention, held against an oracle with torch's
    "megatron_attention-language_tp2pp2": Case(
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, pp=2), attention="megatron")
    ),
    "megatron_attention-llama-audio-recompute_selective": Case(
        task=task(style="llama", audio=True, clip_encoder=None, samples=DENSE_CLIPS),
        layout=apart(
            ModuleParallelism(tp=2),
            ModuleParallelism(tp=2),
            ModuleParallelism(),
            sequence_parallel=True,
            recompute=Recompute(granularity="selective"),
            attention="megatron",
        ),
    ),
    # ---- overlapped reduction
    "overlapped": Case(layout=apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2, pp=2), ddp=OVERLAP)),
    "overlapped-accumulate_2_of_3": Case(
        task=task(samples=Samples(number=36), accumulate=2),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2), ddp=OVERLAP),
    ),
    "overlapped-changing_images": Case(
        task=task(samples=CHANGING_AND_BARE, steps=4),
        layout=apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2), ddp=OVERLAP),
    ),
    "overlapped-changing_images-colocated": Case(
        task=task(samples=CHANGING_AND_BARE, steps=4),
        layout=together(ModuleParallelism(dp=2), ModuleParallelism(dp=2), ddp=OVERLAP),
    ),
    "overlapped-unused_layer": Case(
        task=task(audio=True, samples=replace(CLIPS, number=36), steps=3),
        layout=apart(ModuleParallelism(), ModuleParallelism(dp=2), ModuleParallelism(dp=2), ddp=OVERLAP),
    ),
    "overlapped-experts": Case(
        task=task(experts=4),
        layout=apart(ModuleParallelism(), ModuleParallelism(dp=4, ep=2), num_microbatches=3, ddp=OVERLAP),
    ),
}


IN_DEFAULT_RUN = frozenset(
    {
        *("images_dp2-language_tp2", "images_tp2-language_pp2", "images_pp2-language_dp2"),
        *("colocated-images_dp4-language_tp2dp2", "colocated-images_tp4-language_dp4"),
        *("sequence_parallel-language_tp4pp2", "balanced_experts-language_tp2dp2ep2", "experts-language_dp2expt_tp2"),
        *("audio_encoder-colocated-images_dp4-audio_tp4-language_tp2dp2", "two-clips_are_rare", "ragged_rows-fan_in"),
        *("ragged_grid-audio_pp2-language_tp2", "positions_in_space-sequence_parallel-fan_out"),
        *("packed-two_encoders", "packed-colocated-fan_in", "even_work-fan_out-images_pp2"),
        *("weighted_samples-colocated", "llama-language_tp2pp2"),
        *("rare_images-left_out-fan_in", "text_only-left_out-images_pp2", "batch_without_a_loss_token"),
        *("7_microbatches", "accumulate_3_of_4", "projector_only", "frozen_first_half", "tied-language_dp2pp2"),
        *("own_rates_and_clipping-colocated", "recompute_full-frozen_embedding", "recompute_selective-colocated"),
        *("megatron_attention-language_tp2pp2", "overlapped-changing_images"),
    }
)
"""One case of each kind. ``pytest -m parity`` runs all of them."""
assert CASES.keys() >= IN_DEFAULT_RUN


def every_layout() -> dict[str, Case]:
    """All dense layouts of the two modules on at most MAX_RANKS ranks that the sizes of the model allow."""
    cases = {}
    tps, dps = (1, 2, 4), (1, 2, 3, 4, 6)
    for tp, pp, dp, language_tp, language_pp, language_dp in product(tps, (1, 2), dps, tps, (1, 2, 4), dps):
        images, language = (
            ModuleParallelism(tp=tp, pp=pp, dp=dp),
            ModuleParallelism(tp=language_tp, pp=language_pp, dp=language_dp),
        )
        for colocate in (False, True):
            layout = apart(images, language, colocate=colocate, num_microbatches=2)
            if _is_legal(layout):
                name = f"images_tp{tp}pp{pp}dp{dp}-language_tp{language_tp}pp{language_pp}dp{language_dp}"
                cases[f"{'colocated-' if colocate else ''}{name}"] = Case(
                    task=task(batch=24, samples=Samples(number=48)), layout=layout
                )
    return cases


def random_case(seed: int) -> Case:
    """A legal layout and a task for it, the same for the same seed."""
    draw = random.Random(seed)
    return next(case for case in _draws(draw) if _is_legal(case.layout))


def _draws(draw: random.Random) -> Iterator[Case]:
    while True:
        colocate, audio, experts = draw.random() < 0.35, draw.random() < 0.4, draw.random() < 0.3
        sequence_parallel = experts or draw.random() < 0.3

        def cut(*, pps: tuple[int, ...], colocate: bool = colocate) -> ModuleParallelism:
            pp = 1 if colocate else draw.choice(pps)
            return ModuleParallelism(tp=draw.choice((1, 1, 2, 4)), pp=pp, dp=draw.choice((1, 1, 2, 3, 4)))

        language = cut(pps=(1, 2, 4))
        if experts:
            language = replace(language, ep=draw.choice((1, 2, 4)), expt_tp=draw.choice((1, 2)))
        modules = {"images": cut(pps=(1, 2)), **({"audio": cut(pps=(1,))} if audio else {}), "language": language}
        microbatches = draw.choice((1, 2, 3, 5))
        batch = microbatches * math.lcm(*(sizes.dp for sizes in modules.values())) * draw.choice((1, 2))
        accumulate = draw.choice((1, 1, 2, 3))
        samples = Samples(
            number=batch * 4 - draw.choice((0, 1)),
            images=tuple(draw.choice((0, 0, 1, 2)) for _ in range(7)),
            clips=tuple(draw.choice((0, 1, 2)) for _ in range(5)) if audio else (),
            bare=draw.random() < 0.5,
        )
        frozen = draw.choice(((), (), (), ("images",), ("language",), PROJECTOR_ONLY, FIRST_HALF))
        yield Case(
            task=Task(
                model=Model(audio=audio, experts=4 if experts else None, tied=draw.random() < 0.3, frozen=frozen),
                samples=samples,
                batch=batch,
                accumulate=accumulate,
            ),
            layout=Layout(
                modules=modules,
                colocate=colocate,
                num_microbatches=microbatches,
                ddp=draw.choice(({}, OVERLAP)),
                sequence_parallel=sequence_parallel,
            ),
        )


def _is_legal(layout: Layout) -> bool:
    try:
        resolved = MimoLayout.resolve(layout.modules, world_size=layout.ranks, colocate=layout.colocate)
    except LayoutError:
        return False
    return resolved.world_size <= MAX_RANKS
