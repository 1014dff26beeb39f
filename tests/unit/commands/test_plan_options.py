from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_mimo.commands.cli import main
from lightning_mimo.commands.plan_config import as_yaml, changes_of, write_config
from lightning_mimo.commands.plan_model import switched_together
from lightning_mimo.commands.plan_options import parse_options
from lightning_mimo.errors import ConfigError
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism
from lightning_mimo.planning.candidate import Candidate, Variant
from lightning_mimo.planning.hardware import load_hardware


def test_options_and_the_rest() -> None:
    arguments = ["--config", "my.yaml", "--gpus", "32,8,16", "--memory=40GiB", "--spread=images=0.8", "--data.folder=x"]
    options, rest = parse_options(arguments)
    assert rest == ["--config", "my.yaml", "--data.folder=x"]
    assert options.gpus == (8, 16, 32) and options.memory == 40 * 2**30 and options.spread == {"images": 0.8}
    assert parse_options(["--gpus=8", "--memory=80GB"])[0].memory == 80e9
    assert [parse_options(["--gpus=8", *each])[0].measure for each in ([], ["--measure"], ["--measure=rates"])] == [
        None,
        "layers",
        "rates",
    ]
    assert not options.from_data and parse_options(["--gpus=8", "--sample=data"])[0].from_data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan needs either --gpus=N, the devices to plan for, or --compare=TRACE"),
        (["--gpus=8", "--compare=x.json"], "plan needs either"),
        (["--gpus=0"], "--gpus=0: write whole numbers from 1 to 32,768"),
        (["--gpus=8,many"], "--gpus=8,many: write whole numbers"),
        (["--gpus=8", "--memory=80 apples"], "--memory=80 apples: write a size such as 80GiB"),
        (["--gpus=8", "--memory=0GiB"], "--memory=0GiB: write a size"),
        (["--gpus=8", "--spread=images=0.8", "--sample=data"], "takes that from your data; give one of them"),
        (["--gpus=8", "--spread=images"], "--spread=images: write MODULE=SIGMA"),
        (["--gpus=8", "--spread=images=-1"], "write MODULE=SIGMA with a SIGMA from 0 to 3"),
        (["--gpus=8", "--write=out.txt"], "--write=out.txt: the name must end with .yaml or .yml"),
        (["--gpus=8", "--picture=nowhere/out.png"], "--picture=nowhere/out.png: there is no folder"),
        (["--compare=x.json", "--write=out.yaml"], "--write and --spread do not apply"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus=8", "--hardware=h900"], "--hardware=h900: there is no such file and no such hardware"),
        (["--gpus=none"], "--gpus=none: write whole numbers"),
        (["--gpus=8", "--config=gone.yaml"], "gone.yaml: there is no such file"),
    ],
)
def test_one_line_from_the_command(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-mimo"])
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *arguments])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "lightning-mimo: error:" in line]
    assert message in line


def test_modules_that_one_key_switches_are_recomputed_together() -> None:
    own = {"images": ("vision.recompute",), "language": ("language.recompute",)}
    assert switched_together(own) == [{"images"}, {"language"}]
    assert switched_together({"images": ("recompute",), "language": ("recompute",)}) == [{"images", "language"}]
    mixed = {"a": ("x",), "b": ("y",), "c": ("x", "y"), "d": ("z",)}
    assert sorted(switched_together(mixed), key=len) == [{"d"}, {"a", "b", "c"}]


def _candidate() -> Candidate:
    modules = {"images": ModuleParallelism(tp=1, dp=4), "language": ModuleParallelism(tp=4, pp=2, dp=1)}
    return Candidate(
        layout=MimoLayout.resolve(modules, world_size=12),
        num_microbatches=8,
        encoder_run_ahead=2,
        distributed_optimizer=True,
        overlap=True,
        variant=Variant(recompute=frozenset({"images"}), sequence_parallel=True),
    )


def test_a_written_config_is_the_plan(tmp_path: Path) -> None:
    candidate = _candidate()
    changes = changes_of(
        candidate,
        load_hardware("h100"),
        ddp={"overlap_grad_reduce": True, "bucket_size": 7},
        recompute={"images": ["model.init_args.vision.recompute"]},
        cleared=["model.init_args.language.last_stage_layers"],
        sequence_parallel=["model.init_args.sequence_parallel"],
    )
    assert yaml.safe_load(as_yaml(changes)) == changes
    own = {
        "trainer": {
            "devices": 4,
            "precision": "bf16-mixed",
            "strategy": {"class_path": "x", "init_args": {"modules": {"images": {"ep": 2}}, "global_batch_size": 32}},
        },
        "model": {"init_args": {"vision": {"num_layers": 4}}},
    }
    file = tmp_path / "out.yaml"
    write_config(file, own, changes, head="one\ntwo")
    assert file.read_text().startswith("# one\n# two\n")
    found = yaml.safe_load(file.read_text())
    trainer = found["trainer"]
    assert (trainer["devices"], trainer["num_nodes"], trainer["precision"]) == (6, 2, "bf16-mixed")
    strategy = trainer["strategy"]["init_args"]
    assert strategy["modules"] == {"images": {"tp": 1, "dp": 4}, "language": {"tp": 4, "pp": 2, "dp": 1}}
    assert strategy["global_batch_size"] == 32 and strategy["ddp"]["bucket_size"] == 7
    assert (strategy["num_microbatches"], strategy["encoder_run_ahead"], strategy["colocate"]) == (8, 2, False)
    assert found["model"]["init_args"]["vision"]["recompute"]["granularity"] == "full"
    sizes = {name: ModuleParallelism(**each) for name, each in strategy["modules"].items()}
    assert MimoLayout.resolve(sizes, world_size=12) == candidate.layout
