"""A Lightning callback that records one step on all ranks and writes it as a trace and as an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_mimo.callbacks.observed import observed_strategy
from lightning_mimo.errors import ConfigError
from lightning_mimo.observe.clocks import offset_to_rank_0
from lightning_mimo.observe.spans import Span
from lightning_mimo.observe.timeline import draw_timeline, require_matplotlib
from lightning_mimo.observe.trace import RankTrace, chrome_trace, describe_shares, trace_of_rank


class StepTrace(pl.Callback):
    """Records one training step on all ranks, and prints the share of time in which each module computes.

    Writes ``step=5.json`` for https://ui.perfetto.dev and ``step=5.png``. Times come from the host clock on CPUs and
    from CUDA events on GPUs. Ranks of one machine share a clock; the clocks of several machines are compared before
    the step (:func:`lightning_mimo.observe.clocks.offset_to_rank_0`). Only the traced step has a cost: a few
    collectives before and after it.
    """

    def __init__(self, dirpath: str | Path, *, step: int = 5) -> None:
        """
        Args:
            dirpath: folder to write to.
            step: number of optimizer steps of this run to skip first. The first steps are slower than later ones.

        Raises:
            ModuleNotFoundError: if matplotlib is missing.
            ConfigError: if ``step`` is negative.
        """
        if step < 0:
            raise ConfigError(f"StepTrace(step={step}): step is the number of optimizer steps to skip, 0 or more.")
        require_matplotlib()
        self._folder = Path(dirpath)
        self._after = step
        self._step = -1
        self._anchor: tuple[Any, float] | None = None
        self._spans: list[Span] | None = None
        self._is_done = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        observed_strategy(trainer, self)
        self._step, self._is_done, self._spans = trainer.global_step + self._after, False, None
        if 0 <= trainer.max_steps <= self._step:
            raise ConfigError(
                f"StepTrace(step={self._after}) skips {self._after} steps and records the next, but this run has "
                f"{trainer.max_steps - trainer.global_step} (max_steps={trainer.max_steps}). Give a smaller step."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._step or self._anchor is not None or self._is_done:
            return
        strategy = observed_strategy(trainer, self)
        offset = offset_to_rank_0(strategy.root_device)
        strategy.step_listeners.append(self._receive)
        strategy.barrier()
        strategy.spans.drain()  # discard what was recorded between steps
        mark, now = strategy.spans.clock.anchor()
        self._anchor = mark, now + offset

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._spans is None or self._anchor is None:
            return
        strategy = observed_strategy(trainer, self)
        strategy.step_listeners.remove(self._receive)
        own = trace_of_rank(trainer.global_rank, strategy.infra.layout, self._spans, strategy.spans.clock, self._anchor)
        self._spans = self._anchor = None
        self._is_done = True
        everywhere: list[RankTrace] | None = [own] * trainer.world_size if trainer.is_global_zero else None
        dist.gather_object(own, everywhere)
        if everywhere is not None:
            self._write(everywhere)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._is_done:
            rank_zero_warn(
                f"StepTrace(step={self._after}) has written nothing: training ended after step {trainer.global_step}."
            )

    def _receive(self, spans: list[Span]) -> None:
        self._spans = spans

    def _write(self, ranks: list[RankTrace]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = self._folder / f"step={self._step}"
        trace, picture = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.png")
        trace.write_text(json.dumps(chrome_trace(ranks)))
        seconds = max(each.end for each in ranks) - min(each.begin for each in ranks)
        title = f"step {self._step}: {seconds * 1000:.0f} ms on {len(ranks)} ranks"
        draw_timeline(ranks, picture, title=title)
        written = f"Written: {picture}, and {trace} for https://ui.perfetto.dev"
        print(f"\n{title}\n{describe_shares(ranks)}\n{written}")
