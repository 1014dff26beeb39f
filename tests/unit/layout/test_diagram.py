"""The drawing of a layout, and `lightning-mimo layout`, which draws one without importing torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from lightning_mimo.commands.cli import main
from lightning_mimo.commands.layout import picture_of
from lightning_mimo.errors import ConfigError, LayoutError
from lightning_mimo.layout.diagram import draw_layout
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism

CONFIG = """
    trainer:
      devices: 4
      strategy:
        class_path: lightning_mimo.MimoStrategy
        init_args:
          modules:
            images: {dp: 2}
            language: {tp: 2}
          global_batch_size: 64
          num_microbatches: 4
    model:
      class_path: not.even.Installed
    """


def write(folder: Path, text: str, name: str = "config.yaml") -> str:
    path = folder / name
    path.write_text(dedent(text))
    return str(path)


def draw(modules: dict[str, ModuleParallelism], world_size: int, *, colocate: bool = False) -> str:
    layout = MimoLayout.resolve(modules, world_size=world_size, colocate=colocate)
    return draw_layout(layout, global_batch_size=16, num_microbatches=2)


def test_modules_on_ranks_of_their_own():
    assert draw({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2, pp=2)}, 6) == dedent(
        """\
        6 ranks, each module on ranks of its own

        rank        0   1   2   3   4   5
        ---------------------------------
        images    dp0 dp1   .   .   .   .
        language    .   . tp0 tp1 tp0 tp1
                    .   . pp0 pp0 pp1 pp1

        images: tp=1 cp=1 dp=2 pp=1; 4 samples per microbatch and rank = 16 / (2 microbatches * dp 2)
        language: tp=2 cp=1 dp=1 pp=2; 8 samples per microbatch and rank = 16 / (2 microbatches * dp 1)

        bridge images -> language: dp 2 -> 1, fan-in, 2 replicas into 1"""
    )


def test_colocated_modules():
    lines = draw({"images": ModuleParallelism(), "language": ModuleParallelism(tp=4)}, 4, colocate=True).splitlines()
    assert lines[0] == "4 ranks, colocated: all modules on all ranks"
    assert lines[4:6] == ["images    dp0 dp1 dp2 dp3", "language  tp0 tp1 tp2 tp3"]
    assert lines[7].startswith("images: tp=1 cp=1 dp=4 pp=1; 2 samples per microbatch and rank")


def test_module_on_one_rank_and_columns_of_two_digit_ranks():
    lines = draw({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=16)}, 17).splitlines()
    assert lines[2].split() == ["rank", *map(str, range(17))]
    assert lines[4].split() == ["images", "tp0", *"." * 16]
    assert lines[5].split() == ["language", ".", *(f"tp{i}" for i in range(16))]
    assert len({len(line) for line in lines[2:6]}) == 1


def test_experts_are_shown_where_there_are_some():
    text = draw({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, ep=2)}, 5)
    assert "language: tp=2 cp=1 dp=2 pp=1 (experts: expt_tp=1 ep=2 expt_dp=2); 4 samples" in text
    assert "images: tp=1 cp=1 dp=1 pp=1; 8 samples" in text


def test_one_sample_is_singular():
    layout = MimoLayout.resolve({"language": ModuleParallelism()}, world_size=1)
    assert "; 1 sample per microbatch" in draw_layout(layout, global_batch_size=2, num_microbatches=2)


@pytest.mark.parametrize(
    ("images", "language", "bridge"),
    [
        (4, 2, "dp 4 -> 2, fan-in, 2 replicas into 1"),
        (1, 4, "dp 1 -> 4, fan-out, 1 replica into 4"),
        (2, 2, "dp 2 -> 2, replica to replica"),
    ],
)
def test_bridge_says_which_way_samples_go(images, language, bridge):
    text = draw({"images": ModuleParallelism(dp=images), "language": ModuleParallelism(dp=language)}, images + language)
    assert text.splitlines()[-1] == f"bridge images -> language: {bridge}"


def test_language_alone_has_no_bridge():
    assert "bridge" not in draw({"language": ModuleParallelism(tp=2)}, 2)


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(LayoutError, match=r"does not divide over module 'images': .* 2 \* 3 = 6"):
        draw({"images": ModuleParallelism(dp=3), "language": ModuleParallelism()}, 4)


def test_picture_of_a_config(tmp_path):
    picture = picture_of(["--config", write(tmp_path, CONFIG)])
    assert picture.startswith("4 ranks, each module on ranks of its own")
    assert "images: tp=1 cp=1 dp=2 pp=1; 8 samples per microbatch and rank = 64 / (4 microbatches * dp 2)" in picture


@pytest.mark.parametrize(
    "overrides",
    [
        ["--trainer.devices=6", "--trainer.strategy.init_args.modules.images.dp=4"],
        ["--trainer.devices", "6", "--trainer.strategy.init_args.modules.images", "{dp: 4}"],
        ["--trainer.devices=3", "--trainer.num_nodes=2", "--trainer.strategy.init_args.modules={images: {dp: 4}}"],
        ["--trainer.devices=[0, 1, 2, 3, 4, 5]", "--trainer.strategy.init_args.modules.images={dp: 4}"],
    ],
)
def test_dotted_overrides_come_on_top(tmp_path, overrides):
    picture = picture_of([f"--config={write(tmp_path, CONFIG)}", *overrides])
    assert picture.startswith("6 ranks")
    assert "bridge images -> language: dp 4 -> 1, fan-in, 4 replicas into 1" in picture


def test_colocate_from_the_command_line(tmp_path):
    key = "--trainer.strategy.init_args"
    picture = picture_of(["-c", write(tmp_path, CONFIG), f"{key}.colocate=true", f"{key}.modules.images.dp=4"])
    assert picture.startswith("4 ranks, colocated")


def test_later_config_comes_on_top(tmp_path):
    more = write(tmp_path, "trainer: {devices: 6}", "more.yaml")
    assert picture_of(["--config", write(tmp_path, CONFIG), "--config", more]).startswith("6 ranks")


def test_module_without_sizes_has_default_sizes(tmp_path):
    text = CONFIG.replace("{tp: 2}", "").replace("devices: 4", "devices: 3")
    assert "language: tp=1 cp=1 dp=1 pp=1" in picture_of(["--config", write(tmp_path, text)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--trainer.strategy.init_args.modules.images.tensor=2"],
            r"Module 'images' has unknown keys tensor; known are tp",
        ),
        (["--trainer.strategy.init_args.modules.images=2"], r"Module 'images' is given as 2; write its sizes as"),
        (["--trainer.strategy.init_args.modules=[images, language]"], r"no trainer\.strategy\.init_args\.modules"),
        (
            ["--trainer.strategy=mimo"],
            r"no trainer\.strategy\.init_args\.modules .*class_path: lightning_mimo\.MimoStrategy",
        ),
        (["--trainer.strategy=null"], r"no trainer\.strategy\.init_args\.modules"),
        (["--trainer.devices=auto"], r"trainer\.devices='auto': .* give --trainer\.devices=N"),
        (["--trainer.devices=-1"], r"trainer\.devices=-1: .* give --trainer\.devices=N"),
        (["--trainer.devices=null"], r"trainer\.devices=None: .* give --trainer\.devices=N"),
        (["--trainer.devices=3"], r"Module 'language': 3 ranks - \(images 2\) leaves 1"),
        (["--trainer.strategy.init_args.global_batch_size=null"], r"global_batch_size=None must be a whole number"),
        (["--config", "nowhere.yaml"], r"--config nowhere\.yaml: there is no such file"),
        (["--config"], r"--config : there is no such file"),
        (["trainer.devices=4"], r"'trainer\.devices' is not understood; write --config FILE or --dotted\.key=value"),
    ],
)
def test_config_that_cannot_be_drawn(tmp_path, arguments, says):
    with pytest.raises(ConfigError, match=says):
        picture_of(["--config", write(tmp_path, CONFIG), *arguments])


def test_config_that_is_empty_or_missing(tmp_path):
    for arguments in ([], ["--config", write(tmp_path, "")]):
        with pytest.raises(ConfigError, match=r"Give --config FILE with .*class_path"):
            picture_of(arguments)


def test_every_shipped_config_can_be_drawn():
    configs = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
    assert configs
    for config in configs:
        assert "bridge" in picture_of(["--config", str(config)])


def test_command_prints_the_picture_or_one_line_of_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["layout", "--config", write(tmp_path, CONFIG)])
    assert capsys.readouterr().out.startswith("4 ranks")
    with pytest.raises(SystemExit, match="2"):
        main(["layout", "--config", "nowhere.yaml"])
    assert capsys.readouterr().err == "lightning-mimo: error: --config nowhere.yaml: there is no such file.\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_usage_names_the_commands(capsys, arguments):
    main(arguments)
    assert "{fit,validate,test,predict,layout}" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["lightning_mimo", "lightning_mimo.commands.cli"])
def test_import_costs_neither_torch_nor_lightning_nor_megatron(module):
    code = f"import sys, {module}; print({{'torch', 'lightning', 'megatron', 'numpy'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_layout_command_imports_no_torch(tmp_path):
    code = "import sys; from lightning_mimo.commands.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "layout", "--config", write(tmp_path, CONFIG)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
