"""Runs a case on one rank, through the Trainer, and records what the rank does."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_mimo import MimoStrategy
from tests.fake_cuda import faults
from tests.fake_cuda.cases import Case
from tests.fake_cuda.model import TinyModule, loader_of
from tests.fake_cuda.places import raised_at
from tests.fake_cuda.recorder import Recorder, tensors_of
from tests.fake_cuda.records import RankRecord
from tests.fake_cuda.world import FakeRank


class _Node(LightningEnvironment):
    """All ranks on one node, started by somebody else."""

    creates_processes_externally = True

    def __init__(self, rank: int, world_size: int, port: int) -> None:
        super().__init__()
        self._rank, self._size, self._port = rank, world_size, port

    @property
    def main_port(self) -> int:
        return self._port

    def world_size(self) -> int:
        return self._size

    def global_rank(self) -> int:
        return self._rank

    def local_rank(self) -> int:
        return self._rank

    def set_world_size(self, size: int) -> None:
        assert size == self._size

    def set_global_rank(self, rank: int) -> None:
        assert rank == self._rank

    def teardown(self) -> None:
        pass


class _Raise(logging.Handler):
    """Turns what is logged into an error, as pytest's filters do with warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError(f"{record.name} says: {record.getMessage()}")


def raise_what_torch_logs() -> None:
    """Let warnings that torch.distributed logs be errors, for the rest of the process."""
    logging.getLogger("torch.distributed").addHandler(_Raise(logging.WARNING))


class _Phases(pl.Callback):
    """Tells the recorder what is going on, and what is alive at the end of each step.

    A step lasts from the end of the one before to its own: it includes loading and moving its batch.
    """

    def __init__(self, recorder: Recorder, dtype: torch.dtype) -> None:
        self.memory: list[int] = []
        self.live: list[dict[str, int]] = []
        self.misplaced: list[str] = []
        self._recorder = recorder
        self._dtype = dtype
        self._before = "setup"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._recorder.phase = "first step"
        self._recorder.dtype = self._dtype
        self.live, self.memory = [], []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self.live.append(self._recorder.live_by_place())
        self.memory.append(sum(self.live[-1].values()))
        if len(self.memory) == 1:
            self.misplaced = list(_misplaced(trainer, pl_module, self._dtype))
        is_last = trainer.global_step == trainer.max_steps
        self._recorder.phase = "end of training" if is_last else f"step {trainer.global_step}"

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before, self._recorder.phase = self._recorder.phase, "validation"

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: int
    ) -> None:
        self._recorder.phase = f"validation, batch {batch_idx} after {self._before}"

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._recorder.phase = "validation"

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._recorder.phase = self._before

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._recorder.dtype = None

    @property
    def grown(self) -> dict[str, int]:
        """Place of allocation -> bytes by which its live tensors have grown between the last two steps."""
        if len(self.live) < 2:
            return {}
        before, after = self.live[-2:]
        sizes = {place: size - before.get(place, 0) for place, size in after.items()}
        return {place: size for place, size in sizes.items() if size > 0}


def _misplaced(trainer: pl.Trainer, module: Any, dtype: torch.dtype) -> Iterator[str]:
    """Parameters, gradients and optimizer state that are not on this rank's GPU, or not of the dtype they should be."""
    device = trainer.strategy.root_device
    main = torch.float32 if trainer.precision.endswith("mixed") else dtype
    for name, parameter in module.mimo_model.named_parameters():
        gradient = getattr(parameter, "main_grad", None)
        for what, tensor, expected in (("parameter", parameter, dtype), ("gradient", gradient, main)):
            if tensor is not None and (tensor.device != device or tensor.dtype != expected):
                yield f"{what} {name}: {tensor.dtype} on {tensor.device}, not {expected} on {device}"
    for optimizer in trainer.optimizers:
        for each in tensors_of(list(optimizer.state.values())):
            if each.device != device or (each.ndim and each.dtype != main):
                yield f"optimizer state {list(each.shape)}: {each.dtype} on {each.device}, not {main} on {device}"


def run_rank(case: Case, rank: int, port: int, directory: Path) -> RankRecord:
    """Run a case as one of its ranks, in a process that has been no other rank before.

    Args:
        case: what is run.
        rank: global rank.
        port: at which rank 0 listens.
        directory: of all ranks, for checkpoints.
    """
    fake, record = FakeRank(rank, case.world_size), RankRecord(rank=rank)
    dtype = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32}[case.precision.split("-")[0]]
    phases = _Phases(fake.recorder, dtype)
    try:
        with fake.entered():
            _run(case, fake.recorder, phases, _Node(rank, case.world_size, port), directory)
            fake.wire.leave()
            dist.destroy_process_group()
    except BaseException as error:
        record.error = f"{type(error).__name__} at {raised_at(error)}\n{traceback.format_exc()}"
    record.events = fake.recorder.events
    record.messages, record.groups = fake.messages, fake.groups
    record.memory, record.grown, record.misplaced = phases.memory, phases.grown, phases.misplaced
    return record


def _run(case: Case, recorder: Recorder, phases: _Phases, node: _Node, directory: Path) -> None:
    pl.seed_everything(1)
    module, loader = TinyModule(case), loader_of(case)
    for fault in case.faults:
        module = getattr(faults, fault)(module)
    trainer = _trainer(case, node, phases, steps=case.steps)
    try:
        trainer.fit(module, loader, loader if "validate" in case.stages else None)
    except faults.Enough:
        return
    recorder.phase = "after training"
    checkpoint = directory / "checkpoint"
    if "save" in case.stages:
        trainer.save_checkpoint(checkpoint)
    if "predict" in case.stages:
        recorder.phase = "prediction"
        trainer.predict(module, loader)
    if "resume" in case.stages:
        recorder.phase = "setup"
        _trainer(case, node, phases, steps=case.steps + 1).fit(TinyModule(case), loader, ckpt_path=checkpoint)


def _trainer(case: Case, node: _Node, phases: _Phases, *, steps: int) -> pl.Trainer:
    strategy = MimoStrategy(
        dict(case.modules),
        case.global_batch_size,
        case.num_microbatches,
        colocate=case.colocate,
        ddp=DistributedDataParallelConfig(**case.ddp),
        cluster_environment=node,
    )
    return pl.Trainer(
        accelerator="gpu",
        devices=case.world_size,
        precision=case.precision,
        strategy=strategy,
        accumulate_grad_batches=case.accumulate,
        max_steps=steps,
        callbacks=[phases],
        limit_val_batches=1,
        limit_predict_batches=1,
        num_sanity_val_steps=0,
        val_check_interval=case.accumulate if "validate" in case.stages else None,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
