"""What each module does per step, from what every rank recorded: no collective, no barrier, no read of its own.

A rank's figures of the steps since the last report travel with the one collective of the step that is logged, each in
a place of its own, so that every rank knows those of all ranks.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.observe.spans import COMPUTING, Span, Spans

_TIMES = {**dict.fromkeys(COMPUTING, "compute_s"), "bridge": "bridge_s", "pipeline": "pipeline_s", "reduce": "reduce_s"}
"""Kind of work -> figure that it counts for."""
_TIME_FIGURES = tuple(dict.fromkeys(_TIMES.values()))
_COUNTS = ("samples", "tokens")
_FIGURES = (*_TIME_FIGURES, "memory", *_COUNTS, "seconds", "steps")
_MIB = 2**20


class Telemetry:
    """Adds up what this rank does, and says what all ranks together came to.

    The figures, each for every module, under ``telemetry/<module>/``:

    - ``compute_s``: seconds per step in forward (with the loss) and backward, mean of the module's ranks; exchanges
      between tensor-parallel or expert ranks inside of them count as computing.
    - ``bridge_s``, ``pipeline_s``, ``reduce_s``: seconds per step in transfers to other modules, in transfers between
      stages, and in what is left of reducing gradients when backward has ended, mean of the ranks that have any.
      Waiting and moving data are one here: neither gloo nor NCCL tells when the other side came.
    - ``samples_per_sec``: samples with something for this module.
    - ``tokens_per_sec``: for the language module, positions that it reads, padding included; for an encoder, embeddings
      that it makes.
    - ``peak_memory_mib``: largest of the module's ranks since the start; allocated by torch on a GPU, resident (what it
      shares with other processes included) on a CPU.
    """

    def __init__(self, layout: MimoLayout, spans: Spans, device: torch.device) -> None:
        """
        Args:
            layout: which module is on which ranks.
            spans: what this rank records of itself.
            device: of this rank.
        """
        self._spans = spans
        self._device = device
        self._rank = dist.get_rank()
        modules = layout.modules_on(self._rank)
        self._counted = []  # modules of which this rank counts what it reads: each replica does once
        for name in modules:
            place = layout.modules[name].coordinates(self._rank)
            if not place["tp"] and not place["pp"]:
                self._counted.append(name)
        self._places = [(rank, name) for rank in range(layout.world_size) for name in layout.modules_on(rank)]
        self._sums = {name: dict.fromkeys(_FIGURES, 0.0) for name in modules}
        self._in_step = {name: dict.fromkeys(_COUNTS, 0) for name in modules}
        self._unread: list[Span] = []

    def count(self, microbatches: Sequence[Microbatch]) -> None:
        """Count a batch of the step that is running. Reads sizes only, no tensors."""
        for name in self._counted:
            sums = self._in_step[name]
            for microbatch in microbatches:
                if name == LANGUAGE:
                    sums["samples"] += microbatch["input_ids"].size(0)
                    sums["tokens"] += microbatch["input_ids"].numel()
                else:
                    counts = microbatch["modality_counts"][name]
                    sums["samples"] += sum(items > 0 for items in counts.items)
                    sums["tokens"] += sum(counts.own_placeholders)

    def add(self, spans: list[Span], seconds: float) -> None:
        """A step is done.

        Args:
            spans: of all batches that were accumulated for it.
            seconds: since the step before.
        """
        # Times are read a step later, when a GPU has long done the work: nobody has to wait for it.
        self._read()
        self._unread = spans
        for name, sums in self._sums.items():
            counted = self._in_step[name]
            for count in _COUNTS:
                sums[count] += counted[count]
                counted[count] = 0
            sums["seconds"] += seconds
            sums["steps"] += 1

    def figures(self) -> torch.Tensor:
        """This rank's figures since the last call: float64 ``[ranks and their modules * figures]``, for a sum."""
        self._read()
        numbers = torch.zeros(len(self._places), len(_FIGURES), dtype=torch.float64)
        for place, (rank, name) in enumerate(self._places):
            if rank == self._rank:
                sums = self._sums[name]
                sums["memory"] = peak_memory(self._device)
                numbers[place] = torch.tensor([sums[figure] for figure in _FIGURES], dtype=torch.float64)
                sums.update(dict.fromkeys(_FIGURES, 0.0))
        return numbers.flatten()

    def _read(self) -> None:
        for (kind, name), seconds in self._spans.own_seconds(self._unread).items():
            if name and kind in _TIMES:
                self._sums[name][_TIMES[kind]] += seconds
        self._unread = []

    def describe(self, numbers: Sequence[float]) -> dict[str, float]:
        """Names and values to log, from the sum of :meth:`figures` over all ranks; nothing if no step was done."""
        rows: dict[str, list[dict[str, float]]] = {}
        for place, (_, name) in enumerate(self._places):
            of_rank = numbers[place * len(_FIGURES) : (place + 1) * len(_FIGURES)]
            rows.setdefault(name, []).append(dict(zip(_FIGURES, of_rank, strict=True)))
        described = {}
        for name, ranks in rows.items():
            steps, seconds = ranks[0]["steps"], max(row["seconds"] for row in ranks)
            if steps:
                for figure, value in _of_module(ranks, steps, seconds).items():
                    described[f"telemetry/{name}/{figure}"] = value
        return described


def peak_memory(device: torch.device) -> float:
    """Bytes, see :class:`Telemetry`."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def _of_module(ranks: list[dict[str, float]], steps: float, seconds: float) -> dict[str, float]:
    values = {}
    for figure in _TIME_FIGURES:
        having = [row[figure] for row in ranks if row[figure] or figure == "compute_s"]
        if having:
            values[figure] = sum(having) / len(having) / steps
    values["samples_per_sec"] = sum(row["samples"] for row in ranks) / seconds
    values["tokens_per_sec"] = sum(row["tokens"] for row in ranks) / seconds
    values["peak_memory_mib"] = max(row["memory"] for row in ranks) / _MIB
    return values
