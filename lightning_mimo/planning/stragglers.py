"""What differing samples add to a step: the costs of the samples of every replica and microbatch, drawn at random.

All replicas of a module wait for the slowest one at the end of a step, and tensor-parallel peers and colocated modules
in every microbatch, so a step with differing samples takes longer than one with equal samples.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from lightning_mimo.data.balance import balanced_order
from lightning_mimo.layout.batch_plan import shard
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.planning.candidate import Candidate, Model
from lightning_mimo.planning.hardware import Hardware
from lightning_mimo.planning.pricing import StagePrice
from lightning_mimo.planning.samples import SampleSizes
from lightning_mimo.planning.step import Factors, simulate_step

Order = Callable[[Mapping[str, Sequence[float]], Candidate], Sequence[int]]
"""``(module -> costs of the samples of a global batch, candidate)`` -> the sample at each position of the batch."""

DRAWS = 3
"""Global batches that a price is averaged over."""


@dataclass(frozen=True, kw_only=True)
class SampleSpread:
    """How much samples differ.

    Attributes:
        costs: module -> costs of the same samples, as many for each module, in any unit.
        order: assigns the samples of a batch to its positions; ``None`` keeps them as they come.
        padded: modules whose samples are padded to the longest of a replica's microbatch, so that all of them cost as
            much as that one.
        priced: module -> cost of the sample that prices are for; empty if they are for one that costs as much as those
            of a batch on average.
    """

    costs: Mapping[str, Sequence[float]]
    order: Order | None
    padded: frozenset[str] = frozenset()
    priced: Mapping[str, float] = field(default_factory=dict)

    def share(self, module: str) -> float:
        """Mean cost of a sample over the cost of the one that prices are for."""
        priced = self.priced.get(module)
        return statistics.fmean(self.costs[module]) / priced if priced else 1.0


def balanced(
    costs: Mapping[str, Sequence[float]], candidate: Candidate, *, padded: frozenset[str] = frozenset({LANGUAGE})
) -> Sequence[int]:
    """The order in which a run with balance takes the samples of a global batch.

    Args:
        costs: module -> costs of the samples, in any unit.
        candidate: gives replicas and microbatches.
        padded: modules whose samples are padded to the longest of a microbatch; none if they are packed.
    """
    order = balanced_order(
        {name: np.asarray(each, dtype=np.float64) for name, each in costs.items()},
        dp_sizes={name: sizes.dp for name, sizes in candidate.layout.modules.items()},
        num_microbatches=candidate.num_microbatches,
        padded=padded,
    )
    return order.tolist()


def spread_of(sizes: SampleSizes, *, padded: frozenset[str]) -> SampleSpread | None:
    """The spread of a dataset's samples around the largest one, which prices are for; ``None`` if all are equal.

    A sample costs a module as much as it has tokens of it.

    Args:
        sizes: of the dataset's samples.
        padded: modules whose samples are padded to the longest of a microbatch.
    """
    costs = {**sizes.placeholders, LANGUAGE: sizes.tokens}
    if all(len(set(each)) == 1 for each in costs.values()):
        return None
    priced = {name: each[sizes.largest] for name, each in costs.items()}
    return SampleSpread(costs=costs, order=partial(balanced, padded=padded), padded=padded, priced=priced)


def lognormal_costs(sigmas: Mapping[str, float], *, number: int = 4096, seed: int = 1) -> dict[str, list[float]]:
    """Costs of samples whose logarithms are normal, with mean 1, independent of one another.

    Args:
        sigmas: module -> standard deviation of the logarithm; 0 for equal samples.
        number: of samples.
        seed: of the generator.
    """
    generator = random.Random(seed)
    drawn = {name: [generator.lognormvariate(0, sigma) for _ in range(number)] for name, sigma in sigmas.items()}
    return {name: [cost / statistics.fmean(costs) for cost in costs] for name, costs in drawn.items()}


def seconds_with(
    samples: SampleSpread, candidate: Candidate, prices: Sequence[StagePrice], model: Model, hardware: Hardware
) -> float:
    """Seconds of a step with differing samples, as the mean over some random global batches."""
    generator = random.Random(0)
    steps = [
        simulate_step(candidate, prices, model, hardware, draw_factors(samples, candidate, model, generator)).seconds
        for _ in range(DRAWS)
    ]
    return statistics.fmean(steps)


def draw_factors(samples: SampleSpread, candidate: Candidate, model: Model, generator: random.Random) -> Factors:
    """Draw a global batch and add up the costs of every replica and microbatch, relative to what prices are for.

    If that is the batch's mean cost, a mean above 1 over all of them is what padding adds.
    """
    number = len(next(iter(samples.costs.values())))
    drawn = [generator.randrange(number) for _ in range(model.global_batch_size)]
    of_batch = {name: [costs[i] for i in drawn] for name, costs in samples.costs.items()}
    order = range(len(drawn)) if samples.order is None else samples.order(of_batch, candidate)
    factors: dict[str, list[list[float]]] = {}
    for name, sizes in candidate.layout.modules.items():
        priced = (samples.priced.get(name) or statistics.fmean(of_batch[name])) if name in of_batch else 0.0
        costs = [of_batch[name][i] / priced for i in order] if priced else [1.0] * len(drawn)
        together = max if name in samples.padded else statistics.fmean
        factors[name] = [
            [
                together(
                    costs[position]
                    for position in shard(
                        global_batch_size=model.global_batch_size,
                        num_microbatches=candidate.num_microbatches,
                        dp=sizes.dp,
                        dp_rank=replica,
                        microbatch=microbatch,
                    )
                )
                for microbatch in range(candidate.num_microbatches)
            ]
            for replica in range(sizes.dp)
        ]
    return factors
