"""Batches on their way from a worker: the same values, in one tensor."""

from __future__ import annotations

import copy
import multiprocessing
import resource
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_mimo.data.shared_memory import SharedMemoryBatch
from lightning_mimo.errors import DataError
from lightning_mimo.microbatch import ModalityCounts

COUNTS = ModalityCounts(
    sample_indices=(4, 5), placeholders=(2, 0), samples_per_position=(1, 1), own=range(1), items=(1,)
)


def batch() -> SharedMemoryBatch:
    """What a batch may hold: any dtype, shape and nesting, views, the same tensor twice, and what is no tensor."""
    twice = torch.arange(5)
    return SharedMemoryBatch(
        [
            {
                "ids": twice,
                "again": twice,
                "expanded": torch.arange(3).expand(2, 3),
                "transposed": torch.arange(6.0).view(2, 3).T,
                "inputs": {"images": {"vit": {"pixels": torch.rand(3, 1, 2, 2)}}, "audio": None},
                "half": torch.rand(3).half(),
                "brain": torch.rand(3).bfloat16(),
                "bool": torch.tensor([True, False, True]),
                "scalar": torch.tensor(7),
                "complex": torch.tensor([1 + 2j]),
                "none": torch.empty(0, 4),
                "counts": COUNTS,
                "is_padding": (False, True),
            },
            {"ids": torch.zeros(2, 2, dtype=torch.int32), "parameter": torch.nn.Parameter(torch.ones(2))},
        ]
    )


class Once(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index


def test_what_a_worker_sends_arrives_as_it_was() -> None:
    torch.manual_seed(1)
    sent = batch()
    loader = DataLoader(Once(), num_workers=1, collate_fn=lambda _: sent, multiprocessing_context="fork")
    (received,) = loader
    assert type(received) is SharedMemoryBatch
    assert received[0].keys() == sent[0].keys()
    for mine, theirs in zip(received, sent, strict=True):
        for name, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert mine[name].dtype == value.dtype and mine[name].shape == value.shape, name
                assert torch.equal(mine[name], value), name
    pixels = [each[0]["inputs"]["images"]["vit"]["pixels"] for each in (received, sent)]
    assert torch.equal(*pixels)
    assert received[0]["inputs"]["audio"] is None
    assert (received[0]["counts"], received[0]["is_padding"]) == (COUNTS, (False, True))


def test_lightning_leaves_a_batch_on_the_cpu_and_moves_all_of_it_elsewhere() -> None:
    mine = batch()
    assert move_data_to_device(mine, torch.device("cpu")) is mine
    moved = move_data_to_device(mine, torch.device("meta"))
    tensors = [leaf for leaf in tree_leaves(moved) if isinstance(leaf, torch.Tensor)]
    assert len(tensors) == len([leaf for leaf in tree_leaves(list(mine)) if isinstance(leaf, torch.Tensor)]) > 10
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved[0]["inputs"]["images"]["vit"]["pixels"].shape == (3, 1, 2, 2)
    assert (moved[0]["counts"], moved[0]["is_padding"]) == (COUNTS, (False, True))


def test_a_copy_holds_the_same() -> None:
    mine = batch()
    theirs = copy.copy(mine)
    assert type(theirs) is SharedMemoryBatch
    assert theirs is not mine
    assert theirs[0]["ids"] is mine[0]["ids"]


def test_tensors_do_not_share_what_they_hold() -> None:
    loader = DataLoader(Once(), num_workers=1, collate_fn=lambda _: batch(), multiprocessing_context="fork")
    (received,) = loader
    half = received[0]["half"].clone()
    received[0]["expanded"].fill_(-1)
    received[0]["transposed"].fill_(-1)
    received[0]["brain"].fill_(-1)
    assert torch.equal(received[0]["ids"], torch.arange(5))
    assert torch.equal(received[0]["half"], half)


def _no_large_files(_: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # as a full /dev/shm: the kernel refuses the memory


def test_worker_without_shared_memory_says_so_at_once() -> None:
    loader = DataLoader(
        Once(),
        num_workers=1,
        collate_fn=lambda _: batch().packed(),
        worker_init_fn=_no_large_files,
        multiprocessing_context="fork",
        timeout=60,
    )
    with pytest.raises(DataError, match=r"no shared memory for a batch of 0\.0 MiB: .*/dev/shm"):
        next(iter(loader))


def test_batch_of_a_worker_is_packed_before_it_is_sent() -> None:
    packed = batch().packed()
    assert packed[0]["counts"] == COUNTS
    assert packed[0]["ids"].is_shared()
    _, arguments = packed.__reduce__()
    assert arguments is packed.__reduce__()[1], "not packed once more"


@pytest.mark.parametrize("microbatches", [1, 8])
def test_one_descriptor_is_sent_whatever_the_number_of_microbatches(
    monkeypatch: pytest.MonkeyPatch, microbatches: int
) -> None:
    sent: list[int] = []
    real = multiprocessing.reduction.DupFd
    monkeypatch.setattr(multiprocessing.reduction, "DupFd", lambda fd: sent.append(fd) or real(fd))
    microbatch = {"input_ids": torch.zeros(4, 8, dtype=torch.long), "labels": torch.zeros(4, 8, dtype=torch.long)}
    ForkingPickler.dumps(SharedMemoryBatch([{name: each.clone() for name, each in microbatch.items()}] * microbatches))
    assert len(sent) == 1
