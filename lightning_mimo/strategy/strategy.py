"""MimoStrategy: its arguments, what is checked before a process exists, and what is set up before a run."""

from __future__ import annotations

import contextlib
import signal
from datetime import timedelta
from functools import partial
from typing import Literal, override

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_mimo.callbacks.model_summary import replace_model_summary
from lightning_mimo.checkpoint.manager import RunCheckpoints
from lightning_mimo.data.run_data import RunData
from lightning_mimo.errors import ConfigError
from lightning_mimo.known_warnings import hush_known_warnings
from lightning_mimo.launch.fork_launcher import ForkLauncher, can_fork
from lightning_mimo.launch.preemption import Preemption
from lightning_mimo.layout.batch_plan import RankBatchPlan, validate_batch_sizes
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism
from lightning_mimo.mimo_parallel_utils import validate_data_loader_contract, validate_no_stub_ranks
from lightning_mimo.observe.spans import Spans, clock_of
from lightning_mimo.observe.watchdog import Watchdog
from lightning_mimo.optim.ddp import check_options, options_by_module, wrap_with_ddp
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.parallel.random import seed_megatron
from lightning_mimo.strategy.batch_runner import BatchRunner
from lightning_mimo.strategy.epoch_loop import replace_epoch_loop
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.no_profiler import replace_no_profiler
from lightning_mimo.strategy.precision import MimoPrecision
from lightning_mimo.strategy.running_strategy import RunningStrategy
from lightning_mimo.strategy.step_metrics import collect_step_metrics
from lightning_mimo.strategy.trainer_check import check_trainer
from lightning_mimo.strategy.used_hooks import UsedHooks

_CHOICES = {
    "check_samples": ("first", "always", "never"),
    "on_nonfinite": ("raise", "skip"),
    "on_save_error": ("raise", "warn"),
}


class MimoStrategy(RunningStrategy):
    """Trains a :class:`MimoModule` with every module on a HyperCommGrid of its own.

    Example::

        strategy = MimoStrategy(
            modules={"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)},
            global_batch_size=64,
            num_microbatches=4,
        )
        Trainer(devices=4, strategy=strategy).fit(model, datamodule)
    """

    strategy_name = "mimo"

    def __init__(
        self,
        modules: dict[str, ModuleParallelism],
        global_batch_size: int,
        num_microbatches: int = 1,
        *,
        colocate: bool = False,
        encoder_run_ahead: int = 1,
        check_samples: Literal["first", "always", "never"] = "first",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        async_save: bool = False,
        on_save_error: Literal["raise", "warn"] = "raise",
        telemetry: bool = True,
        ddp: DistributedDataParallelConfig | dict[str, DistributedDataParallelConfig] | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        """
        Args:
            modules: module name -> its parallelism. One is called ``language``. In the order written, modules take one
                run of ranks after the other.
            global_batch_size: samples per step over all ranks. With ``accumulate_grad_batches=k`` an optimizer step
                sees k of them.
            num_microbatches: pipeline microbatches that a global batch is cut into.
            colocate: put every module on all ranks instead.
            encoder_run_ahead: microbatches that an encoder on ranks of its own computes before 1F1B asks for them, so
                that the language module need not wait for one that takes longer than others. Each costs an encoder
                rank the memory of one more microbatch's activations.
            check_samples: when to check that all ranks hold the same samples: in the first batch of every epoch and
                evaluation, in every batch, or never. It costs one small all-reduce.
            on_nonfinite: what to do where a loss or a gradient is not finite: stop on all ranks, with the module, rank,
                microbatch and samples in the message; or leave out the step, on all ranks alike. A loss scale that is
                too large is no reason to stop: the step is left out and the scale halved.
            async_save: go on training while a checkpoint is being written; at most one is at a time.
            on_save_error: what to do where a checkpoint cannot be written: stop on all ranks, or warn and go on.
            telemetry: log what each module does, see :class:`lightning_mimo.observe.telemetry.Telemetry`.
            ddp: settings of Megatron's DistributedDataParallel: one for all modules, or by module name. Gradients are
                always summed and then divided by the tokens of the global batch; ``grad_reduce_in_fp32`` follows from
                the precision.
            process_group_backend: torch.distributed backend; ``None`` is nccl on GPUs and gloo on CPUs.
            timeout: how long a rank may wait for another, in a collective or a transfer. After it, every rank says
                what it does and waits for, and the run ends with exit code 1.
            accelerator: as for every ParallelStrategy; set by the Trainer.
            parallel_devices: as for every ParallelStrategy; set by the Trainer.
            cluster_environment: as for every ParallelStrategy; set by the Trainer.
            checkpoint_io: not used: checkpoints are written by all ranks, see ``lightning_mimo.checkpoint``.
            precision_plugin: as for every ParallelStrategy; set by the Trainer.
        """
        super().__init__(
            global_batch_size=global_batch_size,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
        )
        self.modules = dict(modules)
        self.num_microbatches = num_microbatches
        self.colocate = colocate
        self.encoder_run_ahead = encoder_run_ahead
        self.check_samples = check_samples
        self.on_nonfinite = on_nonfinite
        self.async_save = async_save
        self.on_save_error = on_save_error
        self.log_telemetry = telemetry
        self.ddp = ddp
        self.spans = Spans()
        self._backend = process_group_backend
        self._timeout = timeout
        self._plan: RankBatchPlan | None = None
        self._open = contextlib.ExitStack()  # what teardown has to close

    # ------------------------------------------------------- before a process

    def validate(self, trainer: pl.Trainer | None = None) -> MimoLayout:
        """Check layout and batch sizes against the Trainer's devices and nodes. Needs no process and no device.

        Args:
            trainer: whose callbacks and options are checked, too.

        Raises:
            LayoutError: naming the module, the arithmetic and the remedy.
            ConfigError: the same for an option that cannot be.
        """
        if trainer is not None:
            check_trainer(trainer, None if self.lightning_module is None else self._module)
        layout = MimoLayout.resolve(
            self.modules, world_size=self.num_nodes * self.num_processes, colocate=self.colocate
        )
        self._micro_batch_sizes(layout)
        if self.lightning_module is not None:
            self._module.check_layout(layout)
        check_options(self.ddp_by_module, self.precision_plugin.dtype_policy)
        for argument, choices in _CHOICES.items():
            if (value := getattr(self, argument)) not in choices:
                raise ConfigError(f"MimoStrategy({argument}={value!r}): choose one of {choices}.")
        ahead = self.encoder_run_ahead
        if not isinstance(ahead, int) or isinstance(ahead, bool) or ahead < 0:
            raise ConfigError(
                f"MimoStrategy(encoder_run_ahead={ahead!r}) must be a whole number of microbatches, 0 or more."
            )
        return layout

    @property
    def ddp_by_module(self) -> dict[str, DistributedDataParallelConfig]:
        """How each module is wrapped in DDP."""
        return options_by_module(self.ddp, self.modules)

    def _micro_batch_sizes(self, layout: MimoLayout) -> dict[str, int]:
        return validate_batch_sizes(
            {name: sizes.dp for name, sizes in layout.modules.items()},
            global_batch_size=self.global_batch_size,
            num_microbatches=self.num_microbatches,
        )

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self.cluster_environment.creates_processes_externally or can_fork(self.parallel_devices[0]):
            self._launcher = ForkLauncher(
                self.cluster_environment,
                num_processes=self.num_processes,
                num_nodes=self.num_nodes,
                validate=self.validate,
            )
        else:
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    # ------------------------------------------------------------------ setup

    @override
    def connect(self, model: pl.LightningModule) -> None:
        hush_known_warnings()
        super().connect(model)

    @override
    def setup_environment(self) -> None:
        layout = self.validate(self.lightning_module.trainer)
        super().setup_environment()
        self._set_world_ranks()
        reset_seed()
        self._open.enter_context(self._megatron_on_device())
        if self.infra is None:
            self.spans.clock = clock_of(self.root_device)
            self._build_infra(layout)
        seed_megatron(layout, self.global_rank, seed=self.seed)

    def _build_infra(self, layout: MimoLayout) -> None:
        """Process groups, and each rank's share of the data. They outlive ``fit``, so that ``test`` can follow it."""
        backend = self._backend or _get_default_process_group_backend_for_device(self.root_device)
        patience = Watchdog.patience_after(self._timeout)
        _init_dist_connection(self.cluster_environment, backend, timeout=patience)
        self.seed = self.broadcast(torch.initial_seed() % 2**63)
        self.infra = MimoModelInfra.build(layout, spans=self.spans)
        self._plan = RankBatchPlan.build(
            layout,
            self.global_rank,
            global_batch_size=self.global_batch_size,
            num_microbatches=self.num_microbatches,
        )
        validate_no_stub_ranks(self.infra.module_to_grid_map, self.world_size)
        validate_data_loader_contract(
            self.infra, self.global_batch_size, self._micro_batch_sizes(layout), self.num_microbatches
        )

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = self._module
        # The strategy is distributed, but Lightning's sampler would give every rank samples of its own.
        trainer._accelerator_connector.use_distributed_sampler = False
        replace_model_summary(trainer.callbacks)
        self.hooks = UsedHooks(trainer, MimoModule)
        replace_epoch_loop(trainer, self.hooks)
        replace_no_profiler(trainer)
        # Megatron caches rotary embeddings, and those made in inference mode could not be trained with afterwards.
        fit_validation = trainer.fit_loop.epoch_loop.val_loop
        for loop in (fit_validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        # Megatron builds its layers on this rank's device, torch's own (layer norms) come from the CPU.
        module.model.to(self.root_device)
        if trainer.state.fn == TrainerFn.FITTING:
            wrap_with_ddp(module.model, self.infra, self.ddp_by_module, self.precision_plugin.dtype_policy)
        self._checkpoints = RunCheckpoints(
            async_save=self.async_save, on_save_error=self.on_save_error, timeout=self._timeout
        )
        self._open.callback(self._checkpoints.close)
        self._data = RunData(self._plan)
        self._runner = BatchRunner(
            module,
            self.infra,
            global_batch_size=self.global_batch_size,
            encoder_run_ahead=self.encoder_run_ahead,
            device=self.root_device,
            check_samples=self.check_samples,
            on_nonfinite=self.on_nonfinite,
            signals=self._signals,
            telemetry=self.log_telemetry and trainer.state.fn == TrainerFn.FITTING,
            load_ahead=self._data.load_ahead,
            metrics=None if trainer.barebones else collect_step_metrics(trainer),
        )
        self._watch()
        if not any(isinstance(callback, Preemption) for callback in trainer.callbacks):
            trainer.callbacks.append(
                Preemption(lambda: self._runner.must_stop, self._signals, self.cluster_environment)
            )
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _watch(self) -> None:
        """Watch over the waiting of this rank, now that all of its process groups exist."""
        self.infra.set_timeout(Watchdog.patience_after(self._timeout))
        launcher = self._launcher
        forked = isinstance(launcher, ForkLauncher)
        watchdog = Watchdog(
            self.spans,
            self.infra.layout,
            timeout=self._timeout,
            end_node=launcher.kill_node if forked else partial(launcher.kill, signal.SIGKILL),
            leaves_first=self.local_rank == 0,
        )
        watchdog.start()
        self._open.callback(watchdog.stop)

    @override
    def model_to_device(self) -> None:
        """Nothing: :meth:`setup` does it before it wraps the modules."""

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin or MimoPrecision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # None is kept: with a plugin of its own, the Trainer would not look at its precision argument.
        self._precision_plugin = None if plugin is None else MimoPrecision.convert(plugin)

    # --------------------------------------------------------------- the end

    @override
    def teardown(self) -> None:
        """Also after an exception, so without collectives. Process groups stay, for the next call of the Trainer."""
        # Not the base class's: it would move parameters to the CPU, out of DDP's buffers, under the next call's feet.
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self._runner = None
        self._signals.remove()
        self._open.close()
