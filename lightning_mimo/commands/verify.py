"""``lightning-mimo verify``: trains the model of a config in its layout, scaled down, and in one process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, override

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_mimo.commands.report import print_report
from lightning_mimo.commands.run import MimoCLI, one_line, run_cli
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.strategy.strategy import MimoStrategy
from lightning_mimo.verification.scale import ScaledLayout, scale_layout, shrink_sizes
from lightning_mimo.verification.trial import STEPS, Subject
from lightning_mimo.verification.verify import verify

_USAGE = "lightning-mimo verify --config FILE [--layers 2] [--ranks 8] [--as-is] [--KEY=VALUE ...]"


def verify_command(arguments: Sequence[str]) -> None:
    """Run ``verify`` with the arguments after its name.

    Raises:
        SystemExit: with code 1 if training in the layout differs, 2 if the config is invalid.
    """
    parser = argparse.ArgumentParser(prog="lightning-mimo verify", usage=_USAGE, add_help=True, allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=2, help="transformer layers that are kept")
    parser.add_argument("--ranks", type=int, default=8, help="processes to use at most")
    parser.add_argument("--as-is", action="store_true", help="keep the sizes of the model")
    options, rest = parser.parse_known_args(arguments)
    if options.layers < 1 or options.ranks < 1:
        raise ConfigError(f"--layers={options.layers} --ranks={options.ranks}: both must be at least 1.")
    sys.argv[1:] = ["fit", *rest]
    VerifyCLI.options = options
    run_cli(VerifyCLI)


class VerifyCLI(MimoCLI):
    """MimoCLI for ``verify``.

    Attributes:
        options: ``layers``, ``ranks`` and ``as_is`` of the command line.
    """

    dry_run = "weights"
    options = argparse.Namespace(layers=2, ranks=8, as_is=False)

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        strategy = self.trainer.strategy
        if not isinstance(strategy, MimoStrategy):
            raise ConfigError(
                f"trainer.strategy is a {type(strategy).__name__}; verify needs lightning_mimo.MimoStrategy."
            )
        world_size = strategy.num_nodes * strategy.num_processes
        layout = MimoLayout.resolve(strategy.modules, world_size=world_size, colocate=strategy.colocate)
        self.scaled = scale_layout(layout, ranks=self.options.ranks, num_microbatches=strategy.num_microbatches)
        self.lines = _describe(layout, self.scaled)
        if not self.options.as_is:
            arguments = self._get(self.config, "model").init_args
            shrunk = shrink_sizes(arguments, self.scaled, layers=self.options.layers)
            self.lines += shrunk or ["sizes: as they are, for there is no TransformerSize among the model's arguments"]
            if shrunk:
                super().instantiate_classes()

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        with one_line():
            strategy = self.trainer.strategy
            assert isinstance(strategy, MimoStrategy), "instantiate_classes() has looked"
            seed = self._get(self.config, "seed_everything")
            subject = Subject(
                module=self.model,
                dataset=_samples(self.trainer, self.datamodule, STEPS * self.scaled.global_batch_size),
                ddp=strategy.ddp_by_module,
                seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else 1,
            )
            equal, report = verify(subject, self.scaled)
        print_report("\n".join([*self.lines, report]))
        if not equal:
            sys.exit(1)


def _describe(layout: MimoLayout, scaled: ScaledLayout) -> list[str]:
    sizes = "; ".join(
        f"{name} tp={each.tp} pp={each.pp} dp={each.dp}" + (f" ep={each.ep}" if (each.ep or 1) > 1 else "")
        for name, each in scaled.modules.items()
    )
    lines = [f"{scaled.ranks} ranks in place of {layout.world_size}: {sizes}"]
    if scaled.left_out:
        lines.append(f"not checked, for want of ranks: {', '.join(scaled.left_out)}")
    return lines


def _samples(trainer: pl.Trainer, data: pl.LightningDataModule, number: int) -> Dataset:
    """The first samples of the user's training data, again from the first one where there are not enough."""
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if not isinstance(loader, DataLoader):
        raise ConfigError(f"train_dataloader() returned a {type(loader).__name__}; verify needs one DataLoader.")
    dataset: Any = loader.dataset
    return Subset(dataset, [index % len(dataset) for index in range(number)])
