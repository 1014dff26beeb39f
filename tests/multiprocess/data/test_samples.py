"""Ranks that do not hold the same samples: refused with ranks and indices, before anything is learned from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_mimo import Checks, MimoStrategy, ModuleParallelism
from tests.parity.layouts import PoolEnvironment, weights
from tests.parity.model import Model, ParityModule, PicturesSoundsAndText, Samples
from tests.support.rank_pool import RankFailure, RankPool
from tests.support.tiers import exhaustive

APART = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}


class SwappedOnRank1(Sampler[int]):
    """Yields two samples of the batch that begins at ``first`` in the other order on rank 1."""

    def __init__(self, first: int = 0) -> None:
        self._first = first

    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[int]:
        order = list(range(24))
        if dist.get_rank() == 1:
            first = self._first
            order[first + 7], order[first + 9] = order[first + 9], order[first + 7]
        return iter(order)


class DrawnFromNumpy(SwappedOnRank1):
    """What an unseeded generator would do on ranks that start at different moments."""

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(24).tolist())


class OtherTextOnRank2(PicturesSoundsAndText):
    """As with a list of files that is not sorted: one index, two samples."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        return super().__getitem__(index + 7) if index == 4 and dist.get_rank() == 2 else sample


class Reached(pl.Callback):
    """How many batches were trained on."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


def fit(
    sampler: Sampler[int] | None,
    dataset: Dataset,
    modules: dict[str, ModuleParallelism],
    *,
    colocate: bool = False,
    check: Literal["first", "always", "never"] = "first",
    workers: int = 0,
) -> tuple[int, dict[str, torch.Tensor]]:
    """Train for an epoch of two batches; how many of them were reached, and the weights."""
    torch.manual_seed(1)
    np.random.seed(dist.get_rank())
    strategy = MimoStrategy(
        modules, 12, 2, colocate=colocate, checks=Checks(samples=check), cluster_environment=PoolEnvironment()
    )
    reached = Reached()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        max_epochs=1,
        callbacks=[reached],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = ParityModule(Model())
    trainer.fit(module, DataLoader(dataset, batch_size=12, sampler=sampler, num_workers=workers))
    result = reached.batches, weights(module.model, strategy.infra)
    strategy.infra.destroy()
    return result


def test_other_order_on_one_rank_names_ranks_and_indices(rank_pool: RankPool) -> None:
    # Both swapped samples are in the second microbatch, whose first half is rank 0's, whose second half is rank 1's.
    message = (
        r"Position 9 of the global batch holds different samples on different ranks: images has sample 7 on ranks "
        r"\[1\]; language has sample 9 on ranks \[2, 3\]\. The sampler must yield the same indices"
    )
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(fit, SwappedOnRank1(), PicturesSoundsAndText(Samples()), APART, world_size=4)


def test_other_order_on_one_rank_is_found_where_modules_share_ranks(rank_pool: RankPool) -> None:
    message = r"Position 7 of .*: images has sample 7 on ranks \[0\], sample 9 on ranks \[1\]; language has sample 7 on"
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(
            fit,
            SwappedOnRank1(),
            PicturesSoundsAndText(Samples()),
            {"images": ModuleParallelism(tp=2), "language": ModuleParallelism(dp=2)},
            colocate=True,
            world_size=2,
        )


def test_other_text_under_one_index_names_the_sample_and_the_ranks(rank_pool: RankPool) -> None:
    message = (
        r"Sample 4 \(position 4 of the global batch\) has other input_ids on some ranks than on others; by checksum: "
        r"images has text [0-9a-f]{8} on ranks \[1\]; language has text [0-9a-f]{8} on ranks \[2\], "
        r"text [0-9a-f]{8} on ranks \[3\]\. The dataset must give the same sample"
    )
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(fit, None, OtherTextOnRank2(Samples()), APART, world_size=4)


def test_a_later_batch_is_checked_before_it_is_learned_from_when_asked_for(rank_pool: RankPool) -> None:
    sampler, dataset = SwappedOnRank1(12), PicturesSoundsAndText(Samples(images=(1,)))
    with pytest.raises(
        RankFailure, match=r"Position 9 of the global batch holds .* images has sample 19 on ranks \[1\](?!.*This step)"
    ):
        rank_pool.run(fit, sampler, dataset, APART, check="always", world_size=4)


def test_a_later_batch_is_checked_with_the_step_before(rank_pool: RankPool) -> None:
    sampler, dataset = SwappedOnRank1(12), PicturesSoundsAndText(Samples(images=(1,)))
    message = r"Position 9 of the global batch holds .* images has sample 19 on ranks \[1\](?!.*This step)"
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(fit, sampler, dataset, APART, world_size=4)


class AnotherSampleWhereOneIsBad(PicturesSoundsAndText):
    """Answers a sample that one rank cannot read with another one, as many datasets do."""

    def __init__(self, samples: Samples, *, rank: int) -> None:
        super().__init__(samples)
        self._rank = rank

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index - 4 if index == 20 and dist.get_rank() == self._rank else index)


@pytest.mark.parametrize(
    ("rank", "where"),
    [exhaustive(0, r"images has text [0-9a-f]{8} on ranks \[0\]"), (3, r"text [0-9a-f]{8} on ranks \[3\]")],
)
def test_another_sample_for_one_that_is_bad_is_found_in_any_batch(rank_pool: RankPool, rank: int, where: str) -> None:
    dataset = AnotherSampleWhereOneIsBad(Samples(images=(1,)), rank=rank)
    message = (
        rf"Sample 20 \(position 8 of the global batch\) has other input_ids .*{where}.*answer no sample that cannot"
    )
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(fit, None, dataset, APART, world_size=4)


class OtherContentsOnRank(PicturesSoundsAndText):
    """The same text, and something else that is not."""

    def __init__(self, samples: Samples, *, rank: int, key: str) -> None:
        super().__init__(samples)
        self._rank, self._key = rank, key

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if index == 16 and dist.get_rank() == self._rank:
            if self._key == "labels":
                sample["labels"][0] += 1
            else:
                sample["modality_inputs"]["images"]["vit"]["pixel_values"] += 1e-6
        return sample


@pytest.mark.parametrize(
    ("modules", "key", "message"),
    [
        (APART, "labels", r"other labels, loss_mask or position_ids .*: language has contents .* on ranks \[3\]\."),
        (
            {"images": ModuleParallelism(tp=2), "language": ModuleParallelism(dp=2)},
            "pixels",
            r"other inputs for 'images' on some ranks than on others; by checksum: images has contents",
        ),
    ],
    ids=["labels", "pixels"],
)
def test_other_labels_or_pixels_of_tensor_parallel_ranks_are_found(
    rank_pool: RankPool, modules: dict[str, ModuleParallelism], key: str, message: str
) -> None:
    dataset = OtherContentsOnRank(Samples(images=(1,)), rank=3 if key == "labels" else 1, key=key)
    with pytest.raises(RankFailure, match=r"Sample 16 \(position 4 of the global batch\) has " + message):
        rank_pool.run(fit, None, dataset, modules, world_size=4)


def test_check_can_be_switched_off(rank_pool: RankPool) -> None:
    dataset = PicturesSoundsAndText(Samples(images=(1,)))
    found = rank_pool.run(fit, SwappedOnRank1(), dataset, APART, check="never", world_size=4)
    assert [reached for reached, _ in found] == [2] * 4


def test_sampler_that_draws_from_numpy_is_seeded_on_every_rank(rank_pool: RankPool) -> None:
    dataset = PicturesSoundsAndText(Samples())
    found = rank_pool.run(fit, DrawnFromNumpy(), dataset, APART, check="always", world_size=4)
    assert [reached for reached, _ in found] == [2] * 4


@pytest.mark.parametrize("colocate", [False, True], ids=["apart", "colocated"])
def test_a_sample_of_another_length_is_found_before_it_is_learned_from(rank_pool: RankPool, colocate: bool) -> None:
    # Sample 20 has two images, sample 16 has one: nothing would fit together any more.
    dataset = AnotherSampleWhereOneIsBad(Samples(images=(3, 1, 2)), rank=0)
    modules = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}
    message = r"Sample 20 \(position 8 of the global batch\) has other input_ids (?!.*This step)"
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(fit, None, dataset, modules, colocate=colocate, world_size=2 if colocate else 4)


@pytest.mark.exhaustive
def test_batches_of_workers_are_compared_as_well(rank_pool: RankPool) -> None:
    plain = rank_pool.run(fit, None, PicturesSoundsAndText(Samples(images=(3, 1, 2))), APART, world_size=4)
    loaded = rank_pool.run(fit, None, PicturesSoundsAndText(Samples(images=(3, 1, 2))), APART, workers=2, world_size=4)
    for (reached, mine), (_, theirs) in zip(plain, loaded, strict=True):
        assert reached == 2 and mine.keys() == theirs.keys()
        assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())
    dataset = AnotherSampleWhereOneIsBad(Samples(images=(3, 1, 2)), rank=0)
    with pytest.raises(RankFailure, match=r"Sample 20 \(position 8 of the global batch\) has other input_ids "):
        rank_pool.run(fit, None, dataset, APART, workers=2, world_size=4)
