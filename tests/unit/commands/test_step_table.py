"""The estimate of a step as text, and the samples that it is made for."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.digits.model import DigitsModule
from lightning_mimo import ModuleParallelism
from lightning_mimo.commands.cli import main
from lightning_mimo.commands.step_table import step_table
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.planning.costs import Message, ModuleWork, Operations, RankEstimate, StepMemory, Work
from lightning_mimo.planning.samples import look_at

VLM = "configs/digits_vlm.yaml"


def work(flops: int, *messages: Message) -> Work:
    return Work(operations={"matmul": Operations(flops=flops, bytes=1, count=1)}, messages=messages)


def test_table_has_a_line_for_each_kind_of_rank() -> None:
    layout = MimoLayout.resolve({"language": ModuleParallelism(tp=2, pp=2, dp=1)}, world_size=4)
    over_tp = Message(over="tp of language", operation="all_reduce", ranks=(0, 1), bytes=2**29, count=2)
    over_edge = Message(over="language stage 0 -> 1", operation="send", ranks=(0, 2), bytes=2**28, count=1)
    first = RankEstimate(
        stages={"language": 0},
        ranks=range(2),
        memory=StepMemory(
            weights=2**30, gradients=2**31, optimizer=2**30, batch=2**16, activations=2**29, communicators=2**28
        ),
        peak_at="backward of language, microbatch 1",
        work={
            "language": ModuleWork(
                forward=work(10**12, over_tp, over_edge), backward=work(2 * 10**12), recompute=work(10**12)
            )
        },
        step=Work(),
        num_microbatches=4,
    )
    lines = step_table([first], layout).splitlines()
    assert lines[2].split()[:3] == ["0-1", "language", "1/2"]
    assert lines[2].split()[3::2] == ["1.00", "2.00", "1.00", "64.00", "512.00", "256.00", "4.75", "16.0"]
    assert lines[2].split()[4::2] == ["GiB", "GiB", "GiB", "KiB", "MiB", "MiB", "GiB"]
    assert lines[4].startswith("communicators are NCCL's")
    assert lines[5].endswith("in backward of language, microbatch 1, 25% of its arithmetic is recomputed")
    assert lines[6] == "  sends in a step: tp of language 2.00 GiB, language stage 0 -> 1 1.00 GiB"
    kept_free = "in the 92% of it that are not left for CUDA and its allocator"
    for size, verdict in ((8, "all fit"), (4.5, "language 1/2 does not fit")):
        fit = step_table([first], layout, memory=size * 2**30).splitlines()[-2:]
        assert fit == [f"memory of a rank in GiB, of {size:.1f}: language 1/2 4.8", f"{verdict} {kept_free}"]


def test_largest_sample_has_the_most_tokens_and_items() -> None:
    samples = [{"input_ids": torch.tensor(ids)} for ids in ([5] * 10, [5] * 9 + [3] * 4, [5] * 12 + [3])]
    sizes, largest = look_at(samples, {"images": 3})
    assert largest is samples[1]
    assert list(sizes.lines()) == [
        "tokens: mean 12, 95 % up to 13, at most 13",
        "tokens of images: mean 2, 95 % up to 4, at most 4",
    ]


def test_a_module_without_work_in_the_largest_sample_is_named() -> None:
    samples = [{"input_ids": [3, 3, 3, 9], "labels": []}, {"input_ids": [9, 4], "labels": []}]
    sizes, largest = look_at(samples, {"images": 3, "audio": 4, "video": 5})
    assert largest is samples[0]
    assert list(sizes.lines())[4:] == ["the largest sample has no tokens of audio: its work on others is not counted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--model.init_args.lr=-1"], "OptimizerConfig(lr=-1.0) must be a number of at least 0."),
        (["--dry-run=step", "--memory=-8GiB"], "--memory=-8GiB: write a size such as 80GiB or 80GB."),
        (["--dry-run", "--memory", "-8GiB"], "--memory=-8GiB: write a size such as 80GiB or 80GB."),
        (["--dry-run=step", "--memory"], "--memory=: write a size such as 80GiB or 80GB."),
        (["--dry-run=weights", "--memory", "80GiB"], "--memory says whether a step fits on a device: it works with"),
        (["--dry-run=all"], "--dry-run=all: write --dry-run, or one of --dry-run=weights, --dry-run=step"),
    ],
)
def test_dry_run_refuses(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mimo"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", VLM, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


class ReadsAnswers(DigitsModule):
    """Needs in its step what only a run has."""

    def training_step(self, microbatch: Microbatch, index: int) -> Any:
        raise FileNotFoundError("there is no answers.json")


def test_a_step_that_cannot_be_estimated_does_not_end_a_dry_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mimo"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = f"{__name__}.{ReadsAnswers.__name__}"
    main(["fit", "--config", VLM, "--dry-run", "--memory=8GiB", f"--model.class_path={model}"])
    printed = capsys.readouterr().out
    assert "on each rank, in 32-true, with Adam" in printed
    assert "NCCL" not in printed, "the config is of CPUs"
    assert re.search(
        r"not estimated: a step, because FileNotFoundError was raised on tensors without values, at "
        r"test_step_table.py:\d+: there is no answers.json; --dry-run=data takes samples of the training data\n"
        r"not checked: whether it fits 8.00 GiB\n",
        printed,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["--dry-run", "--dry-run=data"])
def test_dry_run_estimates_a_step(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mimo"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    main(["fit", "--config", VLM, kind, "--memory", "80GiB"])
    printed = capsys.readouterr().out
    assert "one step, if every sample has" in printed
    assert ("samples have" in printed) == (kind == "--dry-run=data")
    assert "the most memory is used in" in printed
    assert "memory of a rank in GiB, of 80.0: images 0.0, language 0.0\nall fit in" in printed
