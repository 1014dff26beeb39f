"""MimoStrategy, from top to bottom in the order in which the Trainer calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, override

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from megatron.core.distributed import DistributedDataParallelConfig
from torch.utils.data import DataLoader

from lightning_mimo.cpu import megatron_on
from lightning_mimo.errors import ConfigError
from lightning_mimo.known_warnings import hush_known_warnings
from lightning_mimo.launch.fork_launcher import make_launcher
from lightning_mimo.layout.batch_plan import RankBatchPlan, micro_batch_sizes
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism
from lightning_mimo.mimo.replica_check import check_replicas
from lightning_mimo.observe.spans import Spans, clock_of
from lightning_mimo.optim.ddp import check_options, complete_gathering, options_by_module, wrap_with_ddp
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.parallel.random import seed_megatron
from lightning_mimo.strategy.batch_runner import Batch, StepListener
from lightning_mimo.strategy.module import MimoModule, as_mimo_module
from lightning_mimo.strategy.options import Checks, Monitoring, Saving, check_run_ahead, refuse_moved
from lightning_mimo.strategy.precision import MimoPrecision
from lightning_mimo.strategy.run import Run, the_only
from lightning_mimo.strategy.trainer_check import check_trainer
from lightning_mimo.strategy.trainer_setup import set_up_trainer
from lightning_mimo.strategy.world import WorldCollectives, build_infra, join_world, start_watchdog


class MimoStrategy(ParallelStrategy):
    """Trains a :class:`MimoModule` with every module on a HyperCommGrid of its own.

    Example::

        modules = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}
        strategy = MimoStrategy(modules, global_batch_size=64, saving=Saving(asynchronous=True))
        Trainer(devices=4, strategy=strategy).fit(model, datamodule)

    Attributes:
        spans: what this rank does is noted here.
        infra: layout, grids and process groups; ``None`` before there are any.
        plan: this rank's share of every global batch; ``None`` before there are ranks.
        seed: of initial weights, the order of samples and their augmentation, the same on every rank.
    """

    num_nodes = 1  # set by the Trainer
    is_distributed = True  # or log(sync_dist=True) would do nothing
    restore_checkpoint_after_setup = True  # into the shards that setup() makes
    lightning_restore_optimizer = False  # load_checkpoint() does it

    @refuse_moved
    def __init__(
        self,
        modules: dict[str, ModuleParallelism],
        global_batch_size: int,
        num_microbatches: int = 1,
        *,
        colocate: bool = False,
        encoder_run_ahead: int = 1,
        ddp: DistributedDataParallelConfig | dict[str, DistributedDataParallelConfig] | None = None,
        checks: Checks = Checks(),
        saving: Saving = Saving(),
        monitoring: Monitoring = Monitoring(),
        process_group_backend: str | None = None,
        cluster_environment: ClusterEnvironment | None = None,
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
                that the language module need not wait for a long one. Each costs memory for its activations.
            ddp: settings of Megatron's DistributedDataParallel: one for all modules, or by module name. Gradients are
                always summed and then divided by the tokens of the global batch; ``grad_reduce_in_fp32`` follows from
                the precision.
            checks: what is checked in every run.
            saving: how checkpoints are saved.
            monitoring: telemetry, and how long a rank may wait for another.
            process_group_backend: torch.distributed backend; ``None`` is nccl on GPUs and gloo on CPUs.
            cluster_environment: as for every ParallelStrategy; set by the Trainer.
            precision_plugin: as for every ParallelStrategy; set by the Trainer.
        """
        super().__init__(cluster_environment=cluster_environment, precision_plugin=precision_plugin)
        check_run_ahead(encoder_run_ahead)
        self.modules = dict(modules)
        self.global_batch_size = global_batch_size
        self.num_microbatches = num_microbatches
        self.colocate = colocate
        self.encoder_run_ahead = encoder_run_ahead
        self.ddp = ddp
        self.checks = checks
        self.saving = saving
        self.monitoring = monitoring
        self.process_group_backend = process_group_backend
        self.spans = Spans()
        self.infra: MimoModelInfra | None = None
        self.plan: RankBatchPlan | None = None
        self.seed = 0
        self._world = WorldCollectives(self.spans)
        self._run: Run | None = None
        self._open = contextlib.ExitStack()  # what teardown has to close

    # ------------------------------------------------- the Trainer is made: precision, devices, launcher

    @property
    @override
    def precision_plugin(self) -> MimoPrecision:
        plugin = self._precision_plugin
        return plugin if isinstance(plugin, MimoPrecision) else MimoPrecision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # None is kept: with a plugin of its own, the Trainer would not look at its precision argument.
        self._precision_plugin = None if plugin is None else MimoPrecision.convert(plugin)

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Ranks on this node."""
        return len(self.parallel_devices or [])

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None and self.parallel_devices is not None
        environment, devices, timeout = self.cluster_environment, self.parallel_devices, self.monitoring.timeout
        self._launcher = make_launcher(environment, devices, self.num_nodes, timeout, self.validate)

    # ------------------------------------------------- before other ranks are started

    def validate(self, trainer: pl.Trainer | None = None) -> MimoLayout:
        """Check layout and batch sizes against the Trainer's devices and nodes. Needs no process and no device.

        Args:
            trainer: whose callbacks and options are checked, too.

        Raises:
            ConfigError: naming the module or option, the arithmetic and the remedy; a LayoutError for sizes.
        """
        if trainer is not None:
            check_trainer(trainer, None if self.lightning_module is None else self._module)
        world_size = self.num_nodes * self.num_processes
        layout = MimoLayout.resolve(self.modules, world_size=world_size, colocate=self.colocate)
        micro_batch_sizes(layout, global_batch_size=self.global_batch_size, num_microbatches=self.num_microbatches)
        check_options(self.ddp_by_module, self.precision_plugin.dtype_policy)
        return layout

    @property
    def ddp_by_module(self) -> dict[str, DistributedDataParallelConfig]:
        """How each module is wrapped in DDP."""
        return options_by_module(self.ddp, self.modules)

    # ------------------------------------------------- on every rank: process groups, model, optimizer

    @override
    def connect(self, model: pl.LightningModule) -> None:
        hush_known_warnings()
        super().connect(model)

    @property
    def _module(self) -> MimoModule:
        return as_mimo_module(self.lightning_module)

    @override
    def setup_environment(self) -> None:
        """Process groups and seeds. The groups outlive ``fit``, so that ``test`` can follow it."""
        layout = self.validate(self._module.trainer)
        super().setup_environment()
        assert self.cluster_environment is not None
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]  # an attribute of the function
        reset_seed()
        self._open.enter_context(megatron_on(self.root_device))
        if self.infra is None:
            self.spans.clock = clock_of(self.root_device)
            join_world(self.cluster_environment, self.root_device, self.process_group_backend, self.monitoring.timeout)
            self.infra, self.plan = build_infra(
                layout, self.spans, global_batch_size=self.global_batch_size, num_microbatches=self.num_microbatches
            )
            self.seed = self.broadcast(torch.initial_seed() % 2**63)
        seed_megatron(layout, self.global_rank, seed=self.seed)

    @contextlib.contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Around ``configure_model``: build on the CPU on every accelerator, as a GPU draws other initial weights."""
        with super().tensor_init_context(empty_init=empty_init), torch.device("cpu"):
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Called after the module's ``configure_model``: wrap the model, and make what this stage needs."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module, infra, plan, is_fitting = self._module, self.infra, self.plan, trainer.state.fn == TrainerFn.FITTING
        assert infra is not None and plan is not None
        signals = set_up_trainer(trainer, self.cluster_environment, must_stop=lambda: self.run.batches.must_stop)
        # Megatron builds its layers on this rank's device, torch's own (layer norms) come from the CPU.
        module.mimo_model.to(self.root_device)
        if is_fitting:
            wrap_with_ddp(module.mimo_model, infra, self.ddp_by_module, self.precision_plugin.dtype_policy)
        self._run = Run.build(
            module,
            infra,
            plan,
            encoder_run_ahead=self.encoder_run_ahead,
            checks=self.checks,
            saving=self.saving,
            monitoring=self.monitoring,
            signals=signals,
            device=self.root_device,
        )
        self._open.callback(self._run.end)
        watchdog = start_watchdog(infra, self.launcher, self.root_device, self.local_rank, self.monitoring.timeout)
        self._open.callback(watchdog.stop)
        if is_fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @override
    def model_to_device(self) -> None:
        """Nothing: :meth:`setup` does it before it wraps the modules."""

    # ------------------------------------------------- a checkpoint to go on from

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what any layout wrote, and Lightning's own state. Collective over the world."""
        path = Path(self.broadcast(str(checkpoint_path)))
        trainer, self.seed = self.run.load(path, self.optimizers, seed=self.seed)
        return trainer

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: :meth:`load_checkpoint` has put the weights in place."""

    # ------------------------------------------------- data and batches

    @override
    def process_dataloader(self, dataloader: object) -> DataLoader:
        """Rebuild a user's DataLoader for this rank."""
        return self.run.shard(dataloader, seed=self.seed)

    @override
    def on_train_start(self) -> None:
        """Compare the weights of replicas, and draw from here on what the saved run would have drawn."""
        complete_gathering(self._module.mimo_model)
        check_replicas(self._module.mimo_model, self._module.infra)
        self.run.restore_generators(self.global_rank)

    @override
    def training_step(self, batch: Batch, batch_idx: int, *args: Any) -> torch.Tensor:
        """Forward and backward of one global batch; the global loss, the same on every rank."""
        return self.run.batches.train(batch, batch_idx, the_only(self.optimizers))

    @contextlib.contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate gradients unreduced: more batches follow before the optimizer steps."""
        self.run.batches.is_accumulating = True
        try:
            yield
        finally:
            self.run.batches.is_accumulating = False

    @override
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.run.batches.end_accumulation(optimizer)
        return result

    @override
    def validation_step(self, batch: Batch, batch_idx: int, *args: Any) -> torch.Tensor:
        return self.run.batches.evaluate("val", self._module.validation_step, batch, batch_idx, *args)

    @override
    def test_step(self, batch: Batch, batch_idx: int, *args: Any) -> torch.Tensor:
        return self.run.batches.evaluate("test", self._module.test_step, batch, batch_idx, *args)

    @override
    def predict_step(self, batch: Batch, batch_idx: int, *args: Any) -> list[dict[str, Any]]:
        """Greedy answers: ``[{"sample_index": int, "tokens": [int, …]}, …]`` of the global batch, on every rank."""
        return self.run.batches.predict(batch, batch_idx)

    def generate(self, batch: Batch, *, max_new_tokens: int) -> torch.Tensor:
        """Write tokens for every sample of a global batch. Collective over the world.

        Returns:
            int64 ``[global_batch_size, max_new_tokens]``, by position in the global batch.
        """
        return self.run.batches.generate(batch, max_new_tokens=max_new_tokens)

    @property
    def step_listeners(self) -> list[StepListener]:
        """Are called with the spans of this rank whenever an optimizer step is done."""
        return self.run.batches.listeners

    @property
    def run(self) -> Run:
        """What belongs to the stage that is running, or was the last one."""
        assert self._run is not None, "setup() makes it"
        return self._run

    # ------------------------------------------------- between batches: collectives over all ranks

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return self._world.reduce(tensor, group, reduce_op)

    @override
    def barrier(self, name: str | None = None) -> None:
        self._world.barrier(self.root_device)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return self._world.broadcast(obj, src)

    # ------------------------------------------------- checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights go to the checkpoint directory piece by piece, see :meth:`save_checkpoint`."""
        return {}

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """What is no tensor of a parameter; those go to the checkpoint directory piece by piece."""
        return optimizer.plain_state()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write weights, the optimizer's state and Lightning's own into a directory. Collective over the world.

        Raises:
            ConfigError: for storage options, which belong to a CheckpointIO.
            CheckpointWriteError: on every rank, if it failed on any; unless errors are to be warnings.
        """
        if storage_options is not None:
            raise ConfigError("save_checkpoint(storage_options=...) is not supported: there is no CheckpointIO.")
        path = Path(self.broadcast(str(filepath)))
        with megatron_on(self.root_device):
            self.run.save(path, checkpoint, self.optimizers, seed=self.seed)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint; with asynchronous saving not before the one that is being written is there."""
        if self.is_global_zero:
            self.run.checkpoints.remove(Path(filepath))

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written. Collective over the world.

        Raises:
            CheckpointWriteError: on every rank, if it failed on any.
        """
        self.run.checkpoints.finish()

    # ------------------------------------------------- the end

    @override
    def on_train_end(self) -> None:
        """Weights and checkpoints are whole from here on. Not in ``teardown``, which must not wait for other ranks."""
        complete_gathering(self._module.mimo_model)
        self.finish_saving()

    @override
    def teardown(self) -> None:
        """Also after an exception, so without collectives. Process groups stay, for the next call of the Trainer."""
        # Not the base class's: it would move parameters to the CPU, out of DDP's buffers.
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self._open.close()
