"""Time, throughput and memory of each module per step, without an extra collective, barrier or device read.

Each rank's figures since the last report are part of the single all-reduce of the logged step. Every rank has separate
elements in it, so the sum contains the figures of all ranks.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.observe.flops import ModuleFlops
from lightning_mimo.observe.spans import COMPUTING, Span, Spans

_TIMES = {**dict.fromkeys(COMPUTING, "compute_s"), "bridge": "bridge_s", "pipeline": "pipeline_s", "reduce": "reduce_s"}
"""Kind of work -> figure that includes it."""
_TIME_FIGURES = tuple(dict.fromkeys(_TIMES.values()))
_COUNTS = ("samples", "tokens", "flops")
_LAST_COMPUTE = "last_compute_s"
_FIGURES = (*_TIME_FIGURES, _LAST_COMPUTE, "memory", *_COUNTS, "peak_flops", "seconds", "steps")
_MIB = 2**20
_TERA = 1e12


class Telemetry:
    """Accumulates this rank's figures and computes the figures of each module from those of all ranks.

    The figures of each module are logged under ``telemetry/<module>/``:

    - ``compute_s``: seconds per step in forward (including the loss) and backward, mean over the module's ranks;
      includes the communication between tensor-parallel or expert-parallel ranks.
    - ``bridge_s``, ``pipeline_s``, ``reduce_s``: seconds per step in transfers to other modules, in transfers between
      pipeline stages, and in the gradient reduction that remains after backward; mean over the ranks that have any.
      They include waiting, because neither gloo nor NCCL reports when the other side is ready.
    - ``imbalance``: measured compute time of the slowest data-parallel replica over the mean of all replicas, in the
      last step whose times have been read; of modules with several replicas.
    - ``samples_per_sec``: samples that have input for this module.
    - ``tokens_per_sec``: for the language module, input positions including padding; for an encoder, output embeddings.
    - ``tflops_per_gpu``: floating-point operations of a step that the module needs (see
      :class:`lightning_mimo.observe.flops.ModuleFlops`), per second of the whole step and rank of the module, in 1e12.
    - ``peak_memory_mib``: maximum over the module's ranks since the start; memory allocated by torch on a GPU, resident
      memory (including memory shared with other processes) on a CPU.

    Two figures are of the whole model: ``train/tflops_per_gpu``, the operations of all modules per second and rank, and
    ``train/mfu``, the same over the peak of the GPUs, if the peak of every rank's GPU is known.
    """

    def __init__(self, layout: MimoLayout, spans: Spans, device: torch.device, *, peak_flops: float | None) -> None:
        """
        Args:
            layout: assignment of modules to ranks.
            spans: this rank's recorder.
            device: this rank's device.
            peak_flops: floating-point operations per second that the device can reach; ``None`` if unknown.
        """
        self._spans = spans
        self._device = device
        self._rank = dist.get_rank()
        modules = layout.modules_on(self._rank)
        self._flops = ModuleFlops(modules, spans)
        self._peak_flops = peak_flops or 0.0
        self._counted = []  # modules whose samples and tokens this rank counts: one rank per replica
        for name in modules:
            place = layout.modules[name].coordinates(self._rank)
            if not place["tp"] and not place["pp"]:
                self._counted.append(name)
        self._places = [(rank, name) for rank in range(layout.world_size) for name in layout.modules_on(rank)]
        self._replicas = [layout.modules[name].coordinates(rank)["dp"] for rank, name in self._places]
        self._sums = {name: dict.fromkeys(_FIGURES, 0.0) for name in modules}
        self._in_step = {name: dict.fromkeys(_COUNTS, 0.0) for name in modules}
        self._unread: list[Span] = []

    def counting_flops(self) -> AbstractContextManager[object]:
        """Enclose the passes of a batch, so that the operations of a first one are counted."""
        return self._flops.counting()

    def count(self, microbatches: Sequence[Microbatch]) -> None:
        """Count a batch of the current step, after its passes. Uses sizes only and reads no tensors."""
        for name, flops in self._flops.of_batch(microbatches).items():
            self._in_step[name]["flops"] += flops
        for name in self._counted:
            sums = self._in_step[name]
            for microbatch in microbatches:
                if name == LANGUAGE:
                    sums["samples"] += len(microbatch["sample_indices"])
                    sums["tokens"] += microbatch["input_ids"].numel()
                else:
                    counts = microbatch["modality_counts"][name]
                    sums["samples"] += sum(items > 0 for items in counts.items)
                    sums["tokens"] += sum(counts.own_placeholders)

    def add(self, spans: list[Span], seconds: float) -> None:
        """Add the figures of a completed step.

        Args:
            spans: spans of all batches that were accumulated for the step.
            seconds: time since the previous step.
        """
        # Times are read one step later, when the GPU has completed the work, so the host does not wait.
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
        """Return this rank's figures since the last call, to be summed over all ranks.

        Returns:
            float64 ``[(rank, module) pairs * figures]``, zero except for this rank's pairs.
        """
        self._read()
        numbers = torch.zeros(len(self._places), len(_FIGURES), dtype=torch.float64)
        for place, (rank, name) in enumerate(self._places):
            if rank == self._rank:
                sums = self._sums[name]
                sums["memory"], sums["peak_flops"] = peak_memory(self._device), self._peak_flops
                numbers[place] = torch.tensor([sums[figure] for figure in _FIGURES], dtype=torch.float64)
                sums.update(dict.fromkeys(_FIGURES, 0.0))
        return numbers.flatten()

    def _read(self) -> None:
        if not self._unread:
            return
        for sums in self._sums.values():
            sums[_LAST_COMPUTE] = 0.0
        for (kind, name), seconds in self._spans.own_seconds(self._unread).items():
            if name and kind in _TIMES:
                self._sums[name][_TIMES[kind]] += seconds
                if kind in COMPUTING:
                    self._sums[name][_LAST_COMPUTE] += seconds
        self._unread = []

    def describe(self, numbers: Sequence[float]) -> dict[str, float]:
        """Return the names and values to log; empty if no step was completed.

        Args:
            numbers: sum of :meth:`figures` over all ranks.
        """
        rows: dict[str, list[dict[str, float]]] = {}
        replicas: dict[str, dict[int, float]] = {}  # module -> replica -> seconds of compute in the last step
        peaks: dict[int, float] = {}
        for place, (rank, name) in enumerate(self._places):
            of_rank = numbers[place * len(_FIGURES) : (place + 1) * len(_FIGURES)]
            row = dict(zip(_FIGURES, of_rank, strict=True))
            rows.setdefault(name, []).append(row)
            peaks[rank] = row["peak_flops"]
            of_module, replica = replicas.setdefault(name, {}), self._replicas[place]
            of_module[replica] = of_module.get(replica, 0.0) + row[_LAST_COMPUTE]
        described = {}
        for name, ranks in rows.items():
            steps, seconds = ranks[0]["steps"], max(row["seconds"] for row in ranks)
            if steps:
                values = _of_module(ranks, steps, seconds)
                computed = replicas[name].values()
                if len(computed) > 1 and any(computed):
                    values["imbalance"] = max(computed) * len(computed) / sum(computed)
                for figure, value in values.items():
                    described[f"telemetry/{name}/{figure}"] = value
        return described | _of_model([each for ranks in rows.values() for each in ranks], list(peaks.values()))


def peak_memory(device: torch.device) -> float:
    """Return this process's peak memory in bytes, as defined by :class:`Telemetry`."""
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
    values["tflops_per_gpu"] = sum(row["flops"] for row in ranks) / seconds / len(ranks) / _TERA
    values["peak_memory_mib"] = max(row["memory"] for row in ranks) / _MIB
    return values


def _of_model(rows: list[dict[str, float]], peaks: list[float]) -> dict[str, float]:
    """Figures of all modules together.

    Args:
        rows: of every rank and module.
        peaks: operations per second that each rank's device can reach; 0 if unknown.
    """
    seconds = max(row["seconds"] for row in rows)
    if not seconds:
        return {}
    rate = sum(row["flops"] for row in rows) / seconds
    values = {"train/tflops_per_gpu": rate / len(peaks) / _TERA}
    if all(peaks):
        values["train/mfu"] = rate / sum(peaks)
    return values
