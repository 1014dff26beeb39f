"""The simulated step of a candidate: its stages with their prices, and the edges between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.layout.pass_order import stages_behind
from lightning_mimo.planning.candidate import Candidate, Model
from lightning_mimo.planning.hardware import Hardware
from lightning_mimo.planning.pricing import StagePrice, bridge_seconds, costs_of, hop_seconds, sum_seconds
from lightning_mimo.planning.simulation import Edge, Segment, SimulatedStage, Simulation, simulate

Factors = Mapping[str, Sequence[Sequence[float]]]
"""Module -> replica -> microbatch -> cost of its samples over the cost that prices are for."""


def simulate_step(
    candidate: Candidate, prices: Sequence[StagePrice], model: Model, hardware: Hardware, factors: Factors | None = None
) -> Simulation:
    """Simulate a step of a candidate.

    Args:
        candidate: layout and settings.
        prices: of its stages.
        model: costs and batches.
        hardware: devices and links.
        factors: costs of the samples of every replica and microbatch. ``None`` for equal samples, for which one replica
            stands for all.
    """
    modules = candidate.layout.modules
    bridges = {name: bridge_seconds(candidate, name, model, hardware) for name in candidate.layout.encoders}
    if candidate.layout.colocated:
        stages, in_flight = _shared(candidate, prices, bridges, factors), None
    else:
        stages = list(_apart(candidate, prices, bridges, model, hardware, factors))
        longest = max((modules[name].pp for name in candidate.layout.encoders), default=0) + modules[LANGUAGE].pp
        in_flight = longest + candidate.encoder_run_ahead
    return simulate(
        stages,
        num_microbatches=candidate.num_microbatches,
        in_flight=in_flight,
        sum_seconds=sum_seconds(candidate.layout.world_size, hardware) + hardware.step_overhead,
    )


def _apart(
    candidate: Candidate,
    prices: Sequence[StagePrice],
    bridges: Mapping[str, float],
    model: Model,
    hardware: Hardware,
    factors: Factors | None,
) -> Iterable[SimulatedStage]:
    modules = candidate.layout.modules
    for price in prices:
        name, stage, sizes = price.module, price.stage, modules[price.module]
        costs = costs_of(candidate, name, model)
        replicas = range(1 if factors is None else sizes.dp)
        before = hop_seconds(candidate, name, costs, stage - 1, hardware) if stage else 0.0
        after = hop_seconds(candidate, name, costs, stage, hardware) if stage < sizes.pp - 1 else 0.0
        for replica in replicas:
            activations = [Edge(source=(name, stage - 1, replica), seconds=before)] if stage else []
            gradients = [Edge(source=(name, stage + 1, replica), seconds=after)] if stage < sizes.pp - 1 else []
            if name == LANGUAGE and stage == 0:
                activations = [
                    Edge(source=(encoder, modules[encoder].pp - 1, other), seconds=bridges[encoder])
                    for encoder in candidate.layout.encoders
                    for other in _peers(sizes.dp, modules[encoder].dp, replica, all_replicas=factors is not None)
                ]
            if name != LANGUAGE and stage == sizes.pp - 1:
                gradients = [
                    Edge(source=(LANGUAGE, 0, other), seconds=bridges[name])
                    for other in _peers(sizes.dp, modules[LANGUAGE].dp, replica, all_replicas=factors is not None)
                ]
            yield SimulatedStage(
                key=(name, stage, replica),
                ranks=price.ranks // len(replicas),
                behind=stages_behind(modules, name, stage, encoder_run_ahead=candidate.encoder_run_ahead),
                forward=(_segment(candidate, price, "forward", factors, [replica]),),
                backward=(_segment(candidate, price, "backward", factors, [replica]),),
                activations=tuple(activations),
                gradients=tuple(gradients) if model.trains[name] else (),
                reduce=price.reduce,
                last_bucket=price.last_bucket,
                update=price.update,
            )


def _shared(
    candidate: Candidate, prices: Sequence[StagePrice], bridges: Mapping[str, float], factors: Factors | None
) -> list[SimulatedStage]:
    """One stage for all modules, or one for each group of ranks that wait for one another in a pass."""
    modules = candidate.layout.modules
    groups = 1 if factors is None else min(sizes.dp for sizes in modules.values())
    by_module = {price.module: price for price in prices}
    order = [*candidate.layout.encoders, LANGUAGE]
    stages = []
    for group in range(groups):
        passes: dict[str, list[Segment]] = {"forward": [], "backward": []}
        for name in order:
            dp = modules[name].dp
            members = range(group * dp // groups, (group + 1) * dp // groups)
            for direction, segments in passes.items():
                segments.append(_segment(candidate, by_module[name], direction, factors, members))
            if bridges.get(name):
                # Rows are gathered where a language replica has those of several encoder replicas, and gradients in
                # the other case; the reverse direction takes a part of what the rank has.
                gathers = "forward" if dp > modules[LANGUAGE].dp else "backward"
                seconds = [bridges[name]] * candidate.num_microbatches
                passes[gathers].append(Segment(module=name, kind="bridge", seconds=seconds))
        stages.append(
            SimulatedStage(
                key=(" and ".join(modules), 0, group),
                ranks=candidate.layout.world_size // groups,
                behind=0,
                forward=tuple(passes["forward"]),
                backward=tuple(reversed(passes["backward"])),
                reduce=sum(price.reduce for price in prices),
                last_bucket=sum(price.last_bucket for price in prices),
                update=sum(price.update for price in prices),
            )
        )
    return stages


def _segment(
    candidate: Candidate, price: StagePrice, direction: str, factors: Factors | None, replicas: Iterable[int]
) -> Segment:
    """Passes of some replicas, which take as long as the slowest of them."""
    seconds = price.forward if direction == "forward" else price.backward
    times = [seconds] * candidate.num_microbatches
    if factors is not None:
        of_replicas = [factors[price.module][replica] for replica in replicas]
        times = [seconds * max(values) for values in zip(*of_replicas, strict=True)]
    return Segment(module=price.module, kind=direction, seconds=times)


def _peers(mine: int, theirs: int, replica: int, *, all_replicas: bool) -> range:
    """Replicas of another module that have the samples of a replica, given the dp of both."""
    if not all_replicas:
        return range(1)
    if theirs >= mine:
        return range(replica * theirs // mine, (replica + 1) * theirs // mine)
    return range(replica * theirs // mine, replica * theirs // mine + 1)
