"""``lightning-mimo fit | validate | test | predict``: LightningCLI with one-line errors."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import override

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_mimo.callbacks.step_trace import StepTrace
from lightning_mimo.commands.config_check import (
    check_ckpt_path,
    check_numbers,
    check_options,
    check_root_dir,
    restore_whole_numbers,
)
from lightning_mimo.commands.config_errors import OneLineParser, condense
from lightning_mimo.commands.dry_run import DryRun, dry_run_report, first_samples
from lightning_mimo.commands.report import print_report
from lightning_mimo.commands.root_dir import follow_root_dir
from lightning_mimo.errors import ConfigError, MimoError
from lightning_mimo.launch.cluster import check_slurm_tasks
from lightning_mimo.planning.gpu_kernels import DeviceType
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.strategy.strategy import MimoStrategy

# Exception types with which packages report user errors; bugs raise the same types.
_MESSAGES = (ValueError, TypeError, FileNotFoundError, MisconfigurationException)
# Seconds. Normally all ranks find the same error, and rank 0 ends the others after it has printed it.
_LET_RANK_ZERO_SPEAK = 3.0


class MimoCLI(LightningCLI):
    """LightningCLI for a MimoModule, with ``--trace DIR``.

    Attributes:
        dry_run: what to estimate instead of running; ``None`` to run.
        memory: bytes of a device, for a dry run; ``None`` if it is not known.
    """

    dry_run: DryRun | None = None
    memory: float | None = None
    _device_type: DeviceType = "cpu"  # of the config; a dry run itself uses no device

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """The command in ``sys.argv``: making the parsers of the others takes longer than reading a config."""
        every = LightningCLI.subcommands()
        return {name: skipped for name, skipped in every.items() if [name] == sys.argv[1:2]} or every

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--trace", type=str | None, help="fit only: record one step and write it to this folder (see StepTrace)"
        )

    @override
    def _parse_ckpt_path(self) -> None:
        """Do nothing: LightningCLI would unpickle a file, but checkpoints are directories."""

    @override
    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool | None) and not 0 <= seed < 2**32:
            raise ConfigError(f"seed_everything={seed} must be a whole number from 0 to {2**32 - 1}, true or false.")
        super()._set_seed()

    @override
    def before_instantiate_classes(self) -> None:
        restore_whole_numbers(self._get(self.config, "trainer"), sys.argv[2:])
        check_numbers(self._get(self.config, "trainer"))
        check_options(self._get(self.config, "trainer"))
        if not self.dry_run:
            check_root_dir(self._get(self.config, "trainer").default_root_dir)
        config_files = [str(path) for path in self._get(self.config, "config") or ()]
        follow_root_dir(self._get(self.config, "trainer"), config_files)
        folder = self._get(self.config, "trace")
        if folder is None or self.dry_run:
            return
        if self.subcommand != "fit":
            raise ConfigError(f"--trace records a training step: it works with fit, not with {self.subcommand}.")
        try:
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": [StepTrace(folder)]}
        except ModuleNotFoundError as error:
            raise ConfigError(str(error)) from error

    @override
    def instantiate_classes(self) -> None:
        check_ckpt_path(self._get(self.config, "ckpt_path"))
        with one_line():
            if self.dry_run:
                self._take_any_machine()
            super().instantiate_classes()
            if not isinstance(self.trainer.strategy, MimoStrategy):
                raise ConfigError(
                    f"trainer.strategy is a {type(self.trainer.strategy).__name__}, but this command runs a "
                    f"MimoStrategy; write class_path: lightning_mimo.MimoStrategy."
                )

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        with one_line(lambda: self.trainer.fit_loop.epoch_loop.batch_progress.total.ready > 0):
            if self.dry_run:
                data = partial(first_samples, self.trainer, self.datamodule)
                report = dry_run_report(
                    self.model,
                    self.trainer,
                    training=subcommand == "fit",
                    kind=self.dry_run,
                    data=data,
                    memory=self.memory,
                    device_type=self._device_type,
                )
                print_report(report)
            else:
                super()._run_subcommand(subcommand)

    def _take_any_machine(self) -> None:
        """Configure the ranks of the config whatever devices this machine has, and nothing that writes or connects."""
        trainer = self.config[self.subcommand].trainer
        devices = str(trainer.devices)
        if not devices.isdecimal() or devices == "0":
            raise ConfigError(
                f"trainer.devices={trainer.devices!r}: for a dry run the number must be known; give "
                f"--trainer.devices=N, the devices of one node."
            )
        self._device_type = "cpu" if trainer.accelerator == "cpu" else "cuda"
        trainer.accelerator, trainer.devices = "cpu", int(devices)
        trainer.logger, trainer.plugins, trainer.profiler = False, None, None


class DryRunCLI(MimoCLI):
    """MimoCLI for ``--dry-run``."""

    dry_run: DryRun | None = "weights"


def run(*, dry_run: DryRun | None, memory: float | None = None) -> None:
    """Run the command in ``sys.argv``.

    Args:
        dry_run: what to estimate instead of running; ``None`` to run.
        memory: bytes of a device, to say whether an estimated step fits.

    Raises:
        SystemExit: with code 2 and one line on stderr, if the config is invalid.
    """
    if dry_run is not None:
        DryRunCLI.dry_run, DryRunCLI.memory = dry_run, memory
    run_cli(DryRunCLI if dry_run else MimoCLI)


def run_cli(cli: type[MimoCLI]) -> None:
    """Run the command in ``sys.argv`` with a kind of MimoCLI."""
    if not cli.dry_run:
        check_slurm_tasks()
    with _errors_only() if cli.dry_run else contextlib.nullcontext():
        cli(
            MimoModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            save_config_callback=None if cli.dry_run else SaveConfigCallback,
            parser_class=OneLineParser,
        )


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Leave out messages about the devices of this machine and features of megatron-core: a dry run uses neither."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "megatron.core")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def one_line(has_begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn a user error into one line and exit code 2. Bugs, and all errors during training, keep their traceback."""
    try:
        yield
    except _MESSAGES as raised:
        error = _without_parsers_report(raised)
        if has_begun() or not (_is_for_users(error) or _raised_in(error) == "jsonargparse"):
            raise
        if rank_zero_only.rank:  # type: ignore[attr-defined]  # Lightning keeps it on the function
            time.sleep(_LET_RANK_ZERO_SPEAK)
        text = condense(str(raised)) if _raised_in(error) == "jsonargparse" else str(error)
        print(f"lightning-mimo: error: {' '.join(text.split())}", file=sys.stderr, flush=True)
        sys.last_exc = error  # as Python does for a traceback; the launcher then does not wait for the other ranks
        sys.exit(2)


def _without_parsers_report(error: BaseException) -> BaseException:
    """Return the exception that a class raised in its constructor, which jsonargparse wraps in a report of its own."""
    while (cause := error.__cause__) is not None and cause.__traceback__ and _raised_in(error) == "jsonargparse":
        error = cause
    return error


def _raised_in(error: BaseException) -> str:
    """Name of the package whose code raised an exception."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0]


def _is_for_users(error: BaseException) -> bool:
    """Whether an error was raised on purpose by this package, by Lightning or by a DataLoader, and is not a bug."""
    if isinstance(error, MimoError | MisconfigurationException):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    # A DataLoader names the argument that it refuses, and the user's code hands it on from the config.
    return module.partition(".")[0] == "lightning" or module == "torch.utils.data.dataloader"
