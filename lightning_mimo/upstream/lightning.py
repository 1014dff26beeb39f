"""What is private in Lightning."""

from __future__ import annotations

from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _set_num_threads_if_needed,
)
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from lightning_mimo.upstream import Attribute

IMPORTED = {
    "_get_default_process_group_backend_for_device": "the backend that every strategy of Lightning's takes",
    "_init_dist_connection": "as in every strategy of Lightning's: the default process group, and its end at exit",
    "_set_num_threads_if_needed": "as in every launcher of Lightning's: threads of a rank that shares its machine",
    "_DataFetcher": "an argument of a method of the loop",
    "_TrainingEpochLoop": "base class, to leave out its broadcast in every batch",
    "_IndexBatchSamplerWrapper": "the predict loop wraps a user's batch sampler in it",
    "_Launcher": "base class of launchers",
    "_SubprocessScriptLauncher": "starts the ranks of a node where they cannot be forked",
    "_SignalConnector": "base class, to note signals in place of its handlers, which save and broadcast",
}
"""Name -> reason."""

_CONNECTORS = "lightning.pytorch.trainer.connectors"
_LOGGER_CONNECTOR = f"{_CONNECTORS}.logger_connector.logger_connector._LoggerConnector"
_SIGNAL_CONNECTOR = f"{_CONNECTORS}.signal_connector._SignalConnector"
_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
_EPOCH_LOOP = "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"
_STRATEGY = "lightning.pytorch.strategies.strategy.Strategy"
_CLI = "lightning.pytorch.cli.LightningCLI"

ATTRIBUTES = (
    Attribute("lightning.pytorch.cli.LightningCLI", "_parse_ckpt_path", "would unpickle a file; ours are directories"),
    Attribute("lightning.pytorch.cli.LightningCLI", "_set_seed", "to refuse a seed out of range by its key"),
    Attribute(_TRAINER, "_model_registry", "to refuse it"),
    # The loop
    Attribute("lightning.pytorch.loops.fit_loop._FitLoop", "epoch_loop", "to put ours in its place"),
    Attribute(_EPOCH_LOOP, "_broadcast_sigterm_tensor", "a broadcast and a read of the device in every batch"),
    Attribute(_EPOCH_LOOP, "_should_check_val_fx", "whether to validate, for which each rank asks its own clock"),
    Attribute(_EPOCH_LOOP, "_batches_that_stepped", "the step that loggers are given: whether the next is logged"),
    Attribute(_EPOCH_LOOP, "batch_progress", "whether a batch has been run, after which errors keep their traceback"),
    Attribute(_EPOCH_LOOP, "val_loop", "as for inference_mode"),
    Attribute(
        "lightning.pytorch.loops.evaluation_loop._EvaluationLoop",
        "inference_mode",
        "what Megatron caches in inference mode could not be trained with afterwards",
    ),
    # Metrics
    Attribute(_TRAINER, "_logger_connector", "metrics are written as Lightning's own callbacks do it"),
    Attribute(_LOGGER_CONNECTOR, "should_update_logs", "whether this step is one that loggers get"),
    Attribute(_LOGGER_CONNECTOR, "log_metrics", "to write metrics of this step"),
    Attribute(_LOGGER_CONNECTOR, "update_train_step_metrics", "a run that is told to end writes its last metrics"),
    # Signals
    Attribute(_TRAINER, "_signal_connector", "to put ours in its place"),
    Attribute(_SIGNAL_CONNECTOR, "register_signal_handlers", "called before a stage runs"),
    Attribute(_SIGNAL_CONNECTOR, "_original_handlers", "what its teardown puts back"),
    Attribute(_SIGNAL_CONNECTOR, "_get_current_signal_handlers", "as it fills in the former"),
    Attribute(_SIGNAL_CONNECTOR, "_register_signal", "sets a handler, in the main thread only"),
    Attribute(_TRAINER, "_checkpoint_connector", "for hpc_save_path"),
    Attribute(
        f"{_CONNECTORS}.checkpoint_connector._CheckpointConnector",
        "hpc_save_path",
        "where Lightning looks for a checkpoint when SLURM starts a job again",
    ),
    # The strategy
    Attribute(_STRATEGY, "_configure_launcher", "the place where a strategy chooses its launcher"),
    Attribute(_STRATEGY, "_launcher", "what that sets"),
    Attribute(_STRATEGY, "_precision_plugin", "to tell that there is none yet"),
    Attribute("lightning.pytorch.strategies.parallel.ParallelStrategy", "_layer_sync", "to refuse sync_batchnorm"),
    Attribute(_TRAINER, "_accelerator_connector", "for use_distributed_sampler"),
    Attribute(
        f"{_CONNECTORS}.accelerator_connector._AcceleratorConnector",
        "use_distributed_sampler",
        "Lightning's sampler would give every rank samples of its own",
    ),
    # Module, callbacks, data, command line
    Attribute("lightning.pytorch.core.module.LightningModule", "_trainer", "its property raises where there is none"),
    Attribute(
        "lightning.pytorch.callbacks.model_summary.ModelSummary",
        "_max_depth",
        "ours takes over what was asked for",
    ),
    Attribute(
        "lightning.pytorch.overrides.distributed._IndexBatchSamplerWrapper",
        "_batch_sampler",
        "the user's",
    ),
    Attribute(_CLI, "_get", "an argument of the subcommand, before classes are made"),
    Attribute(_CLI, "_run_subcommand", "around everything that a command runs: errors in one line, and the dry run"),
    Attribute("lightning.pytorch.cli.LightningArgumentParser", "_actions", "argparse's: the keys that there are"),
)
