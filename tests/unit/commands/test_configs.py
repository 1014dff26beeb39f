"""Every shipped config loads, names classes that exist, and has a layout that can run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch.distributed as dist
from lightning.pytorch.cli import LightningCLI
from megatron.core.extensions.transformer_engine import HAVE_TE

from lightning_mimo import LayoutError, MimoModule, MimoStrategy, OptimizerOverride
from lightning_mimo.commands.cli import main
from lightning_mimo.commands.dry_run import describe
from lightning_mimo.commands.layout import picture_of
from lightning_mimo.errors import ConfigError
from lightning_mimo.models.sizes import Recompute, TransformerSize
from lightning_mimo.planning.memory_estimate import memory_estimate

IMPOSSIBLE = ["--trainer.devices=3", "--trainer.strategy.init_args.modules.images.dp=2"]
CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def command_line(clean_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one: LightningCLI warns when it is given arguments beside those of the command line."""
    monkeypatch.setattr(sys, "argv", ["lightning-mimo"])


CLUSTER = [config for config in CONFIGS if "num_nodes" in config.read_text()]
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
VLM, STRATEGY = "configs/digits_vlm.yaml", "--trainer.strategy.init_args"


def load(config: Path, *overrides: str) -> LightningCLI:
    return LightningCLI(
        MimoModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        run=False,
        # Some are for GPUs, which are not here; the layout is the same.
        args=["--config", str(config), "--trainer.accelerator=cpu", *overrides],
    )


def test_there_are_configs() -> None:
    assert CONFIGS


def needs_of(config: Path) -> list[str]:
    """Overrides with which a config loads although its pretrained model is not there; skips without transformers."""
    if "HuggingFaceModule" not in config.read_text():
        return []
    pytest.importorskip("transformers")
    there = ["--model.init_args.pretrained=configs/llava_1_5_7b", "--data.train=configs", "--data.val=null"]
    return there if config.stem == "tiny_llava" else []


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], LightningCLI]:
    """Loads a config, once for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("logs")
    moved = [f"--trainer.default_root_dir={folder}", f"--trainer.logger.init_args.save_dir={folder}"]
    return functools.cache(lambda config: load(config, *moved, *needs_of(config)))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_its_layout_can_run(config: Path, loaded: Callable[[Path], LightningCLI]) -> None:
    strategy = loaded(config).trainer.strategy
    assert isinstance(strategy, MimoStrategy)
    assert strategy.validate().world_size == strategy.num_processes * strategy.num_nodes


@pytest.mark.parametrize("config", CLUSTER, ids=lambda path: path.stem)
def test_cluster_size_config_fits_its_layout_and_its_gpus(config: Path, loaded: Callable[[Path], LightningCLI]) -> None:
    cli = loaded(config)
    strategy = cli.trainer.strategy
    found = memory_estimate(
        strategy.validate(),
        cli.model.configure_mimo,
        dtype_policy=strategy.precision_plugin.dtype_policy,
        ddp=strategy.ddp_by_module,
        frozen=cli.model.frozen,
    )
    sizes = {
        "llava_1_5_7b": (0.312e9, 6.739e9),
        "llava_7b": (0.3e9, 6.74e9),
        "qwen2_5_vl_7b": (0.677e9, 7.616e9),
        "vlm_70b": (6.08e9, 70.56e9),
    }
    assert list(found.parameters.values()) == pytest.approx(sizes[config.stem], rel=0.1)
    if config.stem == "vlm_70b":
        table = describe(found, strategy.validate(), precision=strategy.precision_plugin.precision, training=True)
        assert table in Path("docs/guide/layouts.md").read_text()
    # All modules that share a GPU together, and half of it left for activations.
    on_rank = {rank: [stage.total for stage in found.stages if rank in stage.ranks] for rank in (0, 8, 127, 159)}
    assert max(map(sum, on_rank.values())) < 40 * 2**30


def test_there_are_cluster_size_configs() -> None:
    assert [config.stem for config in CLUSTER] == ["llava_1_5_7b", "llava_7b", "qwen2_5_vl_7b", "vlm_70b"]


@pytest.mark.parametrize("config", ["configs/digits_avlm.yaml", "configs/digits_vlm_colocated.yaml"])
def test_dry_run_prints_what_each_rank_would_hold(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["fit", "--dry-run=weights", "--config", config, "--trainer.precision=bf16-mixed", "--trainer.accelerator=gpu"]
    )
    printed = capsys.readouterr().out
    assert "on each rank, in bf16-mixed, with Adam; not counted: activations" in printed
    assert "parameters (images " in printed
    assert ("\n0-1    all " in printed) == ("colocated" in config)
    # 5 of two ranks; 2 of two ranks and that of all four.
    largest = "2.66 GiB on 0-1, 5 communicators" if "colocated" in config else "1.73 GiB on 0, 3 communicators"
    assert f"for NCCL's communicators (as reported for A100; not measured):\n  {largest}\n" in printed
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--foo=1"], "the config has no key 'foo'"),
        (["--trainer.maxsteps=1"], "the config has no key 'trainer.maxsteps'. Did you mean 'trainer.max_steps'?"),
        (
            [f"{STRATEGY}.num_micro=1"],
            "trainer.strategy.init_args (lightning_mimo.MimoStrategy) has no key 'num_micro'",
        ),
        (
            [f"{STRATEGY}.modules.images.tpp=2"],
            "trainer.strategy.init_args.modules.images (lightning_mimo.ModuleParallelism) has no key 'tpp'. Did you "
            "mean 'tp'?",
        ),
        (
            [f"{STRATEGY}.modules.images.dp=two"],
            "trainer.strategy.init_args.modules.images.dp must be a whole number or null, but is 'two'.",
        ),
        (["--model.init_args.vision.depth=3"], "model.init_args.vision has no key 'depth'"),
        (
            ["--trainer.strategy.class_path=lightning_mimo.MimoStrategie"],
            "trainer.strategy.class_path: 'lightning_mimo.MimoStrategie' cannot be imported",
        ),
        ([f"{STRATEGY}.checks.on_nonfinite=ignore"], "on_nonfinite must be one of 'raise', 'skip', but is 'ignore'"),
        (
            [f"{STRATEGY}.saving.asynchrnous=true"],
            "init_args.saving has no key 'asynchrnous'. Did you mean 'asynchronous'?",
        ),
        (
            [f"{STRATEGY}.timeout=0:10:00"],
            "trainer.strategy.init_args.timeout has moved: write trainer.strategy.init_args.monitoring.timeout.",
        ),
        (["stray"], "'stray' is not understood"),
        (["--trainer.strategy=mimo"], "strategy='mimo' does not say which modules there are"),
        pytest.param(
            ["--model.init_args.language.attention=te"],
            "error: attention='te' needs Transformer Engine, which cannot be imported here",
            marks=pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed"),
        ),
        (["--model.init_args.language.attention=flash"], "attention must be one of 'sdpa', 'megatron', 'te', but is"),
        (IMPOSSIBLE, "Module 'language': 3 ranks - (images 2) leaves 1"),
        ([f"{STRATEGY}.global_batch_size=127"], "global_batch_size=127 does not divide over module 'images'"),
        (
            ["--trainer.devices=5", f"{STRATEGY}.modules={{images: {{tp: 3}}, language: {{tp: 2}}}}"],
            "Module 'images': tp=3 does not divide num_attention_heads=4",
        ),
        (["--trainer.precision=16-true"], "precision='16-true') is not supported by MimoStrategy"),
        (["--model.init_args.frozen=[images.enc]"], "frozen=['images.enc']: no parameter lies under these names"),
        (
            ["--model.init_args.vision.num_layers=0"],
            "TransformerSize(num_layers=0) must be a whole number from 1",
        ),
        (
            ["--model.init_args.language.num_layers=1000000"],
            "TransformerSize(num_layers=1000000) must be a whole",
        ),
        (
            ["--model.init_args.vision.hidden_size=-64"],
            "TransformerSize(hidden_size=-64) must be a whole number",
        ),
        (["--model.init_args.language.dropout=1.5"], "TransformerSize(dropout=1.5) must be a number from 0.0 to 1.0"),
        (["--model.init_args.language.dropout=.nan"], "TransformerSize(dropout=nan) must be a number from 0.0 to 1.0"),
        (["--model.init_args.language.rotary_base=0"], "TransformerSize(rotary_base=0.0) must be a positive number"),
        (
            ["--trainer.devices=1000000"],
            "trainer.devices=1000000 with trainer.num_nodes=1: write the number",
        ),
        (
            ["--trainer.devices=0"],
            "trainer.devices=0 with trainer.num_nodes=1: write the number",
        ),
        (["--trainer.num_nodes=-1"], "trainer.num_nodes=-1 must be a whole number of at least 1"),
        (
            [f"{STRATEGY}.modules.language.pp=9223372036854775808"],
            "pp=9223372036854775808, but a run has at most",
        ),
        (["--trainer=null"], "trainer must have keys and values"),
        (["--trainer.strategy=ddp"], "trainer.strategy is a DDPStrategy, but this command runs a MimoStrategy"),
        (["--model.init_args.language.recompute={num_layers: 0}"], "Recompute(num_layers=0) must be a whole number"),
        (["--trainer.val_check_interval=0"], "trainer.val_check_interval=0 must be a whole number of batches"),
        (["--trainer.limit_val_batches=1.5"], "trainer.limit_val_batches=1.5 must be a whole number of batches, or"),
        (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1"),
        (
            ["--trainer.accumulate_grad_batches=0"],
            "trainer.accumulate_grad_batches=0 must be a whole number",
        ),
        (
            ["--trainer.devices=5", f"{STRATEGY}.modules={{images: {{}}, language: {{tp: 2, dp: 2, ep: 2}}}}"],
            "Module 'language': ep=2 divides experts, but num_experts is not set: the model is dense. Leave ep out",
        ),
        (["--seed_everything=-1"], "seed_everything=-1 must be a whole number from 0 to 4294967295"),
        ([f"{STRATEGY}.monitoring.timeout=0:00:00"], "Monitoring(timeout=datetime.timedelta(0)) must be a positive"),
        ([f"{STRATEGY}.checks=1"], "trainer.strategy.init_args.checks must have keys and values"),
        (["--ckpt_path=/etc/passwd"], "/etc/passwd is not a checkpoint of lightning-mimo: it is not a directory"),
        (
            ["--ckpt_path=/nowhere.ckpt"],
            "/nowhere.ckpt is not a checkpoint of lightning-mimo: there is no such",
        ),
        (["--data.init_args.global_batch_size=0"], "global_batch_size=0 must be at least 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0].partition("=")[0].rpartition(".")[2],
)
def test_what_is_wrong_is_one_readable_line(
    overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--dry-run", "--config", VLM, *overrides])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-mimo: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_key_of_an_earlier_version_in_a_file_names_its_new_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "old.yaml"
    now = Path(VLM).read_text()
    config.write_text(now.replace("global_batch_size: 128", "global_batch_size: 128\n      async_save: true", 1))
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--dry-run", "--config", str(config)])
    place = "trainer.strategy.init_args"
    assert f"error: {place}.async_save has moved: write {place}.saving.asynchronous.\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "layout"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file."),
        ("a: [1", "is not YAML: line "),
        ("just words", "must hold keys and values, such as 'trainer: ...', but it is 'just words'."),
        ("trainer: null", "trainer must have keys and values, but is null."),
        ("trainer: false", "trainer must have keys and values, but is False."),
        ("data: {class_path: a.b, init_args: }", "data.init_args must have keys and values, but is null; write them"),
        ("trainer: {devices: 2}\ntrainer: {devices: 4}", "is not YAML: line 2: the key 'trainer' occurs twice."),
        ("trainer: {devices: 2, devices: 4}", "is not YAML: line 1: the key 'devices' occurs twice."),
        ("trainer: &a {callbacks: [*a]}", "is not YAML: line 1: a value refers to itself."),
        (BOMB, "its references expand to more than 1,000,000 values."),
        ("trainer: " + "[" * 5_000 + "]" * 5_000, "is not a config: its values are nested too deeply."),
        ("trainer: {1: 2}", "trainer has the key 1, but keys are words."),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_config_file_that_cannot_be_read(
    command: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main([command, "--config", str(config)])
    error = capsys.readouterr().err
    assert error.startswith(f"lightning-mimo: error: --config {config}")
    assert message in error
    assert error.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, infra: object) -> None:
        int("two")

    monkeypatch.setattr("examples.digits.model.DigitsModule.configure_mimo", broken)
    with pytest.raises(ValueError, match="invalid literal for int"):
        main(["fit", "--dry-run", "--config", VLM])


@pytest.mark.parametrize("name", ["dropout", "layernorm_epsilon", "experts_per_token"])
def test_number_that_null_cannot_stand_for(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"TransformerSize\({name}=None\) must be a"):
        TransformerSize(**{"num_layers": 1, "hidden_size": 4, "num_attention_heads": 1, name: None})


def test_options_may_stand_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", VLM, "--trainer.precision=bf16-mixed", "--dry-run=weights", "fit"])
    assert "on each rank, in bf16-mixed, with Adam" in capsys.readouterr().out
    main(["--config", VLM, "layout", "--trainer.devices=4"])
    assert "4 ranks, each module on ranks of its own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("/etc/passwd/logs", "/etc/passwd is not a folder"),
        ("/proc/self/fd/0/logs", "is not a folder that can be"),
        ("x" * 300, "is not the name of a folder"),
    ],
)
def test_run_refuses_a_root_dir_that_cannot_be_written(
    folder: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", VLM, f"--trainer.default_root_dir={folder}"])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_dry_run_refuses_the_callbacks_that_a_run_would(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "callback.yaml"
    kind = "lightning.pytorch.callbacks.OnExceptionCheckpoint"
    config.write_text(f"trainer: {{callbacks: [{{class_path: {kind}, init_args: {{dirpath: {tmp_path}}}}}]}}")
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--dry-run", "--config", VLM, "--config", str(config)])
    assert "The callback OnExceptionCheckpoint is not supported by MimoStrategy" in capsys.readouterr().err


def test_a_command_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fitt", "--config", VLM])
    assert "there is no command 'fitt'; commands are fit, validate, test, predict, layout" in capsys.readouterr().err


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_says_what_it_shows(config: Path) -> None:
    assert config.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("overrides", "colocated", "dp"),
    [
        (["--trainer.devices=6", "--trainer.strategy.init_args.modules.images.dp=4"], False, 4),
        (["--trainer.strategy.init_args.colocate=true"], True, 4),
    ],
    ids=["six_ranks", "colocated"],
)
def test_dotted_overrides_change_the_layout(overrides: list[str], colocated: bool, dp: int, tmp_path: Path) -> None:
    cli = load(Path("configs/digits_vlm.yaml"), f"--trainer.default_root_dir={tmp_path}", *overrides)
    layout = cli.trainer.strategy.validate()
    assert layout.colocated is colocated
    assert layout.modules["images"].dp == dp
    assert f"dp{dp - 1}" in picture_of(["--config", "configs/digits_vlm.yaml", *overrides])


def test_every_module_has_settings_of_its_own(tmp_path: Path) -> None:
    cli = load(
        Path("configs/digits_vlm.yaml"),
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.precision=bf16-mixed",
        "--trainer.strategy.init_args.ddp={images: {overlap_grad_reduce: true}, language: {bucket_size: 1000}}",
        "--model.init_args.overrides={images: {lr: 1.0e-4}, images.input_projections: {weight_decay: 0, clip_grad: 1}}",
        "--model.init_args.vision.recompute={granularity: selective}",
    )
    ddp = cli.trainer.strategy.ddp_by_module
    assert ddp["images"].overlap_grad_reduce and not ddp["language"].overlap_grad_reduce
    assert ddp["language"].bucket_size == 1000
    assert cli.trainer.precision_plugin.precision == "bf16-mixed"
    assert cli.model.overrides == {
        "images": OptimizerOverride(lr=1e-4),
        "images.input_projections": OptimizerOverride(weight_decay=0.0, clip_grad=1.0),
    }
    assert cli.model.vision.recompute == Recompute(granularity="selective")


def test_an_impossible_layout_is_one_readable_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["layout", "--config", "configs/digits_vlm.yaml", *IMPOSSIBLE])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lightning-mimo: error: Module 'language': 3 ranks - (images 2) leaves 1")
    assert error.count("\n") == 1


def test_fit_refuses_a_layout_before_any_process_starts(tmp_path: Path) -> None:
    cli = load(
        Path("configs/digits_vlm.yaml"),
        *IMPOSSIBLE,
        f"--trainer.default_root_dir={tmp_path}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    )
    with pytest.raises(LayoutError, match=r"'language': 3 ranks - \(images 2\) leaves 1.*devices=4"):
        cli.trainer.fit(cli.model, cli.datamodule)
    assert not cli.trainer.strategy.launcher._children
