"""Parity for a model of your own: it trains in any layout as it does in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.utils.data import Dataset

from lightning_mimo import MimoModule, ModuleParallelism
from tests.parity.layouts import Layout, errors, train, weights
from tests.parity.oracle import Task, Truth
from tests.support.rank_pool import RankPool

Family = Callable[[], tuple[MimoModule, Dataset]]
"""Makes the module and its samples. A function of a test file's top level, because ranks import it by name."""

# What Lightning logs is float32; all the rest is float64 from end to end.
_LOGGED, _EXACT = 1e-7, 1e-10


def check_parity(pool: RankPool, family: Family, layouts: Mapping[str, Layout], *, batch: int = 8) -> None:
    """Train two steps in float64 in one process and in each layout, and compare parameter by parameter.

    The reference is the module itself in one process: whether its layers compute what they should is for another test.

    Args:
        pool: the fixture ``rank_pool``.
        family: what is trained.
        layouts: name -> layout; the name appears in messages.
        batch: global batch size.

    Raises:
        AssertionError: naming the layout and the parameter that differs most.
    """
    task = Task(batch=batch)
    modules = next(iter(layouts.values())).modules
    alone = Layout(modules={name: ModuleParallelism(dp=1) for name in modules}, colocate=True)
    (expected,) = pool.run(_train_alone, task, alone, family, world_size=1)
    assert expected.gradients and all(expected.norms), "the model must learn something, or nothing is compared"
    for name, layout in layouts.items():
        found = pool.run(_compare, task, layout, family, expected, world_size=layout.ranks)
        assert frozenset().union(*(each.parameters for each in found)) == expected.initial.keys(), name
        worst = max(found, key=lambda each: each.gradient)
        assert max(each.initial for each in found) == 0, f"{name}: initial weights"
        assert worst.gradient < _EXACT, f"{name}: gradient of {worst.worst}"
        assert max(each.norm for each in found) < _EXACT, f"{name}: gradient norm"
        assert max(each.weight for each in found) < _EXACT, f"{name}: weights"
        assert max(each.loss for each in found) < _LOGGED, f"{name}: loss"


def _train_alone(task: Task, layout: Layout, family: Family) -> Truth:
    module, dataset = family()
    recorder, module, strategy = train(task, layout, module=module, dataset=dataset)
    truth = Truth(
        losses=recorder.losses,
        norms=recorder.norms,
        initial=recorder.initial,
        gradients=recorder.gradients,
        final=weights(module.model, strategy.infra),
    )
    strategy.infra.destroy()
    return truth


def _compare(task: Task, layout: Layout, family: Family, expected: Truth) -> object:
    module, dataset = family()
    return errors(task, layout, expected, module=module, dataset=dataset)
