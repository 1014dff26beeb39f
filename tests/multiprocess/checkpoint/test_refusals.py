"""A checkpoint that does not fit is refused by name before anything is changed, on every rank."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mimo import ModuleParallelism
from lightning_mimo.checkpoint.directory import MANIFEST, TRAINER
from lightning_mimo.checkpoint.replacement import before_replacement
from tests.multiprocess.checkpoint.test_checkpoint import MIXED, SaveOnce, save
from tests.parity.cases import apart, task, together
from tests.parity.layouts import train
from tests.parity.model import Samples
from tests.support.checkpoint_edits import edit_manifest, edit_shards, edit_trainer
from tests.support.checkpoint_trials import try_checkpoints
from tests.support.rank_pool import RankFailure, RankPool

RUN = task(samples=Samples(number=36), steps=3, **MIXED)
LAYOUT = apart(ModuleParallelism(), ModuleParallelism(tp=2))
FILE = "language-rank00002.safetensors"
MODULE = "language.decoder.layers.0.mlp.linear_fc1.weight"
Edit = Callable[[Path], Any]


def shards(change: Callable[[Any, Any], Any]) -> Edit:
    return lambda path: edit_shards(path, FILE, change)


def trainer(change: Callable[[Any], Any]) -> Edit:
    return lambda path: edit_trainer(path, change)


def manifest(change: Callable[[Any], Any]) -> Edit:
    return lambda path: edit_manifest(path, change)


def without(*endings: str) -> Edit:
    """Remove all tensors with these endings of their keys."""

    def change(tensors: Any, specs: Any) -> None:
        for key in [key for key in tensors if key.endswith(endings)]:
            del tensors[key], specs[key]

    return shards(change)


def set_in(content: Any, keys: str, value: Any) -> None:
    *outer, last = keys.split("/")
    for key in outer:
        content = content[int(key) if key.isdecimal() else key]
    content[last] = value


def at(keys: str, value: Any) -> Edit:
    """Set an entry of Lightning's state."""
    return trainer(lambda content: set_in(content, keys, value))


def integers(tensors: Any, specs: Any) -> None:
    tensors[f"{MODULE}/weight"] = tensors[f"{MODULE}/weight"].to(torch.int32)


def shorter(tensors: Any, specs: Any) -> None:
    key = f"{MODULE}/exp_avg"
    tensors[key] = tensors[key][:-4].clone()
    specs[key]["stop"] -= 4


def other_shape(tensors: Any, specs: Any) -> None:
    specs[f"{MODULE}/exp_avg"].update(shape=[1, *specs[f"{MODULE}/exp_avg"]["shape"]], dim=1)


def other_tp_rank(tensors: Any, specs: Any) -> None:
    specs[f"{MODULE}/weight"]["tp_rank"] = 0


def of_sgd(tensors: Any, specs: Any) -> None:
    for key in [key for key in tensors if key.endswith("/exp_avg")]:
        new = key.replace("/exp_avg", "/momentum_buffer")
        tensors[new], specs[new] = tensors.pop(key), specs.pop(key)


def short_generator(tensors: Any, specs: Any) -> None:
    tensors["rank2.cpu/generator"] = tensors["rank2.cpu/generator"][:-8].clone()
    specs["rank2.cpu/generator"].update(shape=[len(tensors["rank2.cpu/generator"])])
    specs["rank2.cpu/generator"].update(stop=len(tensors["rank2.cpu/generator"]))


def stray(path: Path) -> None:
    shutil.copy(path / FILE, path / "language-rank99999.safetensors")


def fifo(path: Path) -> None:
    (path / FILE).unlink()
    os.mkfifo(path / FILE)


def link_to_itself(path: Path) -> None:
    (path / TRAINER).unlink()
    (path / TRAINER).symlink_to(TRAINER)


EDITS: dict[str, tuple[Edit, str]] = {
    "moment_missing": (without(f"{MODULE}/exp_avg"), "only 1 of 2 tensor-parallel shards were found"),
    "moments_missing": (without("/exp_avg", "/exp_avg_sq", "/step"), "has no optimizer state|keeps|were found"),
    "moments_partial": (shards(shorter), rf"{MODULE} \(exp_avg\): only \d+ of \d+ elements of a shard were found"),
    "moments_of_another_optimizer": (shards(of_sgd), "keeps exp_avg and exp_avg_sq and step"),
    "main_missing": (without(f"{MODULE}/main"), rf"{MODULE} \(main\): only 1 of 2 tensor-parallel shards"),
    "weight_missing": (without(f"{MODULE}/weight"), rf"{MODULE} \(weight\): only 1 of 2 tensor-parallel shards"),
    "weight_of_integers": (shards(integers), f"{MODULE}.*different dtypes"),
    "shape": (shards(other_shape), f"{FILE} is damaged: '{MODULE}' has the shape"),
    "shard_twice": (shards(other_tp_rank), rf"{MODULE} \(weight\): only 1 of 2 tensor-parallel shards"),
    "generator_missing": (without("rank2.cpu/generator"), "it has the random generators .* but this run has"),
    "generator_short": (shards(short_generator), "the state of the random generator 'cpu' has"),
    "stray_file": (stray, "it contains 'language-rank99999.safetensors', which its manifest does not list"),
    "fifo": (fifo, f"{FILE} is missing, or not a regular file"),
    "link_to_itself": (link_to_itself, "trainer.pt is missing, or not a regular file"),
    "no_dictionary": (trainer(lambda content: [1]), "trainer.pt holds a list in place of"),
    "no_optimizer_states": (trainer(lambda content: content.pop("optimizer_states") and None), "'optimizer_states'"),
    "step": (at("global_step", 7), "trainer.pt has global_step=7, but the manifest has 1"),
    "skipped_steps": (at("optimizer_states/0/skipped_steps", "many"), "skipped_steps is 'many'"),
    "learning_rate": (
        trainer(lambda content: content["optimizer_states"][0]["param_groups"][0].update(lr="high")),
        "lr of the parameter group 'images' is 'high', but must be a number",
    ),
    "groups": (at("optimizer_states/0/param_groups", {}), "param_groups must be a list of groups with names"),
    "schedulers": (at("lr_schedulers", [{}, {}]), "it has the state of 2 learning-rate schedulers, but"),
    "lightning_version": (at("pytorch-lightning_version", "two"), "has the version of Lightning 'two'"),
    "callbacks": (at("callbacks", [1]), "trainer.pt has a list as callbacks"),
    "no_loops": (trainer(lambda content: content.pop("loops") and None), "trainer.pt has a NoneType as loops"),
    "no_fit_loop": (at("loops/fit_loop", None), "trainer.pt: fit_loop is missing, or is not a dictionary"),
    "counter": (
        at("loops/fit_loop/epoch_progress", {"total": 1, "current": {}}),
        "trainer.pt: fit_loop.epoch_progress.total is missing, or is not a dictionary",
    ),
    "negative_counter": (
        trainer(lambda content: set_in(content, "loops/fit_loop/epoch_loop.batch_progress/total/ready", -1)),
        "fit_loop.epoch_loop.batch_progress.total.ready is -1, but must be",
    ),
    "weights_only": (manifest(lambda content: content.update(weights_only=True)), "it holds weights only, so training"),
    "batch_size": (
        manifest(lambda content: content["position"].update(global_batch_size=9)),
        "saved after 1 batches of 9 samples of an epoch, but global_batch_size is 12 now",
    ),
    "no_checkpoint": (lambda path: (path / MANIFEST).unlink(), "is not a checkpoint of lightning-mimo: it has no"),
}


def test_every_refusal_leaves_the_run_as_it_was(rank_pool: RankPool, tmp_path: Path) -> None:
    original = tmp_path / "original.ckpt"
    rank_pool.run(save, RUN, LAYOUT, str(original), 1, world_size=3)
    paths = {name: tmp_path / f"{name}.ckpt" for name in EDITS}
    for name, path in paths.items():
        shutil.copytree(original, path)
        EDITS[name][0](path)
    interrupted = tmp_path / "interrupted.ckpt"
    shutil.copytree(original, before_replacement(interrupted))
    tried = [*map(str, paths.values()), str(interrupted)]
    for *trials, recovered in rank_pool.run(try_checkpoints, RUN, LAYOUT, str(original), tried, world_size=3):
        assert {name: trial.result for name, trial in zip(EDITS, trials, strict=True)} == dict.fromkeys(
            EDITS, "refused"
        ), trials
        for (_, message), trial in zip(EDITS.values(), trials, strict=True):
            with pytest.raises(Exception, match=f"cannot be loaded: .*({message}).*Nothing was changed"):
                raise AssertionError(trial.message)
        assert recovered.result == "accepted"
    assert interrupted.is_dir() and not before_replacement(interrupted).exists()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            ("images",),
            (),
            r"'images\.\S+' has no optimizer state, because it was frozen; resume with the same",
        ),
        ((), ("images",), r"'images\.\S+' was trained, but is frozen now; resume with the same value of frozen"),
    ],
    ids=["thawed", "frozen"],
)
def test_run_does_not_go_on_with_other_frozen_parameters(
    rank_pool: RankPool, tmp_path: Path, before: tuple[str, ...], after: tuple[str, ...], message: str
) -> None:
    one, layout = task(samples=Samples(number=36), steps=2, frozen=before), together(*[ModuleParallelism()] * 2)
    path = str(tmp_path / "some.ckpt")
    rank_pool.run(save, one, layout, path, 1, world_size=1)
    other = replace(one, model=replace(one.model, frozen=after))
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(train, other, layout, ckpt_path=path, world_size=1)


def save_over(path: str) -> None:
    train(RUN, LAYOUT, callbacks=[SaveOnce(path, 1)])


def test_folder_that_is_no_checkpoint_is_not_replaced(rank_pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.csv").write_text("mine")
    with pytest.raises(RankFailure, match=r"results is a folder, but not a checkpoint, and saving .* would delete it"):
        rank_pool.run(save_over, str(tmp_path / "results"), world_size=3)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["results", "table.csv"]
