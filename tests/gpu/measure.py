"""Time, host reads, memory and kernels of training steps, on any device."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from tests.gpu.run import Run

SKIPPED = 4  # steps at the beginning that are not timed, and at the end, of which one is looked into and one profiled


class StepMeter:
    """To be told of the begin and the end of every step.

    Attributes:
        losses: of all steps, float32 scalars.
        host_reads: where one step waited for the GPU, by ``torch.cuda.set_sync_debug_mode``: ``file:line``.
        kernels: (name, calls, milliseconds) in one step, those that took longest first.
    """

    def __init__(self, run: Run) -> None:
        self.losses: list[torch.Tensor] = []
        self.host_reads: list[str] = []
        self.kernels: list[tuple[str, int, float]] = []
        self._steps, self._profile = run.steps, run.profile
        self._is_gpu = run.accelerator == "gpu"
        self._times: list[float] = []
        self._inside = contextlib.ExitStack()
        self._between_steps = 0  # bytes

    def begin(self, step: int) -> None:
        if self._is_gpu and step == SKIPPED:
            self._between_steps = torch.cuda.memory_allocated()
        if step in (SKIPPED, self._steps - SKIPPED):
            self.wait()
            self._times.append(time.perf_counter())
        if self._is_gpu and step == self._steps - 3:
            self._inside.enter_context(self._reads())
        if self._is_gpu and self._profile and step == self._steps - 2:
            self._inside.enter_context(self._profiler())

    def end(self, loss: torch.Tensor) -> None:
        self._inside.close()
        self.losses.append(loss.detach())

    def wait(self) -> None:
        if self._is_gpu:
            torch.cuda.synchronize()

    @property
    def seconds_per_step(self) -> float | None:
        timed = self._steps - 2 * SKIPPED
        return (self._times[1] - self._times[0]) / timed if len(self._times) == 2 and timed > 0 else None

    def result(self) -> dict[str, Any]:
        memory = {}
        if self._is_gpu:
            memory = {
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
                "between_steps_gib": self._between_steps / 2**30,
            }
        return {
            "losses": [float(loss) for loss in self.losses],
            "s_per_step": self.seconds_per_step,
            "host_reads": self.host_reads,
            "kernels": self.kernels,
            **memory,
        }

    @contextlib.contextmanager
    def _reads(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.host_reads = [
            f"{each.filename.rsplit('/', 1)[-1]}:{each.lineno}"
            for each in caught
            if "called a synchronizing" in str(each.message)
        ]

    @contextlib.contextmanager
    def _profiler(self) -> Iterator[None]:
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            yield
            self.wait()
        events = [
            each
            for each in profiler.key_averages()
            if each.device_type == torch.autograd.DeviceType.CUDA and not getattr(each, "is_user_annotation", False)
        ]
        events.sort(key=lambda each: each.self_device_time_total, reverse=True)
        self.kernels = [(each.key[:200], each.count, each.self_device_time_total / 1000) for each in events]
