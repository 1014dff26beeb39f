"""``lightning-mimo plan``: finds the fastest layouts for a number of devices, or compares a run with its simulation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, override

import torch

from lightning_mimo.commands.dry_run import first_samples
from lightning_mimo.commands.layout import merged_config
from lightning_mimo.commands.plan_config import as_yaml, changes_of, write_config
from lightning_mimo.commands.plan_model import PlannedModel, keys_in, set_keys
from lightning_mimo.commands.plan_options import PlanOptions, parse_options
from lightning_mimo.commands.report import print_report
from lightning_mimo.commands.run import MimoCLI, one_line, run_cli
from lightning_mimo.errors import ConfigError, LayoutError
from lightning_mimo.observe.timeline import draw_timeline, require_matplotlib
from lightning_mimo.planning import report
from lightning_mimo.planning.comparison import check_trace, compare, describe_comparison, read_trace
from lightning_mimo.planning.hardware import Hardware, load_hardware
from lightning_mimo.planning.measure import measured
from lightning_mimo.planning.pricing import price_stages
from lightning_mimo.planning.search import Found, Plan, search
from lightning_mimo.planning.step import simulate_step
from lightning_mimo.planning.stragglers import SampleSpread, balanced, lognormal_costs, seconds_with, spread_of
from lightning_mimo.planning.timeline import traces_of
from lightning_mimo.strategy.module import MimoModule

_FINALISTS = 15
"""Layouts that are priced with differing samples, to choose the best five of them."""


def plan_command(arguments: Sequence[str]) -> None:
    """Run ``plan`` with the arguments after its name.

    Raises:
        SystemExit: with code 2 if the config is invalid, or no layout fits.
    """
    options, rest = parse_options(arguments)
    load_hardware(options.hardware)  # before the model is built
    if options.picture is not None:
        try:
            require_matplotlib()
        except ModuleNotFoundError as error:
            raise ConfigError(str(error)) from error
    PlanCLI.options, PlanCLI.merged = options, merged_config(rest)
    sys.argv[1:] = ["fit", *rest]
    run_cli(PlanCLI)


class PlanCLI(MimoCLI):
    """MimoCLI for ``plan``.

    Attributes:
        options: of the command line.
        merged: all config files and overrides as plain values.
    """

    dry_run = "weights"
    options: PlanOptions
    merged: Mapping[str, Any] = {}

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        with one_line():
            arguments = self._get(self.config, "model").init_args
            data = partial(first_samples, self.trainer, self.datamodule) if self.options.from_data else None
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            hardware = load_hardware(self.options.hardware)
            model = PlannedModel(
                self._module_with, self.trainer, keys_in(arguments), device_type=hardware.device_type, data=data
            )
            with closing(model) as subject:
                if self.options.measure:
                    hardware = measured(hardware, device, getattr(torch, subject.dtype))
                if self.options.measure == "layers":
                    flops = hardware.peak(subject.dtype) * hardware.matmul_efficiency
                    subject.time_layers(device, flops=flops)
                if self.options.compare is not None:
                    text = self._compare(subject, hardware)
                elif len(self.options.gpus) > 1:
                    text = self._curve(subject, hardware)
                else:
                    text = self._plan(subject, hardware)
        print_report(text)

    def _module_with(self, values: Mapping[str, Any]) -> MimoModule:
        set_keys(self._get(self.config, "model").init_args, values)
        trainer = self.trainer
        super().instantiate_classes()
        self.trainer = trainer  # all modules are planned for the same one
        return self.model

    def _plan(self, subject: PlannedModel, hardware: Hardware) -> str:
        options = self.options
        found, with_data, seconds = self._best(subject, hardware, options.gpus[0])
        best, model = found.plans[0], subject.model
        changes = self._changes(subject, best, hardware)
        lines = [
            f"{options.gpus[0]} x {hardware.name}, global_batch_size={model.global_batch_size}, {model.tokens:,.0f} "
            f"tokens per sample{subject.says}, {model.dtype}",
            report.describe_search(found, seconds),
            "",
            report.describe_plans(found, model, hardware, with_data=with_data, share=self._share(subject)),
            "",
            *_about_data(subject),
        ]
        if len(found.plans) > 1:
            lines.append(report.why_it_lost(best, found.plans[1], with_data=with_data))
        lines += [report.describe_memory(best, options.memory or hardware.memory), "", as_yaml(changes), ""]
        if options.picture is not None:
            title = f"simulated step: {best.seconds * 1000:.0f} ms, {best.candidate}"
            with _writing("--picture", options.picture):
                draw_timeline(traces_of(best.simulation), options.picture, title=title)
            lines.append(f"Written: {options.picture}")
        if options.write is not None:
            head = f"Planned for {options.gpus[0]} x {hardware.name}: {best.seconds:.3f} s per step.\n{best.candidate}"
            with _writing("--write", options.write):
                write_config(options.write, self.merged, changes, head=head)
            lines.append(f"Written: {options.write}")
        return "\n".join([*lines, report.describe_limits(hardware, subject.timing)])

    def _best(self, subject: PlannedModel, hardware: Hardware, gpus: int) -> tuple[Found, list[float] | None, float]:
        """Search, and price the best again with differing samples: plans, seconds of their steps, and of the search."""
        begin = time.perf_counter()
        memory = self.options.memory or hardware.memory
        space = subject.space(gpus, hardware)
        spread = self._spread(subject)
        keep = 5 if spread is None else _FINALISTS
        found = search(space, subject.model, hardware, world_size=gpus, memory=memory, keep=keep)
        if spread is None:
            return found, None, time.perf_counter() - begin
        model = subject.model
        times = [seconds_with(spread, plan.candidate, plan.prices, model, hardware) for plan in found.plans]
        order = sorted(range(len(times)), key=times.__getitem__)[:5]
        found = replace(found, plans=[found.plans[i] for i in order])
        return found, [times[i] for i in order], time.perf_counter() - begin

    def _spread(self, subject: PlannedModel) -> SampleSpread | None:
        sigmas = self.options.spread
        if unknown := sorted(set(sigmas) - set(subject.modules)):
            raise ConfigError(f"--spread: there is no module {unknown[0]!r}; there are {', '.join(subject.modules)}.")
        if not sigmas and subject.sizes is not None:
            return spread_of(subject.sizes, padded=subject.padded)
        if not any(sigmas.values()):
            return None
        order = partial(balanced, padded=subject.padded)
        return SampleSpread(costs=lognormal_costs(sigmas), order=order, padded=subject.padded)

    def _share(self, subject: PlannedModel) -> Callable[[str], float]:
        spread = self._spread(subject)
        return (lambda module: 1.0) if spread is None else spread.share

    def _curve(self, subject: PlannedModel, hardware: Hardware) -> str:
        """One line per number of devices."""
        rows = [("GPUs", "step s", "tokens/s", "tokens/s/GPU", "of the first", "best layout")]
        first: float | None = None
        model, share = subject.model, self._share(subject)
        for gpus in self.options.gpus:
            try:
                found, with_data, _ = self._best(subject, hardware, gpus)
            except (LayoutError, ConfigError) as error:
                rows.append((str(gpus), "", "", "", "", str(error)))
                continue
            best = found.plans[0]
            seconds = best.seconds if with_data is None else with_data[0]
            each = report.tokens_per_sec(best, model, seconds, share=share)
            first = first or each
            numbers = (f"{seconds:.3f}", f"{each * gpus:,.0f}", f"{each:,.0f}", f"{each / first:.0%}")
            rows.append((str(gpus), *numbers, str(best.candidate)))
        return "\n".join([report.table(rows, left=(5,)), "", report.describe_limits(hardware, subject.timing)])

    def _compare(self, subject: PlannedModel, hardware: Hardware) -> str:
        """A trace of a run beside the simulation of the config's own layout."""
        path = self.options.compare
        assert path is not None, "checked by the caller"
        candidate = subject.candidate_of_config()
        ranks = read_trace(path)
        check_trace(ranks, candidate.layout, path=path)
        model = subject.model_of_config
        simulation = simulate_step(candidate, price_stages(candidate, model, hardware), model, hardware)
        lines = [str(candidate), "", describe_comparison(ranks, simulation, compare(ranks, simulation))]
        if self.options.picture is not None:
            with _writing("--picture", self.options.picture):
                draw_timeline(traces_of(simulation), self.options.picture, title=f"simulated: {candidate}")
            lines.append(f"Written: {self.options.picture}")
        return "\n".join([*lines, "", report.describe_limits(hardware, subject.timing)])

    def _changes(self, subject: PlannedModel, plan: Plan, hardware: Hardware) -> dict[str, Any]:
        strategy = self.merged.get("trainer", {}).get("strategy", {})
        ddp = strategy.get("init_args", {}).get("ddp") if isinstance(strategy, dict) else None
        return changes_of(
            plan.candidate,
            hardware,
            ddp=ddp,
            recompute={
                name: [f"model.init_args.{key}" for key in keys] for name, keys in subject.recompute_keys.items()
            },
            cleared=[f"model.init_args.{key}" for key in subject.keys.stage_layers],
            sequence_parallel=[f"model.init_args.{key}" for key in subject.keys.sequence_parallel],
        )


def _about_data(subject: PlannedModel) -> Iterator[str]:
    if subject.sizes is not None:
        yield f"memory and 'step s' are for the largest of the first {subject.sizes.number} samples, which have"
        yield from (f"  {line}" for line in subject.sizes.lines())
        yield ""


@contextmanager
def _writing(option: str, path: Path) -> Iterator[None]:
    """Refuse a file that cannot be written by the name of its option."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option}={path} cannot be written: {error.strerror or error}.") from None
