"""LightningCLI with what the command line has beside Lightning's own options."""

from __future__ import annotations

from typing import override

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_mimo.parallelism import LayoutError
from lightning_mimo.step_trace import StepTrace


class MimoCLI(LightningCLI):
    """Adds ``--trace DIR``."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--trace", type=str | None, help="fit only: record one step, and write it to this folder (see StepTrace)"
        )

    @override
    def before_instantiate_classes(self) -> None:
        folder = self._get(self.config, "trace")
        if folder is None:
            return
        if self.subcommand != "fit":
            raise LayoutError(f"--trace records a step of training: it goes with fit, not with {self.subcommand}.")
        try:
            self.trainer_defaults = {**self.trainer_defaults, "callbacks": [StepTrace(folder)]}
        except ModuleNotFoundError as error:
            raise LayoutError(str(error)) from error
