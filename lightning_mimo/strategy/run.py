"""State of one fit, validate, test or predict: its data, its batches and its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_mimo.checkpoint.initial import fill
from lightning_mimo.checkpoint.manager import Resumed, RunCheckpoints
from lightning_mimo.checkpoint.saving import is_plain, set_generators
from lightning_mimo.data.data_state import rewind_to_last_step
from lightning_mimo.data.run_data import RunData
from lightning_mimo.data.streams.ends import EndOfStream
from lightning_mimo.data.streams.loader import StreamLoader
from lightning_mimo.errors import CheckpointError, ConfigError, DataError
from lightning_mimo.launch.preemption import Signals
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.optim.ddp import complete_gathering
from lightning_mimo.optim.optimizer import MimoTorchOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.parallel.random import seed_for, seed_megatron
from lightning_mimo.strategy.batch_metrics import BatchMetrics
from lightning_mimo.strategy.batch_runner import BatchRunner
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.step_metrics import StepMetrics
from lightning_mimo.strategy.trainer_state import problems_of_trainer_state

if TYPE_CHECKING:
    from lightning_mimo.strategy.strategy import MimoStrategy


@dataclass(kw_only=True)
class Run:
    """State that MimoStrategy sets up for one stage of the Trainer. Kept after the stage, so that it can be saved.

    Attributes:
        module: the user's module.
        infra: layout, grids and process groups.
        plan: this rank's share of every global batch.
        data: the DataLoaders, divided over the ranks.
        batches: runs the batches.
        checkpoints: writes and reads checkpoints.
        trained: data of the training that the optimizer belongs to; ``None`` if there is none, or if weights have been
            loaded since.
        pack_to: most tokens of a row into which samples are packed; ``None`` for one sample a row.
        is_over: whether the stage has ended.
    """

    module: MimoModule
    infra: MimoModelInfra
    plan: RankBatchPlan
    data: RunData
    batches: BatchRunner
    checkpoints: RunCheckpoints
    trained: RunData | None
    pack_to: int | None = None
    is_over: bool = False
    _resumed: Resumed | None = None

    @classmethod
    def build(cls, strategy: MimoStrategy, module: MimoModule, signals: Signals, *, previous: Run | None) -> Run:
        """Set up the stage that the module's Trainer is about to run. Collective over the world: builds the bridges.

        Args:
            strategy: its settings, process groups and plan.
            module: the user's module, with its model ready to run.
            signals: the signals that this rank receives.
            previous: the stage before this one, if any.
        """
        infra, plan, device = strategy.infra, strategy.plan, strategy.root_device
        assert infra is not None and plan is not None, "setup_environment() makes them"
        checks, saving, monitoring = strategy.checks, strategy.saving, strategy.monitoring
        trainer = module.trainer
        ends = EndOfStream(infra.spans) if previous is None else previous.data.ends
        data = RunData(plan, ends, balance=strategy.balance, pin_memory=device.type == "cuda")
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        trained = data if is_fitting else None if previous is None else previous.trained
        batches = BatchRunner(
            module,
            infra,
            global_batch_size=plan.global_batch_size,
            encoder_run_ahead=strategy.encoder_run_ahead,
            device=device,
            check_samples=checks.samples,
            on_nonfinite=checks.on_nonfinite,
            signals=signals,
            telemetry=monitoring.telemetry and is_fitting,
            load_ahead=data.load_ahead,
            metrics=BatchMetrics(module, None if trainer.barebones else StepMetrics(trainer)),
        )
        checkpoints = RunCheckpoints(
            async_save=saving.asynchronous, on_save_error=saving.on_error, timeout=monitoring.timeout
        )
        return cls(
            module=module,
            infra=infra,
            plan=plan,
            data=data,
            batches=batches,
            checkpoints=checkpoints,
            trained=trained,
            pack_to=strategy.pack_to,
        )

    def shard(self, loader: object, *, seed: int) -> object:
        """Rebuild a user's DataLoader for this rank. Collective over the world.

        Args:
            loader: the user's DataLoader, written as for one process.
            seed: seed of the order of samples and of their augmentation, the same on all ranks.

        Raises:
            DataError: if the DataLoader cannot be divided over the ranks.
        """
        module, trainer = self.module, cast(Any, self.module.trainer)
        if loader == [] and not trainer.training:  # val_dataloaders=[]: Lightning's way to say that there is none
            return loader
        sharded = self.data.shard(
            loader,
            sample_format=module.sample_format(),
            seed=seed,
            training=trainer.training,
            first_epoch=self._first_epoch(),
            # Tokens are generated sample by sample.
            pack_to=None if trainer.predicting else self.pack_to,
        )
        if isinstance(sharded, StreamLoader):
            return sharded
        name, state = sharded.order.name_and_state
        if trainer.training and not is_plain(state):
            raise DataError(
                f"The state_dict() of the sampler {name} holds more than numbers, strings, tensors, lists and "
                f"dictionaries, so a checkpoint could not be read without executing code. Return only these."
            )
        return sharded

    def _first_epoch(self) -> int:
        """Epoch in which a run that was never interrupted would have asked for the loader that is asked for now."""
        trainer: Any = self.module.trainer
        if trainer.state.fn != TrainerFn.FITTING:
            return 0
        epoch, period = trainer.fit_loop.epoch_progress.current.processed, trainer.reload_dataloaders_every_n_epochs
        if period:
            return epoch - epoch % period
        return 0 if self.data.resumes else epoch

    def save(
        self, path: Path, trainer: dict[str, Any], optimizers: Sequence[torch.optim.Optimizer], *, seed: int
    ) -> None:
        """Write a checkpoint. Collective over the world.

        Args:
            path: the directory, the same on every rank.
            trainer: Lightning's own state; not modified.
            optimizers: the optimizer of the training, if any.
            seed: seed of the order of samples.

        Raises:
            CheckpointError: if the optimizer is to be saved, but weights were loaded after it had been used.
            CheckpointWriteError: on every rank, if writing failed on any rank and ``Saving(on_error="raise")`` is set.
        """
        is_training = self.trained is self.data and not self.is_over
        pending_batches, generators = self.batches.accumulation if is_training else (0, None)
        trainer, batches = rewind_to_last_step(trainer, pending_batches=pending_batches, training=is_training)
        data_state = None if self.trained is None else self.trained.data_state(seed=seed, batches=batches)
        with_optimizer = "optimizer_states" in trainer and bool(optimizers)
        if with_optimizer and self.trained is None:
            raise CheckpointError(
                f"{str(path)!r} would hold an optimizer state that does not belong to its weights: they were loaded "
                f"from another checkpoint after training. Save before that, or only the weights: "
                f"save_checkpoint(path, weights_only=True)."
            )
        if data_state is not None and self.trained is not None:
            state = self.trained.loader_state(batches)
            if state.get("stream") and not is_plain(state):
                state["stream"]["state"] = None  # the stream can be read again
            trainer["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [state]
        self.checkpoints.save(
            path,
            self.module.mimo_model,
            self.infra,
            the_only(optimizers) if with_optimizer and data_state is not None else None,
            trainer=trainer,
            data_state=data_state,
            generators_before=generators,
        )
        if self.is_over:
            self.checkpoints.finish()

    def load(self, path: Path, optimizers: Sequence[torch.optim.Optimizer], *, seed: int) -> tuple[dict[str, Any], int]:
        """Read a checkpoint that was written by any layout. Collective over the world.

        Args:
            path: the directory, the same on every rank.
            optimizers: the optimizer to restore, if this stage trains.
            seed: seed of this run.

        Returns:
            Lightning's own state; and the seed from here on, which is the saved one if training resumes.

        Raises:
            CheckpointError: if the checkpoint does not fit, or training cannot resume from it.
        """
        is_fitting = self.module.trainer.state.fn == TrainerFn.FITTING
        if self.module.init_from is not None:
            rank_zero_info(f"init_from={str(self.module.init_from)!r} is not read: the run goes on from {path}.")
        self.trained = self.data if is_fitting else None
        trainer, self._resumed = self.checkpoints.load(
            path,
            self.module.mimo_model,
            self.infra,
            the_only(optimizers) if is_fitting else None,
            global_batch_size=self.plan.global_batch_size,
            check_trainer=partial(problems_of_trainer_state, self.module.trainer),
        )
        self.module.has_initial_weights = True
        if self._resumed is None:
            return trainer, seed
        (loader_state,) = trainer["loops"]["fit_loop"]["state_dict"].get("combined_loader", [{}])
        self.data.resume_from(self._resumed.data_state, loader_state)
        return trainer, self._resumed.data_state.seed

    def load_initial(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Load the initial weights that the module takes from files, and print which, unless it has its weights.

        Collective over the world. Called when a checkpoint, if there is one, has been read, before the first batch.

        Args:
            optimizers: the optimizer whose copies of weights are filled, if this stage trains.

        Raises:
            CheckpointError: on every rank, if the files do not fit the model.
        """
        module = self.module
        if module.has_initial_weights:
            return
        if sources := module.weight_sources(self.infra.layout):
            complete_gathering(module.mimo_model)
            optimizer = the_only(optimizers).mimo if optimizers else None
            table = fill(module.mimo_model, self.infra, optimizer, sources=sources, init_missing=module.init_missing)
            rank_zero_info("\n" + table)
        elif module.frozen and module.trainer.state.fn == TrainerFn.FITTING:
            rank_zero_info(
                f"frozen={list(module.frozen)} keeps random weights: neither init_from nor ckpt_path is set."
            )
        module.has_initial_weights = True

    def restore_generators(self, rank: int) -> None:
        """Set the random generators to the state of the loaded checkpoint. No effect if none was loaded."""
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return
        if resumed.states is not None:
            set_generators(resumed.states)
        else:
            seed_megatron(self.infra.layout, rank, seed=seed_for(resumed.data_state.seed, f"step {resumed.step}"))

    def end(self) -> None:
        """Close the stage after it has ended, also after an exception. Not collective."""
        self.is_over = True
        self.checkpoints.close()


def set_up_optimizer(strategy: Strategy, trainer: pl.Trainer) -> None:
    """Call the module's ``configure_optimizers``. Collective over the world.

    Raises:
        ConfigError: if it returned anything but one optimizer from ``build_optimizer``.
    """
    try:
        strategy.setup_optimizers(trainer)
    except RuntimeError as error:
        if "multiple optimizers" not in str(error):
            raise
        # Lightning advises manual optimization, which there is not.
        raise ConfigError(_one_optimizer("several optimizers")) from None
    the_only(strategy.optimizers)


def the_only(optimizers: Sequence[torch.optim.Optimizer]) -> MimoTorchOptimizer:
    """Return the only element of Lightning's list of optimizers.

    Raises:
        ConfigError: if it is none from ``build_optimizer``.
    """
    if len(optimizers) == 1 and isinstance(optimizers[0], MimoTorchOptimizer):
        return optimizers[0]
    names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
    raise ConfigError(_one_optimizer("None" if names in ("", "_MockOptimizer") else names))


def _one_optimizer(got: str) -> str:
    return (
        f"configure_optimizers() returned {got}, but MimoStrategy steps one optimizer, which spans the modules of all "
        f"ranks. Return self.build_optimizer(OptimizerConfig(optimizer='adam', lr=...)), with "
        f"overrides={{module: OptimizerOverride(lr=...)}} for what differs between modules."
    )
