"""The Lightning strategy MimoStrategy. Its methods are in the order in which the Trainer calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, override

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.strategies.strategy import TBroadcast
from lightning.pytorch.trainer.states import TrainerFn
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_mimo.cpu import megatron_on
from lightning_mimo.errors import ConfigError
from lightning_mimo.known_warnings import hush_known_warnings
from lightning_mimo.launch.cuda_connections import set_cuda_connections
from lightning_mimo.launch.fork_launcher import make_launcher
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism
from lightning_mimo.observe.spans import Spans, clock_of
from lightning_mimo.optim.ddp import complete_gathering, options_by_module, wrap_with_ddp
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.parallel.nccl import NcclOptions
from lightning_mimo.parallel.random import seed_megatron
from lightning_mimo.strategy import world
from lightning_mimo.strategy.batch_runner import Batch, StepListener
from lightning_mimo.strategy.local_paths import local_path
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.module_check import as_mimo_module
from lightning_mimo.strategy.options import Checks, Monitoring, Saving, check_batch_options, refuse_moved
from lightning_mimo.strategy.own_state import load_own_state, own_state_to_save, set_up_own_state
from lightning_mimo.strategy.precision import MimoPrecision
from lightning_mimo.strategy.run import Run, set_up_optimizer, the_only
from lightning_mimo.strategy.strategy_check import check_strategy
from lightning_mimo.strategy.trainer_setup import set_up_trainer
from lightning_mimo.strategy.training_start import check_training_start


class MimoStrategy(ParallelStrategy):
    """Lightning strategy that trains a :class:`MimoModule` with each of its modules on its own HyperCommGrid.

    Example::

        modules = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}
        strategy = MimoStrategy(modules, global_batch_size=64, saving=Saving(asynchronous=True))
        Trainer(devices=4, strategy=strategy).fit(model, datamodule)

    Attributes:
        spans: record of the work and the waits of this rank.
        infra: layout, grids and process groups; ``None`` before :meth:`setup_environment`.
        plan: this rank's share of every global batch; ``None`` before :meth:`setup_environment`.
        seed: seed of initial weights, of the order of samples and of their augmentation, the same on every rank.
    """

    num_nodes = 1  # set by the Trainer
    is_distributed = True  # otherwise log(sync_dist=True) would do nothing
    restore_checkpoint_after_setup = True  # into the shards that setup() creates
    lightning_restore_optimizer = False  # load_checkpoint() restores it

    @refuse_moved
    def __init__(
        self,
        modules: dict[str, ModuleParallelism],
        global_batch_size: int,
        num_microbatches: int = 1,
        *,
        colocate: bool = False,
        encoder_run_ahead: int = 1,
        balance: bool = True,
        pack_to: int | None = None,
        ddp: DistributedDataParallelConfig | dict[str, DistributedDataParallelConfig] | None = None,
        checks: Checks = Checks(),
        saving: Saving = Saving(),
        monitoring: Monitoring = Monitoring(),
        nccl: NcclOptions = NcclOptions(),
        process_group_backend: str | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        """
        Args:
            modules: module name -> its parallel sizes. One module must be called ``language``. Modules occupy
                consecutive ranges of ranks, in the order in which they are written.
            global_batch_size: samples per global batch, over all ranks; rows of samples with ``pack_to``. With
                ``accumulate_grad_batches=k``, an optimizer step uses k global batches.
            num_microbatches: number of pipeline microbatches that a global batch is split into.
            colocate: put every module on all ranks instead of on consecutive, separate ranks.
            encoder_run_ahead: microbatches that an encoder on separate ranks computes before 1F1B requests them, so
                that the language module does not wait for a microbatch that takes longer than others. On an encoder
                rank, each needs memory for the activations of one more microbatch.
            balance: give replicas even work if the dataset has a method ``cost(index)``; gradients stay the same.
            pack_to: pack samples into rows of at most so many tokens, in training, validation and test. A row takes
                the place of a sample in ``global_batch_size``; attention and positions stay those of each sample. The
                dataset must tell lengths, see :func:`lightning_mimo.data.packing.gather_lengths`. ``None`` pads samples
                instead.
            ddp: settings of Megatron's DistributedDataParallel: one config for all modules, or one per module name.
                Gradients are always summed and then divided by the number of tokens of the global batch;
                ``grad_reduce_in_fp32`` is determined by the precision.
            checks: settings of the checks in every run.
            saving: settings of saving checkpoints.
            monitoring: telemetry, and the longest time that a rank may wait for another.
            nccl: options of NCCL, by what process groups are used for.
            process_group_backend: torch.distributed backend; ``None`` selects nccl on GPUs and gloo on CPUs.
            cluster_environment: Lightning's ClusterEnvironment; set by the Trainer.
            precision_plugin: Lightning's precision plugin; set by the Trainer.
        """
        super().__init__(cluster_environment=cluster_environment, precision_plugin=precision_plugin)
        check_batch_options(encoder_run_ahead=encoder_run_ahead, balance=balance, pack_to=pack_to)
        self.modules = dict(modules)
        self.global_batch_size = global_batch_size
        self.num_microbatches = num_microbatches
        self.colocate = colocate
        self.encoder_run_ahead = encoder_run_ahead
        self.balance = balance
        self.pack_to = pack_to
        self.ddp = ddp
        self.checks = checks
        self.saving = saving
        self.monitoring = monitoring
        self.nccl = nccl
        self.process_group_backend = process_group_backend
        self.spans = Spans()
        self.infra: MimoModelInfra | None = None
        self.plan: RankBatchPlan | None = None
        self.seed = 0
        self._world = world.WorldCollectives(self.spans)
        self._run: Run | None = None
        self._open = contextlib.ExitStack()  # resources that teardown() closes

    # ------------------------------------------------- the Trainer is constructed: precision, devices, launcher

    @property
    @override
    def precision_plugin(self) -> MimoPrecision:
        plugin = self._precision_plugin
        return plugin if isinstance(plugin, MimoPrecision) else MimoPrecision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # None is kept: if the strategy had a plugin already, the Trainer would ignore its precision argument.
        self._precision_plugin = None if plugin is None else MimoPrecision.convert(plugin)

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Number of ranks on this node."""
        return len(self.parallel_devices or [])

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None and self.parallel_devices is not None
        environment, devices, timeout = self.cluster_environment, self.parallel_devices, self.monitoring.timeout
        self._launcher = make_launcher(environment, devices, self.num_nodes, timeout, self.validate)

    # ------------------------------------------------- before other ranks start

    def validate(self, trainer: pl.Trainer | None = None) -> MimoLayout:
        """Check layout and batch sizes against the Trainer's devices and nodes. Needs no process group and no device.

        Args:
            trainer: a Trainer whose callbacks and options are checked, too.

        Returns:
            The complete layout.

        Raises:
            ConfigError: names the module or option, the arithmetic and the remedy; a LayoutError for sizes.
        """
        return check_strategy(self, trainer)

    @property
    def ddp_by_module(self) -> dict[str, DistributedDataParallelConfig]:
        """Module name -> its DDP config."""
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
        """Create process groups and set seeds. The groups persist after ``fit``, so that ``test`` can follow it."""
        layout = self.validate(self._module.trainer)
        set_cuda_connections(layout, self.root_device, self.process_group_backend)
        super().setup_environment()
        assert self.cluster_environment is not None
        environment, on_node = self.cluster_environment, self.num_processes
        rank, world_size = self.node_rank * on_node + self.local_rank, self.num_nodes * on_node
        world.tell_rank(environment, rank=rank, world_size=world_size)
        self._open.enter_context(megatron_on(self.root_device))
        if self.infra is None:
            self.spans.clock = clock_of(self.root_device)
            world.join_world(environment, self.root_device, self.process_group_backend, self.monitoring.timeout)
            self.infra, self.plan = world.build_infra(
                layout, self.spans, self.nccl, self.global_batch_size, self.num_microbatches
            )
            self.seed = self.broadcast(torch.initial_seed() % 2**63)
        seed_megatron(layout, self.global_rank, seed=self.seed)

    @contextlib.contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build the model on the CPU with any accelerator, because a GPU would draw different initial weights."""
        with super().tensor_init_context(empty_init=empty_init), torch.device("cpu"):
            yield

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        """Wrap the model and set up this stage. Called after the module's ``configure_model``."""
        module, infra, is_fitting = self._module, self.infra, trainer.state.fn == TrainerFn.FITTING
        assert self.accelerator is not None and infra is not None
        self.accelerator.setup(trainer)
        signals = set_up_trainer(self, trainer)
        # Megatron builds its layers on this rank's device, but torch's layers (layer norms) are still on the CPU.
        module.mimo_model.to(self.root_device)
        set_up_own_state(module, self.root_device)
        if is_fitting:
            wrap_with_ddp(module.mimo_model, infra, self.ddp_by_module, self.precision_plugin.dtype_policy)
        self._run = Run.build(self, module, signals, previous=self._run)
        self._open.callback(self._run.end)
        self._open.callback(
            world.start_watchdog(infra, self.launcher, self.root_device, self.local_rank, self.monitoring.timeout).stop
        )
        world.connect_ranks(module.mimo_model, infra, training=is_fitting)
        if is_fitting:
            set_up_optimizer(self, trainer)
        self.setup_precision_plugin()

    @override
    def model_to_device(self) -> None:
        """Do nothing: :meth:`setup` moves the model before it wraps the modules."""

    # ------------------------------------------------- resuming from a checkpoint

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint that was written by any layout, and return Lightning's state. Collective over the world."""
        path = local_path(self.broadcast(str(checkpoint_path)))
        trainer, self.seed = self.run.load(path, self.optimizers, seed=self.seed)
        return trainer

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restore the module's own buffers. :meth:`load_checkpoint` has already loaded the model."""
        load_own_state(self._module, checkpoint["state_dict"])

    # ------------------------------------------------- data and batches

    @override
    def process_dataloader(self, dataloader: object) -> object:
        """Rebuild a user's DataLoader for this rank."""
        return self.run.shard(dataloader, seed=self.seed)

    @override
    def on_train_start(self) -> None:
        """Compare the weights of replicas, and restore the random generators of a checkpoint."""
        self._after_first_step = check_training_start(self._module, self._module.trainer)
        self.run.restore_generators(self.global_rank)

    @override
    def training_step(self, batch: Batch, batch_idx: int, *args: Any) -> torch.Tensor:
        """Run forward and backward of one global batch. Returns its loss, the same on every rank."""
        return self.run.batches.train(batch, batch_idx, the_only(self.optimizers))

    @contextlib.contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate gradients without reducing them, because the optimizer does not step after this batch."""
        with self.run.batches.accumulating():
            yield

    @override
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.run.batches.end_accumulation(optimizer)
        self._after_first_step()
        return result

    @override
    def validation_step(self, batch: Batch, batch_idx: int, *args: Any) -> torch.Tensor:
        return self.run.batches.evaluate("val", self._module.validation_step, batch, batch_idx, *args)

    @override
    def test_step(self, batch: Batch, batch_idx: int, *args: Any) -> torch.Tensor:
        return self.run.batches.evaluate("test", self._module.test_step, batch, batch_idx, *args)

    @override
    def predict_step(self, batch: Batch, batch_idx: int, *args: Any) -> list[dict[str, Any]]:
        """Decode greedily: ``[{"sample_index": int, "tokens": [int, …]}, …]`` of the global batch, on every rank."""
        return self.run.batches.predict(batch, batch_idx, *args)

    def generate(self, batch: Batch, *, max_new_tokens: int) -> torch.Tensor:
        """Generate tokens for every sample of a global batch. Collective over the world.

        Returns:
            int64 ``[global_batch_size, max_new_tokens]``, by position in the global batch.
        """
        return self.run.batches.generate(batch, max_new_tokens=max_new_tokens)

    @property
    def step_listeners(self) -> list[StepListener]:
        """Functions that are called with the spans of this rank after each optimizer step."""
        return self.run.batches.listeners

    @property
    def run(self) -> Run:
        """State of the current stage, or of the last one after it has ended."""
        assert self._run is not None, "setup() makes it"
        return self._run

    # ------------------------------------------------- between batches: collectives over all ranks

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return self._world.reduce(tensor, group, reduce_op)

    @override
    def barrier(self, name: str | None = None) -> None:
        self._world.barrier(self.root_device, timeout=self.monitoring.timeout if self._run is None else None)

    @override
    def broadcast(self, obj: TBroadcast, src: int = 0) -> TBroadcast:
        return self._world.broadcast(obj, src)

    # ------------------------------------------------- checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's own buffers; the model is written as shards, see :meth:`save_checkpoint`. Collective."""
        return own_state_to_save(self._module)

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Optimizer state except the tensors of parameters, which are written to the checkpoint as shards."""
        return optimizer.plain_state()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write weights, optimizer state and Lightning's state into a directory. Collective over the world.

        Raises:
            ConfigError: if storage options are given, which only a CheckpointIO supports.
            CheckpointWriteError: on every rank, if writing failed on any rank and ``Saving(on_error="raise")`` is set.
        """
        if storage_options is not None:
            raise ConfigError("save_checkpoint(storage_options=...) is not supported: there is no CheckpointIO.")
        path = local_path(self.broadcast(str(filepath)))
        with megatron_on(self.root_device):
            self.run.save(path, checkpoint, self.optimizers, seed=self.seed)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint. With asynchronous saving, this is deferred until the pending checkpoint is written."""
        if self.is_global_zero:
            self.run.checkpoints.remove(local_path(filepath))

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written. Collective over the world.

        Raises:
            CheckpointWriteError: on every rank, if writing failed on any rank.
        """
        self.run.checkpoints.finish()

    # ------------------------------------------------- the end

    @override
    def on_train_end(self) -> None:
        """Complete pending weights and checkpoints. Not done in ``teardown``, which must not wait for other ranks."""
        complete_gathering(self._module.mimo_model)
        self.finish_saving()

    @override
    def teardown(self) -> None:
        """Close the stage without collectives, since an exception may have ended it. Process groups persist."""
        # The base class's teardown is not called: it would move parameters to the CPU, out of DDP's buffers.
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self._open.close()
