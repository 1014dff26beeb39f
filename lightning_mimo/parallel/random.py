"""Seeds by name, and which ranks draw the same random numbers during training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
)

from lightning_mimo.layout.layout import MimoLayout

_MODEL_PARALLEL = "model-parallel-rng"


def seed_for(seed: int, name: str) -> int:
    """63-bit seed for a name: a hash, so it does not depend on other names or their order."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def seed_megatron(layout: MimoLayout, rank: int, *, seed: int) -> None:
    """Seed the random generators that megatron-core uses, which ``initialize_model_parallel`` would do otherwise.

    Outside tensor-parallel regions (default and data-parallel generators) all tensor-parallel ranks of a replica draw
    the same numbers. Inside (model-parallel and expert-parallel generators) each rank draws different numbers. Initial
    weights do not depend on these generators.

    Args:
        layout: a resolved layout.
        rank: global rank of this process.
        seed: seed of the run, the same on all ranks.
    """
    places = {name: layout.modules[name].coordinates(rank) for name in layout.modules_on(rank)}
    replica = "/".join(f"{name}.pp{place['pp']}.dp{place['dp']}" for name, place in places.items())
    shard = "/".join(f"{name}.tp{place['tp']}" for name, place in places.items())
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(_MODEL_PARALLEL, seed_for(seed, f"{_MODEL_PARALLEL}/{replica}/{shard}"))
    tracker.add(get_expert_parallel_rng_tracker_name(), seed_for(seed, f"expert/{replica}/{shard}"))
    tracker.add(get_data_parallel_rng_tracker_name(), seed_for(seed, f"data/{replica}"))
    torch.cuda.manual_seed(seed_for(seed, f"default/{replica}"))
    # Scratch memory of the tensor-parallel layers, which initialize_model_parallel would have allocated.
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def seed_default_generators(seed: int) -> None:
    """Seed the generators of the CPU and of this rank's device, for a module's own code."""
    torch.random.default_generator.manual_seed(seed)
    torch.cuda.manual_seed(seed)


@contextmanager
def default_generators_kept() -> Iterator[None]:
    """Context manager that restores the random generators of the CPU and of this rank's device at its end."""
    cpu, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    try:
        yield
    finally:
        torch.cuda.set_rng_state(device)
        torch.set_rng_state(cpu)
