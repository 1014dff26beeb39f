from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from lightning_mimo.errors import ConfigError, LayoutError
from lightning_mimo.layout.module_parallelism import ResolvedParallelism
from lightning_mimo.planning.candidate import Candidate, Variant
from lightning_mimo.planning.costs import ModuleCosts, PassSeconds
from lightning_mimo.planning.hardware import load_hardware
from lightning_mimo.planning.layouts import Degrees, legal_layouts, microbatch_numbers
from lightning_mimo.planning.pricing import memory_by_stage, peak_memory, price_stages
from lightning_mimo.planning.report import describe_plans, describe_search, why_it_lost
from lightning_mimo.planning.search import RUN_AHEAD, USABLE, Found, Space, lower_bound, search
from lightning_mimo.planning.step import simulate_step
from tests.unit.planning.formula import Transformer, formula_model

VIT = Transformer(layers=24, hidden=1024, tokens=576, output=4096)
GPT = Transformer(layers=32, hidden=4096, tokens=2048, output=4096)
MODEL = formula_model({"images": VIT, "language": GPT}, global_batch_size=32)
DEGREES = {"images": Degrees(tp=(1, 2), pp=(1, 2)), "language": Degrees(tp=(1, 2, 4), pp=(1, 2, 4))}
VARIANTS = tuple(
    Variant(recompute=frozenset(recompute), sequence_parallel=False)
    for recompute in ((), ("images",), ("language",), ("images", "language"))
)
SPACE = Space(degrees=DEGREES, variants=VARIANTS)
H100 = load_hardware("h100")


def _all_candidates(gpus: int) -> list[Candidate]:
    layouts = legal_layouts(DEGREES, world_size=gpus, global_batch_size=MODEL.global_batch_size)
    return [
        Candidate(
            layout=layout,
            num_microbatches=number,
            encoder_run_ahead=ahead,
            distributed_optimizer=distributed,
            overlap=True,
            variant=variant,
        )
        for layout in layouts
        for number in microbatch_numbers(layout, global_batch_size=MODEL.global_batch_size)
        for ahead, variant, distributed in itertools.product(RUN_AHEAD, VARIANTS, (True, False))
    ]


def test_bounds_rule_out_no_plan_that_would_win() -> None:
    """Held against simulating everything."""
    found = search(SPACE, MODEL, H100, world_size=6, memory=80e9)
    best: dict[object, float] = {}
    for candidate in _all_candidates(6):
        prices = price_stages(candidate, MODEL, H100)
        assert peak_memory(candidate, prices) == max(memory_by_stage(candidate, prices).values())
        if peak_memory(candidate, prices) > USABLE * 80e9:
            continue
        seconds = simulate_step(candidate, prices, MODEL, H100).seconds
        assert lower_bound(candidate, prices, MODEL.trains) <= seconds * (1 + 1e-12)
        shapes = str([sizes.shape for sizes in candidate.layout.modules.values()]), candidate.layout.colocated
        best[shapes] = min(seconds, best.get(shapes, seconds))
    expected = sorted(best.values())[:5]
    assert [plan.seconds for plan in found.plans] == pytest.approx(expected, rel=2e-3)
    assert found.simulated < found.priced


def _timed(name: str, sizes: ResolvedParallelism, variant: Variant, samples: int) -> ModuleCosts:
    costs = MODEL.costs(name, sizes, variant, samples)
    return replace(costs, layer=replace(costs.layer, seconds=PassSeconds(forward=0.5, backward=1.25)))


@pytest.mark.parametrize("recompute", [frozenset(), frozenset({"language"})], ids=["keep", "recompute"])
def test_layers_that_were_timed_take_as_long_as_that(recompute: frozenset[str]) -> None:
    candidate = replace(_all_candidates(4)[0], variant=Variant(recompute=recompute, sequence_parallel=False))
    for price in price_stages(candidate, replace(MODEL, costs=_timed), H100):
        layers = {"images": VIT, "language": GPT}[price.module].layers / candidate.layout.modules[price.module].pp
        assert price.forward == pytest.approx(0.5 * layers)
        assert price.backward == pytest.approx((1.75 if price.module in recompute else 1.25) * layers)


def test_stages_of_different_length() -> None:
    layouts = legal_layouts(DEGREES, world_size=5, global_batch_size=32)
    layout = next(each for each in layouts if each.modules["language"].pp == 4 and not each.colocated)
    model = replace(MODEL, costs=_timed, stage_layers=lambda name, pp: (9, 8, 8, 7) if pp == 4 else (24,))
    prices = price_stages(replace(_all_candidates(6)[0], layout=layout), model, H100)
    assert [price.forward for price in prices if price.module == "language"] == pytest.approx([4.5, 4.0, 4.0, 3.5])
    weights = GPT.hidden**2 * 12 * 2
    first, _, _, last = (price.state for price in prices if price.module == "language")
    assert first - last == pytest.approx(2 * weights * (1 + 2 + 6), rel=1e-6)  # weights, gradients, optimizer with dp=1


def test_report() -> None:
    found = search(SPACE, MODEL, H100, world_size=8, memory=80e9)
    text = describe_plans(found, MODEL, H100)
    lines = text.splitlines()
    assert len(lines) == 2 + len(found.plans) and lines[0].split()[:2] == ["layout", "step"]
    best, second = found.plans[:2]
    tokens = MODEL.global_batch_size * MODEL.tokens / best.seconds / 8
    assert f"{tokens:,.0f}" in lines[2] and f"{best.seconds:.3f}" in lines[2]
    assert f"{second.seconds / best.seconds - 1:.1%} slower" in why_it_lost(best, second)
    assert f"{found.layouts:,} layouts" in describe_search(found, 1.0)


def _fastest(found: Found) -> float:
    return found.plans[0].seconds


def test_more_is_never_slower() -> None:
    """More memory, more bandwidth, a larger choice."""
    usual = _fastest(search(SPACE, MODEL, H100, world_size=4, memory=60e9))
    assert _fastest(search(SPACE, MODEL, H100, world_size=4, memory=200e9)) <= usual
    slow = replace(H100, within_node=replace(H100.within_node, bandwidth=H100.within_node.bandwidth / 20))
    assert _fastest(search(SPACE, MODEL, slow, world_size=4, memory=60e9)) >= usual
    few = replace(SPACE, variants=VARIANTS[1:])
    assert _fastest(search(few, MODEL, H100, world_size=4, memory=60e9)) >= usual


def test_gpus_that_no_layout_fills() -> None:
    degrees = {"images": Degrees(tp=(2,)), "language": Degrees(tp=(4,))}
    with pytest.raises(LayoutError, match=r"--gpus=7: no layout of images, language fills .* Layouts fill 6 or 8 GPUs"):
        search(replace(SPACE, degrees=degrees), MODEL, H100, world_size=7, memory=80e9)


def test_a_model_that_fits_nowhere() -> None:
    with pytest.raises(
        ConfigError, match=r"fits in no layout into 9.3 GiB.*smallest needs [\d.]+ GiB.*--memory=\d+GiB"
    ):
        search(SPACE, MODEL, H100, world_size=4, memory=10e9)


def test_what_would_make_it_fit_does() -> None:
    with pytest.raises(ConfigError) as error:
        search(SPACE, MODEL, H100, world_size=4, memory=10e9)
    needed = int(str(error.value).partition("--memory=")[2].partition("GiB")[0])
    assert search(SPACE, MODEL, H100, world_size=4, memory=needed * 2**30).plans


def test_a_frozen_encoder_gets_no_gradients() -> None:
    frozen = replace(MODEL, trains={"images": False, "language": True})
    layout = next(x for x in legal_layouts(DEGREES, world_size=6, global_batch_size=32) if not x.colocated)
    candidate = replace(_all_candidates(6)[0], layout=layout, num_microbatches=8)
    steps = [simulate_step(candidate, price_stages(candidate, model, H100), model, H100) for model in (MODEL, frozen)]
    waits = [step.waits.get(("images", "language"), 0.0) for step in steps]
    assert steps[1].seconds <= steps[0].seconds and waits[1] <= waits[0]
