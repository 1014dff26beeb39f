"""What MimoStrategy does while a run goes: Lightning's hooks for data, steps and checkpoints, in that order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, override

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_mimo.checkpoint.manager import Resumed, RunCheckpoints
from lightning_mimo.checkpoint.saving import set_generators
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.data.data_state import rewind_to_last_step
from lightning_mimo.data.run_data import RunData
from lightning_mimo.errors import ConfigError
from lightning_mimo.launch.preemption import Signals
from lightning_mimo.mimo.replica_check import check_replicas
from lightning_mimo.optim.ddp import complete_gathering
from lightning_mimo.optim.optimizer import MimoTorchOptimizer
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.parallel.random import seed_for, seed_megatron
from lightning_mimo.strategy.batch_runner import Batch, BatchRunner, StepListener
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.used_hooks import UsedHooks
from lightning_mimo.strategy.world_strategy import WorldStrategy


class RunningStrategy(WorldStrategy):
    """Passes Lightning's calls on to what :class:`MimoStrategy` has set up.

    Attributes:
        infra: layout, grids and process groups; ``None`` before there are any.
        hooks: those of a batch; ``None`` before there is a run.
        seed: of initial weights, the order of samples and their augmentation, the same on every rank.
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        accelerator: Accelerator | None,
        parallel_devices: list[torch.device] | None,
        cluster_environment: ClusterEnvironment | None,
        checkpoint_io: CheckpointIO | None,
        precision_plugin: Precision | None,
    ) -> None:
        """
        Args:
            global_batch_size: samples per step over all ranks.
            accelerator: as for every ParallelStrategy.
            parallel_devices: as for every ParallelStrategy.
            cluster_environment: as for every ParallelStrategy.
            checkpoint_io: as for every ParallelStrategy.
            precision_plugin: as for every ParallelStrategy.
        """
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.global_batch_size = global_batch_size
        self.infra: MimoModelInfra | None = None
        self.hooks: UsedHooks | None = None
        self.seed = 0
        self._signals = Signals()
        self._checkpoints: RunCheckpoints | None = None
        self._resumed: Resumed | None = None
        self._data: RunData | None = None
        self._runner: BatchRunner | None = None

    @property
    def _module(self) -> MimoModule:
        module = self.lightning_module
        if not isinstance(module, MimoModule):
            raise ConfigError(
                f"MimoStrategy trains a MimoModule, but got a {type(module).__name__}. Subclass "
                f"lightning_mimo.MimoModule and override configure_mimo."
            )
        return module

    def _megatron_on_device(self) -> contextlib.AbstractContextManager[None]:
        """What megatron-core needs on this device. May be nested."""
        return megatron_on_cpu() if self.root_device.type == "cpu" else contextlib.nullcontext()

    # ------------------------------------------------------------------- data

    @override
    def process_dataloader(self, dataloader: object) -> DataLoader:
        """Rebuild a user's DataLoader for this rank."""
        module = self._module
        return self._data.shard(
            dataloader,
            sample_format=module.sample_format(),
            seed=self.seed,
            training=module.trainer.training,
        )

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        raise ConfigError(
            "MimoStrategy divides samples itself, differently for each module; there is no DistributedSampler for it."
        )

    # ------------------------------------------------------------------ steps

    @override
    def barrier(self, name: str | None = None) -> None:
        if name == "run-stage":  # the first thing that the Trainer does after installing handlers that broadcast
            self._signals.install(self.cluster_environment)
        super().barrier(name)

    @override
    def training_step(self, batch: Batch, batch_idx: int, *args: Any) -> torch.Tensor:
        """Forward and backward of one global batch; the global loss, the same on every rank."""
        return self._runner.train(batch, batch_idx, self.optimizers[0])

    @override
    def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Nothing: the schedule ran the backward passes inside ``training_step``."""
        return closure_loss

    @contextlib.contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate gradients unreduced: more batches follow before the optimizer steps."""
        self._runner.is_accumulating = True
        try:
            yield
        finally:
            self._runner.is_accumulating = False

    @override
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._runner.end_accumulation(optimizer)
        return result

    @override
    def on_train_end(self) -> None:
        """Weights and checkpoints are whole from here on. Not in ``teardown``, which must not wait for other ranks."""
        complete_gathering(self._module.model)
        self.finish_saving()
        self._signals.remove()

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written. Collective over the world.

        Raises:
            CheckpointWriteError: on every rank, if it failed on any.
        """
        self._checkpoints.finish()

    @override
    def on_validation_start(self) -> None:
        self._signals.install(self.cluster_environment)

    @override
    def on_test_start(self) -> None:
        self._signals.install(self.cluster_environment)

    @override
    def on_predict_start(self) -> None:
        self._signals.install(self.cluster_environment)

    @override
    def validation_step(self, batch: Batch, batch_idx: int, *args: Any) -> torch.Tensor:
        return self._runner.evaluate("val", self._module.validation_step, batch, batch_idx, *args)

    @override
    def test_step(self, batch: Batch, batch_idx: int, *args: Any) -> torch.Tensor:
        return self._runner.evaluate("test", self._module.test_step, batch, batch_idx, *args)

    @override
    def predict_step(self, batch: Batch, batch_idx: int, *args: Any) -> list[dict[str, Any]]:
        """Greedy answers: ``[{"sample_index": int, "tokens": [int, …]}, …]`` of the global batch, on every rank."""
        return self._runner.predict(batch, batch_idx)

    def generate(self, batch: Batch, *, max_new_tokens: int) -> torch.Tensor:
        """Write tokens for every sample of a global batch. Collective over the world.

        Returns:
            int64 ``[global_batch_size, max_new_tokens]``, by position in the global batch.
        """
        return self._runner.generate(batch, max_new_tokens=max_new_tokens)

    @property
    def step_listeners(self) -> list[StepListener]:
        """Are called with the spans of this rank whenever an optimizer step is done."""
        return self._runner.listeners

    # ------------------------------------------------------------ checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights go to the checkpoint directory piece by piece, see :meth:`save_checkpoint`."""
        return {}

    @override
    def optimizer_state(self, optimizer: MimoTorchOptimizer) -> dict[str, Any]:
        """What is no tensor of a parameter; those go to the checkpoint directory piece by piece."""
        return optimizer.plain_state()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write weights, the optimizer's state and Lightning's own into a directory. Collective over the world."""
        # Also after training, when nothing is running any more.
        held, window = self._runner.accumulation if self._runner is not None else (0, None)
        checkpoint, batches = rewind_to_last_step(checkpoint, held=held, training=self._runner is not None)
        data_state = self._data.data_state(seed=self.seed, batches=batches)
        if data_state is not None:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{"batches": batches}]
        with self._megatron_on_device():
            self._checkpoints.save(
                Path(self.broadcast(str(filepath))),
                self._module.model,
                self.infra,
                self.optimizers[0] if "optimizer_states" in checkpoint and data_state is not None else None,
                trainer=checkpoint,
                data_state=data_state,
                window=window,
            )
        if self._runner is None:
            self.finish_saving()

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint; with ``async_save`` not before the one that is being written is there."""
        if self.is_global_zero:
            self._checkpoints.remove(Path(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what any layout wrote, and Lightning's own state. Collective over the world."""
        is_fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        trainer, self._resumed = self._checkpoints.load(
            Path(self.broadcast(str(checkpoint_path))),
            self._module.model,
            self.infra,
            self.optimizers[0] if is_fitting else None,
            global_batch_size=self.global_batch_size,
        )
        if self._resumed is not None:
            self.seed = self._resumed.data_state.seed
            self._data.resume_from(self._resumed.data_state)
        return trainer

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: :meth:`load_checkpoint` has put the weights in place."""

    @override
    def on_train_start(self) -> None:
        """Check the weights, listen to signals, and draw from here on what the run would have drawn that goes on."""
        complete_gathering(self._module.model)
        check_replicas(self._module.model, self.infra)
        self._signals.install(self.cluster_environment)
        if (resumed := self._resumed) is not None:
            self._resumed = None
            if resumed.states is not None:
                set_generators(resumed.states)
            else:
                seed_megatron(self.infra.layout, self.global_rank, seed=seed_for(self.seed, f"step {resumed.step}"))

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False
