"""Every example runs as its docstring says, and the encoder of Hugging Face trains the same in any layout."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import runpy
import sys
import traceback
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from megatron.core.models.mimo import MimoModelConfig
from torch.utils.data import DataLoader

from lightning_mimo import MimoModelInfra, MimoStrategy, ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.model import build_mimo_model
from lightning_mimo.models.encoder import encoder_spec
from lightning_mimo.models.gpt import TransformerSize, gpt_spec
from tests.parity.layouts import PoolEnvironment
from tests.support.rank_pool import RankFailure, RankPool

EXAMPLES = sorted(path.stem for path in Path("examples").glob("[!_]*.py"))
ELSEWHERE = "torchrun"  # tests/slurm runs it


def run_as_main(name: str, output: str) -> None:
    """What ``python -m examples.NAME`` does, in a process that has paid for the imports, its other ranks included."""
    with Path(output).open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    multiprocessing.set_start_method(None, force=True)
    try:
        runpy.run_module(f"examples.{name}", run_name="__main__", alter_sys=True)
    except BaseException as error:
        traceback.print_exc()
        sys.last_exc = error
        raise
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()


def printed_by(name: str, folder: Path) -> str:
    """Standard output and error of an example."""
    process = multiprocessing.get_context("forkserver").Process(target=run_as_main, args=(name, str(folder / name)))
    process.start()
    process.join(timeout=120)
    if process.is_alive():
        process.kill()
    text = (folder / name).read_text()
    assert process.exitcode == 0, text[-3000:]
    return text


def number_after(words: str, text: str) -> float:
    return float(re.search(rf"{re.escape(words)} ([\d.]+)", text)[1])


def test_four_processes_print_what_one_does(rank_pool: RankPool, tmp_path: Path) -> None:
    one, four = (printed_by(name, tmp_path) for name in ("single_process", "four_processes"))
    for words in ("step 1: loss", "step 20: loss"):
        assert one.count(words) == four.count(words) == 1
        assert number_after(words, four) == pytest.approx(number_after(words, one), abs=2e-4)
    assert number_after("step 20: loss", one) < number_after("step 1: loss", one)
    assert "bridge images -> language: dp 2 -> 1" in four


@pytest.mark.exhaustive
def test_torch_encoder_is_learned_from(rank_pool: RankPool, tmp_path: Path) -> None:
    text = printed_by("torch_encoder", tmp_path)
    assert number_after("loss:", text) < 0.1
    assert "VisionModalitySubmodules" in text and "LanguageModel" in text


@pytest.mark.exhaustive
def test_model_family_is_learned_from(rank_pool: RankPool, tmp_path: Path) -> None:
    text = printed_by("model_family", tmp_path)
    assert number_after("loss:", text) < 0.1
    assert "series" in text and "13.6 K" in text, "tensor parallelism divides the encoder"


def test_language_ranks_open_no_image(rank_pool: RankPool, tmp_path: Path) -> None:
    assert "images opened by ranks 0 to 3: 32, 32, 0, 0" in printed_by("own_dataset", tmp_path)


@pytest.mark.exhaustive
def test_hugging_face_encoder_is_learned_from(rank_pool: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert number_after("loss:", printed_by("hugging_face_encoder", tmp_path)) < 0.2


def test_every_example_is_run_here_and_is_short() -> None:
    here = ["four_processes", "hugging_face_encoder", "model_family", "own_dataset", "single_process", "torch_encoder"]
    assert sorted([*here, ELSEWHERE]) == EXAMPLES
    for name in EXAMPLES:
        text = Path(f"examples/{name}.py").read_text()
        assert len(text.splitlines()) < 100, name
        assert re.search(rf"uv run .*-m examples\.{name}\n", text), "the docstring says how to run it"


# ---- the same numbers in every layout

LAYOUTS = {
    "apart": ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}, False, 4),
    "pipeline": ({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(pp=2, dp=1)}, False, 3),
    "colocated": ({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}, True, 2),
}


class Losses(pl.Callback):
    """Keeps the loss of every batch."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.found.append(float(outputs["loss"]))


def train_hugging_face(modules: dict[str, ModuleParallelism], colocate: bool) -> tuple[list[float], dict[str, float]]:
    """Losses of three steps in float64, and the length of every trained tensor of the encoder on this rank."""
    from examples.hugging_face_encoder import RowModule, sample

    losses = Losses()
    torch.manual_seed(3)
    samples = [sample(index % 8) for index in range(24)]
    strategy = MimoStrategy(modules, 8, 2, colocate=colocate, cluster_environment=PoolEnvironment())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        precision="64-true",
        max_steps=3,
        callbacks=[losses],
        enable_checkpointing=False,
        **quiet,
    )
    module = RowModule()
    trainer.fit(module, DataLoader(samples, batch_size=8))
    lengths = {
        name.replace("module.", ""): float(parameter.detach().double().norm())
        for name, parameter in module.model.named_parameters()
        if "encoders" in name
    }
    strategy.infra.destroy()
    return losses.found, lengths


def test_hugging_face_encoder_trains_the_same_in_any_layout(rank_pool: RankPool) -> None:
    pytest.importorskip("transformers")
    one = {"images": ModuleParallelism(), "language": ModuleParallelism()}
    (losses, lengths), *_ = rank_pool.run(train_hugging_face, one, True, world_size=1)
    assert len(losses) == 3 and len(lengths) > 20
    for name, (modules, colocate, ranks) in LAYOUTS.items():
        for found, tensors in rank_pool.run(train_hugging_face, modules, colocate, world_size=ranks):
            assert found == pytest.approx(losses, rel=1e-6), name
            assert all(length == pytest.approx(lengths[each], rel=1e-9) for each, length in tensors.items()), name


# ---- what would not train the same


class Normalizes(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.BatchNorm2d(1), torch.nn.Flatten(2), torch.nn.Linear(64, 32))


def build_with_batch_norm() -> None:
    infra = MimoModelInfra.build(
        MimoLayout.resolve(
            {"images": ModuleParallelism(), "language": ModuleParallelism()}, world_size=1, colocate=True
        )
    )
    size = TransformerSize(num_layers=1, hidden_size=32, num_attention_heads=4)
    with megatron_on_cpu():
        gpt = gpt_spec(infra, size, vocab_size=16, max_sequence_length=2)
        config = MimoModelConfig(gpt, {"images": encoder_spec(infra, "images", Normalizes)}, {"images": 8})
        build_mimo_model(config, infra, seed=1)


def test_batch_norm_is_refused_by_its_place(rank_pool: RankPool) -> None:
    message = r"'modality_submodules\.images\.encoders\.encoder\.0' is a BatchNorm2d: .*Use LayerNorm or GroupNorm"
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(build_with_batch_norm, world_size=1)
