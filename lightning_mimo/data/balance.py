"""Orders the samples of a global batch so that replicas and microbatches have equal work of every module.

Which samples a global batch holds does not change, nor how many of them a replica takes, so loss and gradients stay
the same. Costs are rounded to whole numbers first: their sums are exact, so ranks with different processors find the
same order. Pure numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lightning_mimo.layout.module_parallelism import LANGUAGE

_TOTAL = 2**26
"""What the costs of a module in a global batch add up to after rounding. Its square is exact in float64."""
_ROUNDS = 24
_WAYS = 4
"""How pairs of bins are chosen, in turn; if no pair exchanges samples in any way, nothing is left to gain."""
_EVEN = 1.005
"""Fullest bin over mean at which no more is tried."""
_CANDIDATES = 16
"""Samples of each bin that are tried in one round."""


def balanced_order(
    costs: Mapping[str, np.ndarray],
    *,
    dp_sizes: Mapping[str, int],
    num_microbatches: int,
    padded: frozenset[str] = frozenset({LANGUAGE}),
) -> np.ndarray:
    """Order the samples of a global batch for :func:`lightning_mimo.layout.batch_plan.shard`.

    The samples are divided over replicas so that the work of a step is even: first over the replicas of the modules
    that have the fewest, then each part over those of the next. After that, the samples of each replica are divided
    over its microbatches.

    Args:
        costs: module name -> float64 ``[global_batch_size]``, finite, none negative, in any unit: those of a module are
            compared with each other only.
        dp_sizes: module name -> number of its replicas, of all modules of the layout. The global batch divides over
            these and the microbatches.
        num_microbatches: microbatches that the global batch is split into.
        padded: modules whose samples are padded to the longest of a microbatch, so that all of them cost as much.

    Returns:
        int64 ``[global_batch_size]``: the number of the sample at each position.
    """
    names = [name for name, each in costs.items() if each.any()]
    samples = len(next(iter(costs.values())))
    whole = np.array([_whole_numbers(costs[name]) for name in names]).reshape(len(names), samples)
    order, done = np.arange(samples)[None], 1
    for dp in sorted(set(dp_sizes.values())):
        before, done = done, math.lcm(done, dp)
        # A module with fewer replicas takes what is divided further as a whole.
        is_due = [dp_sizes[name] >= dp for name in names]
        order = _divided(order, whole[is_due], done // before).reshape(done, -1)
    is_padded = [name in padded and samples > num_microbatches * dp_sizes[name] for name in names]
    bins = _divided(order, whole, num_microbatches, is_padded)
    if not any(is_padded):
        bins = _matched(bins, whole, [done // dp_sizes[name] for name in names])
    return np.sort(bins, axis=2).transpose(1, 0, 2).ravel()


def _whole_numbers(costs: np.ndarray) -> np.ndarray:
    shares = costs / costs.max()
    return np.rint(shares / math.fsum(shares) * _TOTAL)


def _divided(samples: np.ndarray, costs: np.ndarray, parts: int, is_padded: Sequence[bool] = ()) -> np.ndarray:
    """Divide each group of samples into bins of equal number and, as nearly as can be, of equal cost of every module.

    Args:
        samples: int64 ``[groups, n]``.
        costs: ``[modules, samples of the global batch]``.
        parts: bins of each group.
        is_padded: of each module; none where left out.

    Returns:
        int64 ``[groups, parts, n / parts]``. With a padded module, the bins begin with the longest samples.
    """
    groups, _ = samples.shape
    if parts == 1 or not len(costs):
        return samples.reshape(groups, parts, -1)
    if not any(is_padded):
        return _exchanged(_largest_first(samples, costs.sum(axis=0), parts), costs, [False] * len(costs))
    length = costs[list(is_padded)].sum(axis=0)
    longest_first = np.argsort(-length[samples], axis=1, kind="stable")
    bins = _exchanged(np.take_along_axis(samples, longest_first, axis=1).reshape(groups, parts, -1), costs, is_padded)
    # The same lengths in the same microbatch on all replicas: some modules take several of these together.
    longest_first = np.argsort(-length[bins].max(axis=2), axis=1, kind="stable")
    return np.take_along_axis(bins, longest_first[..., None], axis=1)


def _largest_first(samples: np.ndarray, cost: np.ndarray, parts: int) -> np.ndarray:
    """Give each bin one of the largest samples, then one of the next, the larger the less it has so far."""
    groups, number = samples.shape
    by_size = np.take_along_axis(samples, np.argsort(-cost[samples], axis=1, kind="stable"), axis=1)
    bins = np.empty((groups, parts, number // parts), dtype=np.int64)
    loads = np.zeros((groups, parts))
    for each, taken in enumerate(np.split(by_size, number // parts, axis=1)):
        emptiest = np.argsort(loads, axis=1, kind="stable")
        np.put_along_axis(bins[..., each], emptiest, taken, axis=1)
        loads += cost[bins[..., each]]
    return bins


def _exchanged(bins: np.ndarray, costs: np.ndarray, is_padded: Sequence[bool]) -> np.ndarray:
    """Let pairs of bins of a group exchange the two samples that bring the pair nearest to equal, round after round.

    Nearest is the least sum of squares over modules. Full bins are paired with empty ones, by the module that has most
    and by each module in turn, and now and then otherwise.
    """
    padded, idle = np.array(is_padded), 0
    half = bins.shape[1] // 2
    for number in range(_ROUNDS if bins.shape[2] > 1 else 0):
        held = costs[:, bins]
        loads = held.sum(axis=3)
        if padded.any():
            loads[padded] = held.shape[3] * held[padded].max(axis=3)
        elif (loads <= _EVEN * loads.mean(axis=2, keepdims=True)).all():
            break
        key = loads.max(axis=0) if number % 2 == 0 else loads[number // 2 % len(costs)]
        by_load = np.argsort(key, axis=1, kind="stable")
        low, high = by_load[:, :half], by_load[:, ::-1][:, :half]
        if number % _WAYS == _WAYS - 1:
            high = high[:, (np.arange(half) + number // _WAYS + 1) % half]
        idle = 0 if _exchange(bins, held, loads, low, high, padded, number) else idle + 1
        if idle == _WAYS:
            break
    return bins


def _exchange(
    bins: np.ndarray,
    held: np.ndarray,
    loads: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    padded: np.ndarray,
    number: int,
) -> int:
    """Let each pair exchange its best two samples, if that helps, in ``bins`` itself. Returns how many did."""
    groups, _, size = bins.shape
    rows, candidates = np.arange(groups)[:, None], min(size, _CANDIDATES)
    tried = (np.arange(candidates) * size // candidates + number) % size
    ours, theirs = held[:, rows, low], held[:, rows, high]
    more = (
        theirs[..., None, tried] - ours[..., tried, None]
    )  # what an exchange adds to the first and takes from the other
    less = (loads[:, rows, high] - loads[:, rows, low])[..., None, None] - more
    gain = (more * less)[~padded].sum(axis=0)  # half of what the sum of squares loses
    for module in padded.nonzero()[0]:
        gain += _gain_of_padded(ours[module], theirs[module], tried)
    gain = gain.reshape(*low.shape, -1)
    best = gain.argmax(axis=2)
    group, pair = np.nonzero(gain.max(axis=2) > 0)
    given, taken = np.divmod(best[group, pair], candidates)
    first, second = (group, low[group, pair], tried[given]), (group, high[group, pair], tried[taken])
    bins[first], bins[second] = bins[second], bins[first]
    return len(group)


def _gain_of_padded(ours: np.ndarray, theirs: np.ndarray, tried: np.ndarray) -> np.ndarray:
    """Half of what the sum of squares loses by each exchange, if all samples of a bin cost as much as its longest."""
    before = ours.max(axis=-1) ** 2 + theirs.max(axis=-1) ** 2
    first = np.maximum(_longest_but_one(ours)[..., tried, None], theirs[..., None, tried])
    second = np.maximum(_longest_but_one(theirs)[..., None, tried], ours[..., tried, None])
    return ours.shape[-1] ** 2 * (before[..., None, None] - first**2 - second**2) / 2


def _longest_but_one(costs: np.ndarray) -> np.ndarray:
    """What the largest of ``[..., n]`` is without each of them; 0 without the only one."""
    if costs.shape[-1] == 1:
        return np.zeros_like(costs)
    second, first = np.moveaxis(np.sort(costs, axis=-1)[..., -2:], -1, 0)
    return np.where(costs == first[..., None], second[..., None], first[..., None])


def _matched(bins: np.ndarray, costs: np.ndarray, together: Sequence[int]) -> np.ndarray:
    """Choose which bin of each replica is which microbatch, so that modules that take several replicas have even work.

    Args:
        bins: int64 ``[replicas, microbatches, n]``.
        costs: ``[modules, samples of the global batch]``.
        together: of each module, how many consecutive ``replicas`` are one of its own.
    """
    if bins.shape[1] == 1 or all(each == 1 for each in together):
        return bins
    bins = bins.copy()
    loads = costs[:, bins].sum(axis=3)
    sums = np.zeros((len(costs), bins.shape[1]))
    for replica in range(len(bins)):
        for module, each in enumerate(together):
            if replica % each == 0:
                sums[module] = 0
        own = sum(loads[module, replica] for module, each in enumerate(together) if each > 1)
        fullest = np.argsort(-sums.sum(axis=0), kind="stable")
        smallest = np.argsort(own, kind="stable")
        choice = np.empty_like(fullest)
        choice[fullest] = smallest
        bins[replica] = bins[replica, choice]
        for module, each in enumerate(together):
            if each > 1:
                sums[module] += loads[module, replica, choice]
    return bins
