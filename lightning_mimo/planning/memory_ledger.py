"""Keeps count of the bytes of all living tensors by purpose, and of their peak in every phase of a step."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

ACTIVATIONS = "activations"
"""Purpose of every tensor that is given no other one."""


@dataclass(kw_only=True)
class MemoryLedger:
    """Bytes of the storages of tensors that were shown to it and are alive.

    Attributes:
        live: purpose -> bytes.
        peaks: phase -> bytes by purpose at the moment when their sum was largest in that phase.
    """

    live: Counter[str] = field(default_factory=Counter)
    peaks: dict[Hashable, Mapping[str, int]] = field(default_factory=dict)
    _total: int = 0
    _largest: dict[Hashable, int] = field(default_factory=dict)
    _held: dict[int, tuple[weakref.ref, int, str]] = field(default_factory=dict)

    def add(self, tensor: torch.Tensor, phase: Hashable) -> None:
        """Count a tensor's storage, if it is new, in a phase."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._hold(storage, ACTIVATIONS)
        if self._total > self._largest.get(phase, -1):
            self._largest[phase] = self._total
            self.peaks[phase] = dict(self.live)

    def assign(self, tensors: Iterable[torch.Tensor], purpose: str) -> None:
        """Give the storages of tensors a purpose, from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            held = self._held.get(storage._cdata)
            if held is None:
                self._hold(storage, purpose)
            else:
                reference, size, before = held
                self.live[before] -= size
                self.live[purpose] += size
                self._held[storage._cdata] = reference, size, purpose

    def begin(self) -> None:
        """Forget the peaks."""
        self.peaks.clear()
        self._largest.clear()

    def _hold(self, storage: torch.UntypedStorage, purpose: str) -> None:
        key, size = storage._cdata, storage.nbytes()

        def forget(_: object) -> None:
            _, size, purpose = self._held.pop(key)
            self.live[purpose] -= size
            self._total -= size

        self._held[key] = weakref.ref(storage, forget), size, purpose
        self.live[purpose] += size
        self._total += size
