"""Seeds: one for each name, and which ranks draw the same random numbers while training."""

from __future__ import annotations

import hashlib

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
    """A 63-bit seed for one name: a hash, so that neither order nor number of names matters."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def seed_megatron(layout: MimoLayout, rank: int, *, seed: int) -> None:
    """Seed the generators that megatron-core draws from, in the place of ``initialize_model_parallel``.

    Outside tensor-parallel regions (the default generator, and the data-parallel one) the tensor-parallel ranks of a
    replica draw the same numbers; inside (the model-parallel one) each draws its own. Weights do not depend on this.

    Args:
        layout: a resolved layout.
        rank: this global rank.
        seed: the run's seed, the same on all ranks.
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
    # Scratch space of the tensor-parallel layers, which initialize_model_parallel would have made.
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
