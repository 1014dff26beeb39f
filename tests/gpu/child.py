"""One training run in a process of its own: ``python -m tests.gpu.child JSON`` prints ``RESULT JSON``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lightning.pytorch as pl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from torch.utils.data import DataLoader, Subset

from lightning_mimo import MimoStrategy, ModuleParallelism, Monitoring, Saving
from tests.gpu.bare import BareLoop
from tests.gpu.checkpoints import TimeCheckpoints
from tests.gpu.communicators import MeasuredCommunicators
from tests.gpu.measure import StepMeter
from tests.gpu.model import CopiedText, build_module, data_of
from tests.gpu.predict import predict
from tests.gpu.run import Run
from tests.gpu.under_ddp import train_llama

RESULT = "RESULT "


class Observer(pl.Callback):
    """Tells the meter of every step, takes checksums, and stops a rank where the run says so."""

    def __init__(self, run: Run, meter: StepMeter) -> None:
        self._run, self._meter = run, meter
        self.logged: dict[str, float] = {}
        self.checksums: dict[str, dict[str, int]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.checksums["start"] = checksums(pl_module)
        if self._run.accelerator == "gpu":
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._run.hangs == trainer.global_rank and batch_idx == 2:
            time.sleep(10**6)
        self._meter.begin(batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._meter.end(outputs["loss"])
        logged = {name: value for name, value in trainer.callback_metrics.items() if "flops" in name or "mfu" in name}
        self.logged |= {name: float(value) for name, value in logged.items()}  # on the host already

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter.wait()
        self.checksums["end"] = checksums(pl_module)


@torch.no_grad()
def checksums(module: torch.nn.Module) -> dict[str, int]:
    """Parameter -> a number made of all of its bits and their places, the same on every device."""
    return {name: _checksum(parameter.detach().flatten()) for name, parameter in module.named_parameters()}


def _checksum(values: torch.Tensor) -> int:
    bits = values.view(torch.int16 if values.element_size() == 2 else torch.int32).long()
    # Sums of integers wrap around, so that their order does not matter.
    return int((bits * (torch.arange(bits.numel(), device=bits.device) % 65521 + 1)).sum())


def build_trainer(run: Run, callbacks: list[pl.Callback]) -> pl.Trainer:
    ddp = DistributedDataParallelConfig()
    if run.distributed:
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
        )
    return pl.Trainer(
        accelerator=run.accelerator,
        devices=1,
        num_nodes=run.ranks,
        precision=run.precision,
        max_steps=run.steps,
        log_every_n_steps=5,
        limit_val_batches=2 if run.evaluate else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=MimoStrategy(
            {name: ModuleParallelism(**sizes) for name, sizes in run.modules.items()},
            run.batch,
            run.microbatches,
            colocate=run.colocate,
            pack_to=run.pack_to,
            ddp=ddp,
            saving=Saving(asynchronous=run.checkpoint is not None),
            monitoring=Monitoring(timeout=timedelta(seconds=run.timeout)),
        ),
    )


def train(run: Run) -> dict[str, Any]:
    """Under MimoStrategy."""
    pl.seed_everything(1)
    began = time.perf_counter()
    module, communicators = build_module(run), MeasuredCommunicators(run.accelerator)
    communicators.replace()
    loader = DataLoader(data_of(run), batch_size=run.batch, num_workers=2)
    meter = StepMeter(run)
    observer = Observer(run, meter)
    held_out = _held_out(run)
    saving = [] if run.checkpoint is None else [TimeCheckpoints(run.checkpoint, checksums)]
    trainer = build_trainer(run, [observer, *saving])
    trainer.fit(module, loader, held_out if run.evaluate else None)
    result = meter.result() | {
        "rank": trainer.global_rank,
        "checksums": observer.checksums,
        "parameters": {
            name: sum(each.numel() for each in part.parameters())
            for name, part in (("images", module.model.modality_submodules), ("language", module.model.language_model))
            if part is not None
        },
        "fit_s": time.perf_counter() - began,
        "communicators": communicators.result,
        "logged": observer.logged,
    }
    if run.evaluate:
        result["validation"] = trainer.validate(module, held_out, verbose=False)[0]
        answers = trainer.predict(module, held_out)
        result["predicted"] = [row["tokens"][:4] for batch in answers for row in batch][:4]
    return result | ({"checkpoint": saving[0].result} if saving else {})


def _held_out(run: Run) -> DataLoader:
    return DataLoader(Subset(CopiedText(run), range(90_000, 90_008)), batch_size=run.batch)


def evaluate(run: Run) -> dict[str, Any]:
    """Validate initial weights and predict, each by a Trainer that has not trained."""
    pl.seed_everything(1)
    module, communicators = build_module(run), MeasuredCommunicators(run.accelerator)
    communicators.replace()
    trainer = build_trainer(run, [])
    loss = trainer.validate(module, _held_out(run), verbose=False)[0]["val/loss"]
    answers = trainer.predict(module, _held_out(run))
    predicted = [row["tokens"][:4] for batch in answers for row in batch]
    return {"losses": [loss], "predicted": predicted[:4], "communicators": communicators.result}


def check_attention(run: Run) -> dict[str, Any]:
    """By the tests of attention, the kernel for packed sequences included, with warnings as errors."""
    with tempfile.TemporaryDirectory() as directory:
        report, file = Path(directory) / "report.xml", Path(__file__).parent / "test_attention.py"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", str(file)]
        code = subprocess.run(command, check=False).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None, "pytest has written its report"
    counts = {what: int(suite.attrib[what]) for what in ("tests", "skipped", "failures", "errors")}
    return {"code": code, **counts}


def train_bare(run: Run) -> dict[str, Any]:
    """By megatron-core's own schedule and optimizer, on the model that the strategy builds."""
    pl.seed_everything(1)
    module, meter = build_module(run), StepMeter(run)
    loader = DataLoader(CopiedText(run), batch_size=run.batch, num_workers=2, pin_memory=run.accelerator == "gpu")
    trainer = build_trainer(run, [BareLoop(run, meter)])
    trainer.fit(module, loader)
    return meter.result()


def main() -> None:
    run = Run.from_json(sys.argv[1])
    loops = {
        "trainer": train,
        "bare": train_bare,
        "transformers": train_llama,
        "evaluation": evaluate,
        "attention": check_attention,
        "predict": lambda run: predict(run, lambda: build_trainer(run, [])),
    }
    result = loops[run.loop](run)
    print(RESULT + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
