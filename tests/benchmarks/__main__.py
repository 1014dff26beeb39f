"""``python -m tests.benchmarks [NAME ...] [--json FILE] [--quick]``: measures, prints tables, writes JSON."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from tests.benchmarks.quiet_machine import MachineBusyError
from tests.benchmarks.report import Report, as_json
from tests.support.rank_pool import RankPool

BENCHMARKS = {
    "overhead": "a step under Trainer and MimoStrategy against a bare loop around megatron-core",
    "schedule": "how near the ranks come to a schedule in which communication is free",
    "plan": "the planner: predicted against measured step times, and the layout that it picks",
    "loading": "what each rank decodes, and whether that hides behind the step",
    "shards": "samples a second from tar and parquet shards, with and without images",
    "balance": "the slowest replica over the mean, with samples divided by their costs and without",
    "packing": "packed rows against padded samples, and against transformers",
    "waiting": "how long ranks wait for data, balanced and in order, packed and padded",
    "startup": "from the launch to the first step, and what needs no torch",
    "process_groups": "how many there are, how long they take, and how both grow",
    "against_ddp": "time and memory against Lightning's DDPStrategy",
    "memory": "what each rank holds, also while the model is being built and loaded",
    "hf_loading": "seconds and memory to load a pretrained model, against transformers",
    "checkpoints": "seconds and bytes of a checkpoint",
    "attention": "time and memory of a GPT with torch's attention, with Megatron's own, and of a Llama of transformers",
}

MODELS = ("light", "even", "heavy")
"""Models of ``plan``, each with another encoder."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", formatter_class=argparse.RawTextHelpFormatter)
    names = "\n".join(f"{name:14} {what}" for name, what in BENCHMARKS.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones; all of them if none is named:\n{names}")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="file to write (benchmarks.json)")
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs, measures little")
    parser.add_argument("--model", choices=MODELS, help="plan: only the model with this encoder")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    if arguments.model and arguments.names != ["plan"]:
        parser.error("--model is for plan alone")
    reports: dict[str, Report] = {}
    pool = RankPool(16)
    for name in arguments.names or BENCHMARKS:
        options = {"model": arguments.model} if arguments.model else {}
        benchmark = importlib.import_module(f"tests.benchmarks.{name}")
        try:
            reports[name] = benchmark.measure(pool, quick=arguments.quick, **options)
        except MachineBusyError as error:
            pool.close()
            parser.exit(1, f"{name}: {error}\n")
        print(reports[name], flush=True)
        arguments.json.write_text(json.dumps(as_json(reports), indent=1) + "\n")
    pool.close()
    print(f"\nWritten to {arguments.json}.")


if __name__ == "__main__":
    main()
