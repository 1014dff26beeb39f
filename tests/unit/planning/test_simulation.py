from __future__ import annotations

from collections.abc import Sequence

import pytest

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.layout.pass_order import stages_behind
from lightning_mimo.planning.simulation import Edge, Segment, SimulatedStage, simulate
from tests.benchmarks.schedule import CASES, Case


def _stage(
    name: str, times: tuple[float, float], *, behind: int = 0, microbatches: int = 2, **options
) -> SimulatedStage:
    forward, backward = ([each] * microbatches for each in times)
    return SimulatedStage(
        key=(name, 0, 0),
        ranks=1,
        behind=behind,
        forward=(Segment(module=name, kind="forward", seconds=forward),),
        backward=(Segment(module=name, kind="backward", seconds=backward),),
        **options,
    )


def _stages_of(case: Case) -> list[SimulatedStage]:
    """The stages of a case of the schedule benchmark, with free communication."""
    modules = case.layout.modules
    stages = []
    for name, sizes in modules.items():
        for stage in range(sizes.pp):
            inputs = [(name, stage - 1)] if stage else []
            if name == LANGUAGE and stage == 0:
                inputs = [(encoder, modules[encoder].pp - 1) for encoder in case.layout.encoders]
            outputs = [(name, stage + 1)] if stage < sizes.pp - 1 else [] if name == LANGUAGE else [(LANGUAGE, 0)]
            factors: Sequence[float] = (1.0,) if name == LANGUAGE else case.uneven
            times = {
                way: [seconds * factors[i % len(factors)] for i in range(case.microbatches)]
                for way, seconds in (("forward", case.costs[name].forward), ("backward", case.costs[name].backward))
            }
            stages.append(
                SimulatedStage(
                    key=(name, stage, 0),
                    ranks=1,
                    behind=stages_behind(modules, name, stage, encoder_run_ahead=case.encoder_run_ahead),
                    forward=(Segment(module=name, kind="forward", seconds=times["forward"]),),
                    backward=(Segment(module=name, kind="backward", seconds=times["backward"]),),
                    activations=tuple(Edge(source=(*source, 0), seconds=0.0) for source in inputs),
                    gradients=tuple(Edge(source=(*source, 0), seconds=0.0) for source in outputs),
                )
            )
    return stages


@pytest.mark.parametrize("name", CASES)
def test_free_communication_gives_the_ideal_schedule(name: str) -> None:
    case = CASES[name]
    found = simulate(_stages_of(case), num_microbatches=case.microbatches)
    assert found.seconds == pytest.approx(case.ideal, rel=1e-12)


def test_a_step_by_hand() -> None:
    images = _stage("images", (1.0, 2.0), behind=1, gradients=(Edge(source=("language", 0, 0), seconds=0.5),))
    language = _stage(
        "language",
        (2.0, 4.0),
        activations=(Edge(source=("images", 0, 0), seconds=0.5),),
        reduce=1.0,
        last_bucket=0.25,
        update=0.75,
    )
    found = simulate([images, language], num_microbatches=2, sum_seconds=0.1)
    # images: F0 0-1, F1 1-2, B0 8-10, B1 14-16; language: F0 1.5-3.5, B0 3.5-7.5, F1 7.5-9.5, B1 9.5-13.5
    assert [(each.begin, each.end) for each in found.passes[0]] == [(0, 1), (1, 2), (8, 10), (14, 16)]
    assert [(each.begin, each.end) for each in found.passes[1]] == [(1.5, 3.5), (3.5, 7.5), (7.5, 9.5), (9.5, 13.5)]
    assert found.reduced == [16, 13.75]
    assert found.seconds == pytest.approx(16 + 0.1 + 0.75)
    assert found.waits["images", "language"] == 6 + 4
    assert found.waits["language", "images"] == pytest.approx(1.5 + 16 - 13.75)
    assert found.bubble == pytest.approx(1 - (6 + 12 + 0.75) / (2 * 16.85))


def test_a_sender_waits_where_too_much_is_underway() -> None:
    """An encoder that gets no gradient back would otherwise compute the whole batch ahead."""
    images = _stage("images", (1.0, 0.0), behind=1, microbatches=6)
    language = _stage("language", (5.0, 5.0), microbatches=6, activations=(Edge(source=("images", 0, 0), seconds=0.0),))
    free = simulate([images, language], num_microbatches=6)
    bound = simulate([images, language], num_microbatches=6, in_flight=2)
    assert free.passes[0][-1].end == 6
    assert bound.passes[0][-1].end == 1 + 10 * 3 + 1
    assert bound.seconds == free.seconds
