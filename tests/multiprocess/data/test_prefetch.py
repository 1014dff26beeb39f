"""Ranks load the next batch while they would wait: each batch once, and the same is learned."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_mimo import ModuleParallelism
from lightning_mimo.data.loader import ResumableLoader
from lightning_mimo.observe.spans import LOADING, Span
from tests.parity.cases import apart, task, together
from tests.parity.layouts import Layout, train
from tests.parity.model import PicturesSoundsAndText, Samples
from tests.support.rank_pool import RankPool

STEPS, SAMPLES, BATCH = 5, 18, 6
APART = apart(ModuleParallelism(), ModuleParallelism(pp=2))
TOGETHER = together(ModuleParallelism(dp=2), ModuleParallelism(dp=2), num_microbatches=1)


class Counting(PicturesSoundsAndText):
    """Counts how often every sample is loaded on this rank."""

    def __init__(self) -> None:
        super().__init__(Samples(number=SAMPLES))
        self.loads: Counter[int] = Counter()

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.loads[index] += 1
        return super().__getitem__(index)


class Around(pl.Callback):
    """In what this rank loaded batches, step by step."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.strategy.step_listeners.append(self._listen)

    def _listen(self, spans: list[Span]) -> None:
        at = [i for i, span in enumerate(spans) if span.info.kind == LOADING]
        self.found.append(" ".join(spans[i - 1].info.label for i in at))


def load_and_train(layout: Layout, **options: Any) -> tuple[list[str], Counter[int], list[float]]:
    around, dataset = Around(), Counting()
    what = task(steps=STEPS, samples=Samples(number=SAMPLES), batch=BATCH)
    recorder, _, strategy = train(what, layout, dataset=dataset, callbacks=[around], **options)
    strategy.infra.destroy()
    return around.found, dataset.loads, recorder.losses


def test_every_rank_loads_in_its_first_wait(rank_pool: RankPool) -> None:
    found = rank_pool.run(load_and_train, APART, world_size=APART.ranks)
    first = ["receive images -> language, backward", "receive images -> language, forward"]
    for words, (around, loads, _) in zip([*first, "receive language stage 0 -> 1, forward"], found, strict=True):
        # Three batches in an epoch, of the second one two; each rank loads the first of both between steps.
        assert around == [words, words, "", words, ""]
        assert loads == Counter(range(SAMPLES)) + Counter(range(2 * BATCH))
    together = rank_pool.run(load_and_train, TOGETHER, world_size=TOGETHER.ranks)
    # Who waits for nobody loads before the figures of the step are added up, for they say what has been loaded.
    for around, _, _ in together:
        assert around == [around[0], around[0], "", around[0], ""]
        assert around[0].startswith("reduce")
    assert [loss for _, _, losses in together for loss in losses] == pytest.approx(found[0][2] * TOGETHER.ranks)


def test_no_batch_is_loaded_that_is_not_trained_on(rank_pool: RankPool) -> None:
    for _, loads, _ in rank_pool.run(load_and_train, APART, limit_train_batches=2, world_size=APART.ranks):
        assert loads == Counter({**dict.fromkeys(range(BATCH), 3), **dict.fromkeys(range(BATCH, 2 * BATCH), 2)})


class Noisy(PicturesSoundsAndText):
    """Draws from every generator that a dataset may draw from."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        pictures = sample["modality_inputs"]["images"]["vit"]
        pictures["pixel_values"] = pictures["pixel_values"] + torch.rand(()) + np.random.rand() + random.random()
        return sample


def train_with_noise(*, ahead: bool) -> list[float]:
    what = task(steps=STEPS, samples=Samples(number=SAMPLES), batch=BATCH, dropout=0.2)
    if ahead:
        recorder, _, strategy = train(what, APART, dataset=Noisy(Samples(number=SAMPLES)))
    else:
        with mock.patch.object(ResumableLoader, "load_ahead", return_value=None):
            recorder, _, strategy = train(what, APART, dataset=Noisy(Samples(number=SAMPLES)))
    strategy.infra.destroy()
    return recorder.losses


def test_loading_ahead_draws_the_same_numbers(rank_pool: RankPool) -> None:
    ahead = rank_pool.run(train_with_noise, ahead=True, world_size=APART.ranks)
    assert ahead == rank_pool.run(train_with_noise, ahead=False, world_size=APART.ranks)
    assert len(set(ahead[0])) == STEPS
