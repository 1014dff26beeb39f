"""``lightning-mimo plan``: finds the fastest layouts for a number of devices, or compares a run with its simulation."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
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
from lightning_mimo.planning.report import Share
from lightning_mimo.planning.search import Found, Plan, search
from lightning_mimo.planning.step import simulate_step
from lightning_mimo.planning.stragglers import SampleSpread, balanced, lognormal_costs, seconds_with, spread_of
from lightning_mimo.planning.timeline import traces_of
from lightning_mimo.strategy.module import MimoModule

_SHOWN = 5  # layouts
_FINALISTS = 15
"""Layouts that are priced with differing samples, to choose the best of them."""


@dataclass(frozen=True, kw_only=True)
class _Best:
    """The best layouts for a number of devices.

    Attributes:
        found: outcome of the search, with at most five plans.
        step_seconds: of each plan, with samples that differ where they do.
        share: of the work of a step of equal samples, see :data:`lightning_mimo.planning.report.Share`; ``None`` if
            samples are equal.
        seconds: that the search took.
    """

    found: Found
    step_seconds: Sequence[float]
    share: Share | None
    seconds: float


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
        outcome = self._best(subject, hardware, options.gpus[0])
        found, share, model = outcome.found, outcome.share, subject.model
        best, with_data = found.plans[0], None if share is None else outcome.step_seconds
        changes = self._changes(subject, best, hardware)
        lines = [
            f"{options.gpus[0]} x {hardware.name}, global_batch_size={model.global_batch_size}, {model.tokens:,.0f} "
            f"tokens per sample{subject.says}, {model.dtype}",
            report.describe_search(found, outcome.seconds),
            "",
            report.describe_plans(found, model, hardware, with_data=with_data, share=share),
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
            seconds = outcome.step_seconds[0]
            head = f"Planned for {options.gpus[0]} x {hardware.name}: {seconds:.3f} s per step.\n{best.candidate}"
            with _writing("--write", options.write):
                write_config(options.write, self.merged, changes, head=head)
            lines.append(f"Written: {options.write}")
        return "\n".join([*lines, report.describe_limits(hardware, subject.timing)])

    def _best(self, subject: PlannedModel, hardware: Hardware, gpus: int) -> _Best:
        """Search, and price the best again with differing samples."""
        begin = time.perf_counter()
        memory, model, spread = self.options.memory or hardware.memory, subject.model, self._spread(subject)
        keep = _SHOWN if spread is None else _FINALISTS
        found = search(subject.space(gpus, hardware), model, hardware, world_size=gpus, memory=memory, keep=keep)
        times = [plan.seconds for plan in found.plans]
        if spread is not None:
            times = [seconds_with(spread, plan.candidate, plan.prices, model, hardware) for plan in found.plans]
        order = sorted(range(len(times)), key=times.__getitem__)[:_SHOWN]
        return _Best(
            found=replace(found, plans=[found.plans[i] for i in order]),
            step_seconds=[times[i] for i in order],
            share=None if spread is None else spread.share,
            seconds=time.perf_counter() - begin,
        )

    def _spread(self, subject: PlannedModel) -> SampleSpread | None:
        sigmas = self.options.spread
        if unknown := sorted(set(sigmas) - set(subject.modules)):
            raise ConfigError(f"--spread: there is no module {unknown[0]!r}; there are {', '.join(subject.modules)}.")
        if subject.sizes is not None:
            return spread_of(subject.sizes, padded=subject.padded)
        if not any(sigmas.values()):
            return None
        order = partial(balanced, padded=subject.padded)
        return SampleSpread(costs=lognormal_costs(sigmas), order=order, padded=subject.padded)

    def _curve(self, subject: PlannedModel, hardware: Hardware) -> str:
        """One line per number of devices."""
        rows = [("GPUs", "step s", "tokens/s", "tokens/s/GPU", "of the first", "best layout")]
        first: float | None = None
        model = subject.model
        for gpus in self.options.gpus:
            try:
                outcome = self._best(subject, hardware, gpus)
            except (LayoutError, ConfigError) as error:
                rows.append((str(gpus), "", "", "", "", str(error)))
                continue
            best, seconds = outcome.found.plans[0], outcome.step_seconds[0]
            each = report.tokens_per_sec(best, model, seconds, share=outcome.share)
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
