"""What samples cost each module, as a dataset declares it in a method ``cost(index)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from lightning_mimo.data.wrapped import owner_of, owners_of
from lightning_mimo.errors import DataError, MimoError

_Numbers = int | float | np.integer | np.floating


class SampleCosts:
    """Reads the costs of samples from a dataset with ``cost(index)``, without loading the samples.

    ``cost(index)`` returns the work that a sample is for each module, in any unit, such as its tokens or the pixels of
    its images: ``{"images": 4096, "language": 700}``; a module that is left out has no work. A single number is the
    work for all modules. It must return the same on every rank. Every rank calls it for every sample of every global
    batch, in the worker that loads the batch, so it should take some microseconds: from a list, not from a file.
    """

    def __init__(self, cost: Callable[[int], Any], *, name: str, modules: Sequence[str]) -> None:
        """
        Args:
            cost: of the sample with an index.
            name: of the dataset's class, for messages.
            modules: all modules of the layout.
        """
        self._cost = cost
        self._name = name
        self._modules = tuple(modules)
        self._known = frozenset(modules)

    @classmethod
    def of_dataset(cls, dataset: Dataset, *, modules: Sequence[str]) -> SampleCosts | None:
        """The costs of a dataset, also through ``torch.utils.data.Subset`` and ``ConcatDataset``.

        ``None`` if it declares none, or a part of it does not.
        """
        owners = list(owners_of(dataset, "cost"))
        if not all(callable(getattr(owner, "cost", None)) for owner in owners):
            return None
        name = "/".join(sorted({type(owner).__name__ for owner in owners}))
        return cls(partial(_cost_of, dataset), name=name, modules=modules)

    def of(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Costs of some samples: module name -> float64 ``[len(indices)]``.

        Raises:
            DataError: naming the sample, if ``cost`` raises, names an unknown module, or returns what is no finite
                number of 0 or more.
        """
        costs = np.zeros((len(self._modules), len(indices)))
        for place, index in enumerate(indices):
            cost = self._called(index)
            if isinstance(cost, Mapping):
                if not self._known.issuperset(cost):
                    self._refuse_modules(index, cost)
                for row, name in enumerate(self._modules):
                    costs[row, place] = self._number(index, cost.get(name, 0.0))
            else:
                costs[:, place] = self._number(index, cost)
        self._check_numbers(indices, costs)
        return dict(zip(self._modules, costs, strict=True))

    def of_rows(self, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Costs of some rows of samples, each the sum over its samples: module name -> float64 ``[len(rows)]``.

        Raises:
            DataError: as for :meth:`of`.
        """
        starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
        costs = self.of([index for row in rows for index in row])
        return {name: np.add.reduceat(each, starts) for name, each in costs.items()}

    def cheapest(self, indices: Sequence[int]) -> int:
        """The one of some samples that is the least share of their costs, summed over modules; the first of equals.

        Raises:
            DataError: as for :meth:`of`.
        """
        totals = [(each, math.fsum(each)) for each in self.of(indices).values()]
        shares = sum((each / total for each, total in totals if total), np.zeros(len(indices)))
        return indices[int(shares.argmin())]

    def _called(self, index: int) -> Any:
        try:
            return self._cost(index)
        except MimoError:
            raise
        except Exception as error:
            raise DataError(
                f"Sample {index}: {self._name}.cost raised {type(error).__name__}: {error}. Correct it, or "
                f"leave batches in order with MimoStrategy(balance=False)."
            ) from error

    def _number(self, index: int, value: Any) -> float:
        if not isinstance(value, _Numbers):
            raise DataError(
                f"Sample {index}: {self._name}.cost gives {value!r}, a {type(value).__name__}. Return a "
                f"number, or a dict of a number for each module, such as {dict.fromkeys(self._modules, 1.0)}."
            )
        return float(value)

    def _refuse_modules(self, index: int, cost: Mapping[Any, Any]) -> None:
        unknown = ", ".join(repr(name) for name in cost if name not in self._known)
        raise DataError(
            f"Sample {index}: {self._name}.cost gives a cost of {unknown}, but the modules of the layout are "
            f"{', '.join(map(repr, self._modules))}. Use these names; a module that is left out costs nothing."
        )

    def _check_numbers(self, indices: Sequence[int], costs: np.ndarray) -> None:
        bad = ~(np.isfinite(costs) & (costs >= 0))
        if bad.any():
            place = int(bad.any(axis=0).argmax())
            module, index = int(bad[:, place].argmax()), indices[place]
            raise DataError(
                f"Sample {index}: {self._name}.cost is {costs[module, place]:g} for "
                f"{self._modules[module]!r}. A cost is a finite number of 0 or more."
            )


def _cost_of(dataset: Dataset, index: int) -> Any:
    owner, inner = owner_of(dataset, index, "cost")
    return owner.cost(inner)
