"""One loader, written as for one process, rebuilt for each rank: who loads what, in which order, and how it is batched.

No processes: the loaders of all ranks of a layout are built and read side by side.
"""

from __future__ import annotations

import pickle
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from lightning_mimo.data.loader import GlobalBatchSampler, SeededSampler, shard_dataloader
from lightning_mimo.data.rank_share import RankShare
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism

IMAGE = 9  # placeholder token
PAD = 0
BATCH = 8

LAYOUTS = {
    "language_dp1": ({"language": ModuleParallelism()}, 1, False),
    "images_dp2-language_dp1": ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism()}, 3, False),
    "images_dp1-language_tp2dp2": ({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2)}, 5, False),
    "images_dp4-language_pp2dp2": ({"images": ModuleParallelism(dp=4), "language": ModuleParallelism(pp=2)}, 8, False),
    "colocated_images_dp4-language_tp2dp2": (
        {"images": ModuleParallelism(), "language": ModuleParallelism(tp=2)},
        4,
        True,
    ),
    "colocated_images_tp4-language_dp4": (
        {"images": ModuleParallelism(tp=4), "language": ModuleParallelism()},
        4,
        True,
    ),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def plans(name: str, *, microbatches: int = 2) -> list[RankBatchPlan]:
    modules, world_size, colocate = LAYOUTS[name]
    layout = MimoLayout.resolve(modules, world_size=world_size, colocate=colocate)
    return [
        RankBatchPlan.build(layout, rank, global_batch_size=BATCH, num_microbatches=microbatches)
        for rank in range(world_size)
    ]


ALONE = plans("language_dp1")[0]


class Scenes(Dataset):
    """Sample i has i % 3 images, whose pixels say i, and as many placeholders; its text begins with 100 + i."""

    def __init__(self, size: int = 20) -> None:
        self.size = size
        self.asked: list[tuple[int, frozenset[str]]] = []

    def __len__(self) -> int:
        return self.size

    def load(self, index: int, modules: frozenset[str]) -> dict[str, Any]:
        self.asked.append((index, modules))
        count = index % 3
        sample = {
            "input_ids": torch.tensor([100 + index, *[IMAGE] * count, 1]),
            "labels": torch.tensor([*[PAD] * (count + 1), 2]),
            "loss_mask": torch.ones(count + 2),
            "modality_inputs": {},
        }
        if "images" in modules:
            sample["modality_inputs"]["images"] = {"vit": {"pixels": torch.full((count, 2), float(index))}}
        return sample

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.load(index, frozenset({"images", "language"}))


class PlainScenes(Scenes):
    """The same without ``load``: every sample comes whole, and the text carries random augmentation."""

    load = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()])
        sample = Scenes.load(self, index, frozenset({"images", "language"}))
        return {**sample, "noise": noise}


def rebuilt(loader: DataLoader, plan: RankBatchPlan, *, seed: int = 1, **fields: Any) -> DataLoader:
    extras = ("noise",) if isinstance(loader.dataset, PlainScenes) else ()
    wanted = {"special_token_ids": {"images": IMAGE}, "pad_token_id": PAD, "extra_keys": extras, **fields}
    return shard_dataloader(loader, plan, sample_format=SampleFormat(**wanted), seed=seed)


def order(*, seed: int = 1, epoch: int = 0, size: int = 20, shuffle: bool = True) -> SeededSampler:
    sampler = RandomSampler(range(size)) if shuffle else SequentialSampler(range(size))
    result = SeededSampler(sampler, seed=seed)
    result.set_epoch(epoch)
    return result


# The order of samples.


def test_shuffle_depends_on_the_seed_and_the_epoch_only():
    first = list(order())
    torch.rand(3)
    assert list(order()) == first
    assert sorted(first) == list(range(20))
    assert list(order(epoch=1)) != first
    assert list(order(seed=2)) != first


def test_order_without_shuffle_is_the_datasets():
    assert list(order(shuffle=False)) == list(order(shuffle=False, epoch=1)) == list(range(20))


def test_shuffling_leaves_the_generator_as_it_was():
    before = torch.get_rng_state()
    list(order())
    assert torch.equal(torch.get_rng_state(), before)


@layouts
def test_all_ranks_cut_the_same_order(layout):
    global_batches = [list(order())[i : i + BATCH] for i in range(0, 16, BATCH)]
    for plan in plans(layout):
        sampler, share = GlobalBatchSampler(order(), batch_size=BATCH, drop_last=True), RankShare(plan)
        for requests, batch in zip(map(share.requests, sampler), global_batches, strict=True):
            assert [request.index for request in requests] == [batch[request.position] for request in requests]
            for request in requests:
                microbatch = request.position // (BATCH // 2)
                assert request.modules == plan.needed_by(request.position, microbatch) != frozenset()


def test_epoch_is_reached_through_the_name_that_lightning_looks_for():
    loader = rebuilt(DataLoader(Scenes(), batch_size=BATCH, shuffle=True), ALONE)
    first, again = indices(loader), indices(loader)
    loader.batch_sampler.sampler.set_epoch(1)
    second = indices(loader)
    assert first == again != second
    assert {batch.epoch for batch in loader.batch_sampler} == {1}


@pytest.mark.parametrize(("drop_last", "batches"), [(False, 3), (True, 2)])
def test_length_is_the_number_of_global_batches(drop_last, batches):
    sampler = GlobalBatchSampler(order(), batch_size=BATCH, drop_last=drop_last)
    assert len(sampler) == len(list(sampler)) == batches


def test_length_of_a_whole_number_of_batches():
    sampler = GlobalBatchSampler(order(size=16), batch_size=BATCH, drop_last=False)
    assert len(sampler) == len(list(sampler)) == 2


def test_short_last_batch_is_filled_with_repeats_that_count_for_nothing():
    *_, last = rebuilt(DataLoader(Scenes(size=11), batch_size=BATCH), ALONE)
    assert [microbatch["sample_indices"] for microbatch in last] == [(8, 9, 10, 8), (8, 8, 8, 8)]
    assert [microbatch["is_padding"] for microbatch in last] == [(False, False, False, True), (True,) * 4]
    assert [microbatch["loss_mask"].sum(1).tolist() for microbatch in last] == [[4, 2, 3, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("batch_size", [1, BATCH])
def test_short_last_batch_is_kept_unless_dropped(batch_size):
    assert len(rebuilt(DataLoader(Scenes(size=11), batch_size=batch_size), ALONE)) == 2
    assert len(rebuilt(DataLoader(Scenes(size=11), batch_size=BATCH, drop_last=True), ALONE)) == 1


# Who loads what.


def indices(loader: DataLoader) -> list[int]:
    return [index for batch in loader for microbatch in batch for index in microbatch["sample_indices"]]


def samples_by_module(layout: str, loader: DataLoader) -> dict[str, dict[tuple[range, ...], list[Any]]]:
    """Samples of the first global batch, by module and replica; all ranks of a replica must have the same."""
    found: dict[str, dict[tuple[range, ...], list[Any]]] = defaultdict(dict)
    for plan in plans(layout):
        batch = next(iter(rebuilt(loader, plan)))
        for module, runs in plan.shards.items():
            if module == "language":
                taken = [microbatch["input_ids"][:, 0] - 100 for microbatch in batch]
            else:
                taken = [microbatch["modality_inputs"][module]["vit"]["pixels"][:, 0] for microbatch in batch]
            taken = [values.tolist() for values in taken]
            assert found[module].setdefault(runs, taken) == taken
    return found


@layouts
@pytest.mark.parametrize("dataset", [Scenes, PlainScenes])
def test_each_module_gets_the_global_batch_once(layout, dataset):
    whole = list(order(shuffle=True))[:BATCH]
    found = samples_by_module(layout, DataLoader(dataset(), batch_size=BATCH, shuffle=True))
    for module, replicas in found.items():
        shards = sorted(replicas.items(), key=lambda item: item[0][0].start)
        together = [value for microbatch in range(2) for _, taken in shards for value in taken[microbatch]]
        if module == "language":
            assert together == whole
        else:
            real = [index for index in whole for _ in range(index % 3)]
            assert [value for value in together if value] == real


@layouts
@pytest.mark.parametrize("subset", [False, True])
def test_dataset_is_asked_for_the_modules_of_the_rank_only(layout, subset):
    for plan in plans(layout):
        scenes = Scenes()
        loader = DataLoader(Subset(Subset(scenes, range(2, 20)), range(0, 18, 2)) if subset else scenes, BATCH)
        next(iter(rebuilt(loader, plan)))
        first, step = (2, 2) if subset else (0, 1)
        assert {index for index, _ in scenes.asked} == {
            first + step * position for m in range(2) for position in plan.samples_on_rank(m)
        }
        assert set().union(*(modules for _, modules in scenes.asked)) == set(plan.shards)


def test_language_rank_never_asks_for_images():
    scenes = Scenes()
    list(rebuilt(DataLoader(scenes, batch_size=BATCH), plans("images_dp2-language_dp1")[2]))
    assert {modules for _, modules in scenes.asked} == {frozenset({"language"})}


def test_encoder_rank_has_no_labels():
    batch = next(iter(rebuilt(DataLoader(Scenes(), batch_size=BATCH), plans("images_dp2-language_dp1")[0])))
    assert "labels" not in batch[0]
    assert "loss_mask" not in batch[0]


# Random augmentation.


def noise(layout: str, rank: int, *, epoch: int = 0, shuffle: bool = False) -> dict[int, list[float]]:
    """The three random numbers (of torch, numpy and Python) that each sample drew."""
    loader = rebuilt(DataLoader(PlainScenes(), batch_size=BATCH, shuffle=shuffle), plans(layout)[rank])
    loader.batch_sampler.sampler.set_epoch(epoch)
    drawn = {}
    for batch in loader:
        for microbatch in batch:
            rows = zip(microbatch["sample_indices"], microbatch["noise"], microbatch["is_padding"], strict=True)
            for index, values, is_padding in rows:
                if not is_padding:
                    drawn[index] = values.tolist()
    return drawn


def test_augmentation_of_a_sample_is_the_same_on_every_rank_and_in_every_layout():
    alone = noise("language_dp1", 0)
    assert noise("language_dp1", 0, shuffle=True) == alone
    for rank in range(1, 5):
        theirs = noise("images_dp1-language_tp2dp2", rank)
        assert theirs == {index: alone[index] for index in theirs}


def test_augmentation_differs_between_samples_and_epochs():
    first, second = noise("language_dp1", 0), noise("language_dp1", 0, epoch=1)
    for drawn in zip(*first.values(), *second.values(), strict=True):
        assert len(set(drawn)) == 40


def test_loading_leaves_all_generators_as_they_were():
    loader = iter(rebuilt(DataLoader(PlainScenes(), batch_size=BATCH, shuffle=True), ALONE))
    before = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    next(loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1][1])
    assert random.getstate() == before[2]


# What a microbatch looks like.


def test_samples_of_different_length_are_padded():
    first, _ = next(iter(rebuilt(DataLoader(Scenes(), batch_size=BATCH), ALONE)))
    assert first["input_ids"].tolist() == [
        [100, 1, PAD, PAD],
        [101, IMAGE, 1, PAD],
        [102, IMAGE, IMAGE, 1],
        [103, 1, PAD, PAD],
    ]
    assert first["lengths"].tolist() == [2, 3, 4, 2]
    assert first["position_ids"].tolist() == [[0, 1, 2, 3]] * 4
    assert first["labels"].tolist() == [[0, 2, -100, -100], [0, 0, 2, -100], [0, 0, 0, 2], [0, 2, -100, -100]]
    assert first["loss_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert first["global_positions"] == (0, 1, 2, 3)


def test_counts_of_a_fan_out_rank_cover_what_the_bridge_sees():
    # images dp=1, language dp=4, colocated: the rank encodes all samples and reads the text of one.
    batch = next(iter(rebuilt(DataLoader(Scenes(), BATCH), plans("colocated_images_tp4-language_dp4")[1])))
    counts = batch[0]["modality_counts"]["images"]
    assert counts.sample_indices == (0, 1, 2, 3)
    assert counts.placeholders == counts.items == (0, 1, 2, 0)
    assert counts.own == range(4)
    assert batch[0]["sample_indices"] == (1,)


def test_counts_of_a_fan_in_rank_point_to_its_own_samples():
    batch = next(iter(rebuilt(DataLoader(Scenes(), BATCH), plans("colocated_images_dp4-language_tp2dp2")[1])))
    counts = batch[0]["modality_counts"]["images"]
    assert counts.sample_indices == (0, 1)
    assert counts.placeholders == (0, 1)
    assert (counts.own, counts.own_placeholders, counts.items) == (range(1, 2), (1,), (1,))


def test_counts_of_a_bridge_leave_out_what_only_a_third_module_needs():
    modules = {"images": ModuleParallelism(), "audio": ModuleParallelism(tp=4), "language": ModuleParallelism(tp=2)}
    layout = MimoLayout.resolve(modules, world_size=4, colocate=True)
    plan = RankBatchPlan.build(layout, 3, global_batch_size=BATCH, num_microbatches=2)
    loader = shard_dataloader(
        DataLoader(Scenes(), BATCH),
        plan,
        sample_format=SampleFormat(special_token_ids={"images": IMAGE, "audio": 8}, pad_token_id=PAD),
        seed=1,
    )
    counts = next(iter(loader))[0]["modality_counts"]["images"]
    assert counts.sample_indices == (2, 3)  # the language replica's, of which this rank encodes the second
    assert counts.own == range(1, 2)


def test_microbatch_without_an_image_gets_a_stand_in_that_counts_for_nothing():
    plan = plans("images_dp2-language_dp1")[0]
    loader = DataLoader(Subset(Scenes(), range(0, 18, 3)), batch_size=BATCH)  # every third sample has no image
    first, _ = next(iter(rebuilt(loader, plan)))
    assert first["modality_inputs"]["images"]["vit"]["pixels"].tolist() == [[0, 0]]
    assert first["modality_counts"]["images"].items == (0, 0)
    assert first["modality_counts"]["images"].placeholders == (0, 0)


def test_module_that_no_sample_mentions_gets_none():
    class NoImages(Scenes):
        def load(self, index: int, modules: frozenset[str]) -> dict[str, Any]:
            return Scenes.load(self, 3 * index, frozenset())

    first, _ = next(iter(rebuilt(DataLoader(NoImages(), BATCH), plans("images_dp2-language_dp1")[0])))
    assert first["modality_inputs"]["images"] is None
    assert first["modality_counts"]["images"].items == (0, 0)


def test_inputs_of_different_lengths_are_refused():
    class Uneven(Scenes):
        def load(self, index: int, modules: frozenset[str]) -> dict[str, Any]:
            inputs = {"images": {"vit": {"pixels": torch.zeros(2, 2), "sizes": torch.zeros(1)}}}
            return {**Scenes.load(self, index, modules), "modality_inputs": inputs}

    message = (
        r"Sample 0: the inputs of module 'images' differ .* \{'vit\.pixels': 2, 'vit\.sizes': 1\}\. They must agree"
    )
    with pytest.raises(ValueError, match=message):
        next(iter(rebuilt(DataLoader(Uneven(), BATCH), plans("images_dp2-language_dp1")[0])))


# Loaders that cannot be rebuilt.


@pytest.mark.parametrize("batch_size", [2, 16])
def test_other_batch_size_is_refused_with_both_numbers(batch_size):
    message = (
        rf"has batch_size={batch_size}, but MimoStrategy has global_batch_size=8\..*batch_size=8, or leave it at 1"
    )
    with pytest.raises(ValueError, match=message):
        rebuilt(DataLoader(Scenes(), batch_size=batch_size), ALONE)


@pytest.mark.parametrize("batch_size", [1, BATCH])
def test_distributed_sampler_is_refused(batch_size):
    scenes = Scenes()
    loader = DataLoader(scenes, batch_size, sampler=DistributedSampler(scenes, num_replicas=2, rank=0))
    with pytest.raises(
        ValueError, match=r"has a DistributedSampler, but .*Leave the sampler out and write shuffle=True"
    ):
        rebuilt(loader, ALONE)


def test_batch_sampler_of_the_users_own_is_refused_by_name():
    class Buckets(list):
        pass

    message = r"a batch sampler of its own \(Buckets\).* Give it a sampler and batch_size=8 instead"
    with pytest.raises(ValueError, match=message):
        rebuilt(DataLoader(Scenes(), batch_sampler=Buckets([[0, 1], [2, 3]])), ALONE)


def test_torchs_own_batch_sampler_is_taken():
    sampler = BatchSampler(SequentialSampler(range(16)), BATCH, drop_last=True)
    assert indices(rebuilt(DataLoader(Scenes(), batch_sampler=sampler), ALONE)) == list(range(16))


def test_collate_fn_that_would_not_be_called_is_refused_by_name():
    def to_tensors(samples: list[Any]) -> list[Any]:
        return samples

    message = r"has collate_fn=test_collate.*to_tensors, which would not be called.*in the dataset's __getitem__"
    with pytest.raises(ValueError, match=message):
        rebuilt(DataLoader(Scenes(), BATCH, collate_fn=to_tensors), ALONE)


@pytest.mark.parametrize("name", ["__iter__", "__len__"])
def test_loader_that_iterates_in_its_own_way_is_refused_by_name(name: str):
    own = type("TwiceAsLong", (DataLoader,), {name: lambda self: getattr(DataLoader, name)(self)})
    with pytest.raises(ValueError, match=rf"^TwiceAsLong has its own {name}, which would not be called"):
        rebuilt(own(Scenes(), BATCH), ALONE)


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return cycle(range(3))


class EndlessWithLength(Endless):
    def __len__(self) -> int:
        return 16


def test_sampler_without_a_length_is_refused_by_name():
    with pytest.raises(ValueError, match=r"The sampler Endless has no __len__.*an endless sampler is taken to end"):
        rebuilt(DataLoader(Scenes(), BATCH, sampler=Endless()), ALONE)


def test_endless_sampler_ends_after_its_length():
    expected = [i % 3 for i in range(16)]
    assert indices(rebuilt(DataLoader(Scenes(), BATCH, sampler=EndlessWithLength()), ALONE)) == expected


def test_sampler_that_yields_no_index_is_refused():
    with pytest.raises(ValueError, match=r"The sampler yields \(1, 2\), a tuple, but must yield indices"):
        list(rebuilt(DataLoader(Scenes(), BATCH, sampler=[(1, 2)] * 8), ALONE))


def test_pad_token_that_is_a_placeholder_is_refused():
    message = (
        r"pad_token_id=9 is also the placeholder of module 'images'.*Choose another pad_token_id in your MimoModule"
    )
    with pytest.raises(ValueError, match=message):
        SampleFormat(special_token_ids={"images": IMAGE}, pad_token_id=IMAGE)


@pytest.mark.parametrize("subset", [False, True])
def test_spawned_workers_can_be_given_dataset_and_collation(subset: bool):
    dataset = Subset(Scenes(), range(BATCH)) if subset else PlainScenes()
    loader = rebuilt(DataLoader(dataset, BATCH), ALONE)
    requests = next(iter(loader.batch_sampler))
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    expected = loader.collate_fn(loader.dataset.__getitems__(requests))
    found = collate(dataset.__getitems__(requests))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert one["sample_indices"] == other["sample_indices"]


def test_settings_of_the_users_loader_are_kept():
    def init(worker: int) -> None:
        pass

    loader = DataLoader(Scenes(), BATCH, num_workers=2, timeout=5, worker_init_fn=init, prefetch_factor=3)
    result = rebuilt(loader, ALONE)
    assert (result.num_workers, result.timeout, result.prefetch_factor) == (2, 5, 3)
    assert result.worker_init_fn is init
