"""A run that was saved in one layout and goes on in another one ends with the weights of one that never stopped."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_mimo import MimoPrecision, MimoStrategy, ModuleParallelism, Saving
from lightning_mimo.checkpoint.directory import read_manifest
from lightning_mimo.mimo.initialization import cut_shard
from tests.parity.cases import OVERLAP, apart, task, together
from tests.parity.layouts import Layout, PoolEnvironment, parameters, train, weights
from tests.parity.model import ParityModule, PicturesSoundsAndText, Samples
from tests.parity.oracle import Task, Tensors, truth
from tests.support.checkpoint_edits import sign
from tests.support.rank_pool import RankFailure, RankPool
from tests.support.tiers import exhaustive

LAYOUTS = {
    "images_dp2-language_tp2": apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
    "images_tp2-language_pp2": apart(ModuleParallelism(tp=2), ModuleParallelism(pp=2)),
    "images_pp2dp2-language_tp2pp2": apart(ModuleParallelism(pp=2, dp=2), ModuleParallelism(tp=2, pp=2)),
    "images_dp1-language_dp4": apart(ModuleParallelism(), ModuleParallelism(dp=4), num_microbatches=3, ddp=OVERLAP),
    "colocated-one_rank": together(ModuleParallelism(), ModuleParallelism()),
    "colocated-images_tp2dp2-language_tp4": together(ModuleParallelism(tp=2, dp=2), ModuleParallelism(tp=4)),
}
# 36 samples in batches of 12: the checkpoint after two steps is in the middle of the first epoch.
RUN = task(samples=Samples(number=36), steps=5)
SAVED_AFTER = 2
EXACT = 1e-10
HELD_OUT = Samples(number=30)
APART = LAYOUTS["images_dp2-language_tp2"]


class SaveOnce(pl.Callback):
    """Saves at the end of one batch, counted from the start of the run."""

    def __init__(self, path: str, after: int) -> None:
        self._path, self._after, self._batches = path, after, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._batches += 1
        if self._batches == self._after:
            trainer.save_checkpoint(self._path)


def save(run: Task, layout: Layout, path: str, after: int = SAVED_AFTER, **options: Any) -> tuple[list[float], Tensors]:
    """Train to the end, with a checkpoint on the way: losses, and this rank's final weights."""
    recorder, module, strategy = train(run, layout, callbacks=[SaveOnce(path, after)], **options)
    result = recorder.losses, weights(module.model, strategy.infra)
    strategy.infra.destroy()
    return result


def resume(run: Task, layout: Layout, path: str, **options: Any) -> tuple[list[float], Tensors]:
    """Go on from a checkpoint to the end: losses of what is left, and this rank's final weights."""
    recorder, module, strategy = train(run, layout, ckpt_path=path, **options)
    result = recorder.losses, weights(module.model, strategy.infra)
    strategy.infra.destroy()
    return result


def distance_after_resuming(run: Task, layout: Layout, path: str, whole: Tensors) -> tuple[list[float], float]:
    """Losses of what is left, and the largest relative difference of a final weight from the oracle's."""
    recorder, module, strategy = train(run, layout, ckpt_path=path)
    worst = 0.0
    for name, parameter, groups in parameters(module.model, strategy.infra):
        expected = cut_shard(whole[name], parameter, groups)
        scale = float(whole[name].abs().max()) or 1.0
        worst = max(worst, float((parameter.detach() - expected).abs().max()) / scale)
    strategy.infra.destroy()
    return recorder.losses, worst


Saved = Callable[[str], str]


@pytest.fixture(scope="module")
def saved(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Path of a checkpoint of a layout, by its name; made when it is first asked for."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def path_of(name: str) -> str:
        path = str(folder / name / "step=2.ckpt")
        rank_pool.run(save, RUN, LAYOUTS[name], path, world_size=LAYOUTS[name].ranks)
        return path

    return path_of


def check(rank_pool: RankPool, saved: Saved, one: str, two: str) -> None:
    whole = rank_pool.run(truth, RUN, world_size=1)[0]
    layout = LAYOUTS[two]
    found = rank_pool.run(distance_after_resuming, RUN, layout, saved(one), whole.final, world_size=layout.ranks)
    for losses, worst in found:
        assert worst < EXACT
        assert losses == pytest.approx(whole.losses[SAVED_AFTER:], rel=1e-7)  # Lightning logs float32


NAMES = list(LAYOUTS)
USUAL = [(NAMES[4], NAMES[3])]


@pytest.mark.parametrize(("one", "two"), USUAL)
def test_run_goes_on_in_the_next_layout(rank_pool: RankPool, saved: Saved, one: str, two: str) -> None:
    check(rank_pool, saved, one, two)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("one", "two"), sorted(set(product(NAMES, NAMES)) - set(USUAL)))
def test_run_goes_on_in_any_layout(rank_pool: RankPool, saved: Saved, one: str, two: str) -> None:
    check(rank_pool, saved, one, two)


DISTRIBUTED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
EXPERTS = task(experts=4, samples=Samples(number=36), steps=5)


@pytest.mark.parametrize(
    ("run", "one", "two"),
    [
        exhaustive(
            EXPERTS,
            apart(ModuleParallelism(), ModuleParallelism(dp=4, ep=2), num_microbatches=3),
            apart(ModuleParallelism(), ModuleParallelism(dp=2, pp=2, expt_tp=2)),
        ),
        exhaustive(
            task(tied=True, steps=4),
            apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, pp=2)),
            together(ModuleParallelism(), ModuleParallelism()),
        ),
        (
            task(frozen=("images.encoders",), steps=4),
            apart(ModuleParallelism(pp=2), ModuleParallelism(pp=2)),
            together(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
        ),
    ],
    ids=["experts", "tied", "frozen_encoder"],
)
def test_run_of_another_kind_goes_on_in_another_layout(
    rank_pool: RankPool, tmp_path: Path, run: Task, one: Layout, two: Layout
) -> None:
    path = str(tmp_path / "some.ckpt")
    rank_pool.run(save, run, one, path, world_size=one.ranks)
    whole = rank_pool.run(truth, run, world_size=1)[0]
    for layout in (one, two):
        found = rank_pool.run(distance_after_resuming, run, layout, path, whole.final, world_size=layout.ranks)
        assert max(worst for _, worst in found) < EXACT


def test_state_that_is_shared_out_over_replicas_goes_on_in_another_layout(rank_pool: RankPool, tmp_path: Path) -> None:
    run = task(precision="32-true", start=torch.float32, samples=Samples(number=36), steps=4, clip_grad=0.0)
    path = str(tmp_path / "some.ckpt")
    one = apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2, pp=2), ddp=DISTRIBUTED)
    never_stopped = rank_pool.run(save, run, one, path, world_size=one.ranks)
    # Two replicas: whole or shared out, not even rounding may differ.
    found = rank_pool.run(resume, run, replace(one, ddp={}), path, world_size=one.ranks)
    for (_, tensors), (_, tensors_after) in zip(never_stopped, found, strict=True):
        assert all(torch.equal(tensor, tensors_after[name]) for name, tensor in tensors.items())
    whole = rank_pool.run(truth, run, world_size=1)[0]
    for layout in (
        apart(ModuleParallelism(dp=3), ModuleParallelism(tp=2), ddp=DISTRIBUTED),
        together(ModuleParallelism(tp=2), ModuleParallelism(dp=2)),
    ):
        for losses, _ in rank_pool.run(resume, run, layout, path, world_size=layout.ranks):
            assert losses == pytest.approx(whole.losses[SAVED_AFTER:], rel=2e-4)


# ---- the same layout: bit for bit

MIXED = {"precision": "bf16-mixed", "start": torch.bfloat16}


@pytest.mark.parametrize(
    ("run", "layout", "after"),
    [
        exhaustive(
            task(dropout=0.3, steps=5, **MIXED),
            apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2, pp=2), ddp=DISTRIBUTED),
            3,
        ),
        (
            task(dropout=0.3, steps=5, precision="16-mixed", start=torch.float16),
            together(ModuleParallelism(dp=2), ModuleParallelism(dp=2)),
            2,
        ),
        # After 5 batches, the second one of the second window of three.
        (
            task(dropout=0.3, accumulate=3, samples=Samples(number=96), steps=4, **MIXED),
            apart(ModuleParallelism(), ModuleParallelism(tp=2)),
            5,
        ),
    ],
    ids=["distributed", "float16", "inside_an_accumulation_window"],
)
def test_run_goes_on_bit_for_bit(rank_pool: RankPool, tmp_path: Path, run: Task, layout: Layout, after: int) -> None:
    path = str(tmp_path / "some.ckpt")
    whole = rank_pool.run(save, run, layout, path, after, world_size=layout.ranks)
    rest = rank_pool.run(resume, run, layout, path, world_size=layout.ranks)
    for (losses, tensors), (losses_after, tensors_after) in zip(whole, rest, strict=True):
        begun = after - after % run.accumulate
        assert losses_after == losses[begun:]
        assert all(torch.equal(tensor, tensors_after[name]) for name, tensor in tensors.items())


def save_afterwards(run: Task, layout: Layout, path: str, **options: Any) -> tuple[list[float], Tensors]:
    """Train to the end and save then, as scripts do."""
    _, module, strategy = train(run, layout, **options)
    module.trainer.save_checkpoint(path)
    strategy.infra.destroy()
    return [], {}


def test_saving_after_fit_is_saving_at_its_last_step(rank_pool: RankPool, tmp_path: Path) -> None:
    layout = apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2))
    run = task(dropout=0.3, steps=5, **MIXED)
    path = str(tmp_path / "after.ckpt")
    options = {"strategy_options": {"saving": Saving(asynchronous=True)}}
    rank_pool.run(save_afterwards, replace(run, steps=2), layout, path, world_size=4, **options)
    whole = rank_pool.run(trained, run, layout, world_size=4)
    rest = rank_pool.run(resume, run, layout, path, world_size=4)
    for (losses, tensors), (losses_after, tensors_after) in zip(whole, rest, strict=True):
        assert losses_after == losses[2:]
        assert all(torch.equal(tensor, tensors_after[name]) for name, tensor in tensors.items())


def trained(run: Task, layout: Layout) -> tuple[list[float], Tensors]:
    recorder, module, strategy = train(run, layout)
    result = recorder.losses, weights(module.model, strategy.infra)
    strategy.infra.destroy()
    return result


def test_saving_behind_the_training_changes_nothing(rank_pool: RankPool, tmp_path: Path) -> None:
    layout = apart(ModuleParallelism(dp=2), ModuleParallelism(tp=2))
    run = task(dropout=0.3, steps=5, **MIXED)
    here, behind = str(tmp_path / "here.ckpt"), str(tmp_path / "behind.ckpt")
    options = {"strategy_options": {"saving": Saving(asynchronous=True)}}
    whole = rank_pool.run(save, run, layout, here, world_size=4)
    assert str(rank_pool.run(save, run, layout, behind, world_size=4, **options)) == str(whole)
    assert sorted(each.name for each in Path(behind).iterdir()) == sorted(each.name for each in Path(here).iterdir())
    rest = rank_pool.run(resume, run, layout, behind, world_size=4)
    for (_, tensors), (_, tensors_after) in zip(whole, rest, strict=True):
        assert all(torch.equal(tensor, tensors_after[name]) for name, tensor in tensors.items())


# ---- weights only, and evaluation from a checkpoint


class SaveWeights(pl.Callback):
    """Saves weights only, and all, after the last step."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def on_train_end(self, trainer, pl_module) -> None:
        trainer.save_checkpoint(f"{self._folder}/weights.ckpt", weights_only=True)
        trainer.save_checkpoint(f"{self._folder}/all.ckpt")


def train_and_validate(layout: Layout, folder: str) -> float:
    _, module, strategy = train(RUN, layout, callbacks=[SaveWeights(folder)])
    loader = DataLoader(PicturesSoundsAndText(HELD_OUT), batch_size=RUN.batch)
    metrics = module.trainer.validate(module, loader, verbose=False)
    strategy.infra.destroy()
    return metrics[0]["val/loss"]


def validate_from(layout: Layout, *paths: str) -> list[float]:
    """Validation losses of checkpoints, in a run that does nothing else."""
    losses = []
    for path in paths:
        torch.manual_seed(1)  # other weights than those that were trained from
        strategy = MimoStrategy(
            dict(layout.modules),
            RUN.batch,
            colocate=layout.colocate,
            precision_plugin=MimoPrecision(RUN.precision),
            cluster_environment=PoolEnvironment(),
        )
        trainer = pl.Trainer(
            accelerator="cpu", devices=layout.ranks, strategy=strategy, logger=False, enable_progress_bar=False
        )
        loader = DataLoader(PicturesSoundsAndText(HELD_OUT), batch_size=RUN.batch)
        losses.append(trainer.validate(ParityModule(RUN.model), loader, ckpt_path=path, verbose=False)[0]["val/loss"])
        strategy.infra.destroy()
    return losses


def test_any_layout_validates_what_another_one_trained(rank_pool: RankPool, tmp_path: Path) -> None:
    weights_only, everything = str(tmp_path / "weights.ckpt"), str(tmp_path / "all.ckpt")
    expected = rank_pool.run(train_and_validate, APART, str(tmp_path), world_size=4)[0]
    for layout in (
        together(ModuleParallelism(dp=2), ModuleParallelism(tp=2)),
        apart(ModuleParallelism(tp=2), ModuleParallelism(pp=2)),
    ):
        found = rank_pool.run(validate_from, layout, weights_only, everything, world_size=layout.ranks)
        assert all(losses == pytest.approx([expected, expected], rel=1e-6) for losses in found)
    assert _size(tmp_path / "weights.ckpt") < _size(tmp_path / "all.ckpt") / 2
    refused(rank_pool, r"holds weights only, so training cannot resume from it", RUN, tmp_path / "weights.ckpt")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


# ---- what Lightning's own callbacks do


def with_model_checkpoint(run: Task, folder: str, last: bool | str, **options: Any) -> list[str]:
    """Names in the folder after a run with ModelCheckpoint."""
    callback = ModelCheckpoint(folder, monitor="train/loss", save_top_k=2, every_n_train_steps=1, save_last=last)
    *_, strategy = train(run, APART, callbacks=[callback], strategy_options=options, enable_checkpointing=True)
    assert Path(callback.best_model_path).is_dir()
    strategy.infra.destroy()
    return sorted(each.name for each in Path(folder).iterdir())


@pytest.mark.parametrize(
    ("last", "asynchronous"),
    [(True, True), pytest.param("link", False, marks=pytest.mark.exhaustive)],
    ids=["last-behind", "link-waits"],
)
def test_model_checkpoint_keeps_the_best_and_the_last(
    rank_pool: RankPool, tmp_path: Path, last: bool | str, asynchronous: bool
) -> None:
    folder = str(tmp_path)
    saving = Saving(asynchronous=asynchronous)
    names = rank_pool.run(with_model_checkpoint, RUN, folder, last, saving=saving, world_size=4)[0]
    assert len(names) == 3 and names[-1] == "last.ckpt" and all(name.endswith(".ckpt") for name in names)
    assert (tmp_path / "last.ckpt").is_symlink() == (last == "link")
    more = replace(RUN, steps=7)
    found = rank_pool.run(resume, more, APART, str(tmp_path / "last.ckpt"), world_size=4)
    whole = rank_pool.run(truth, more, world_size=1)[0]
    assert found[0][0] == pytest.approx(whole.losses[5:], rel=1e-7)


# ---- what is refused, and what is damaged


def refused(rank_pool: RankPool, message: str, run: Task, path: Path, layout: Layout | None = None) -> None:
    layout = layout or APART
    with pytest.raises(RankFailure, match=message):
        rank_pool.run(resume, run, layout, str(path), world_size=layout.ranks)


@pytest.fixture(scope="module")
def one_saved(saved: Saved) -> Path:
    return Path(saved("images_dp2-language_tp2"))


def test_what_training_cannot_go_on_from_is_refused(rank_pool: RankPool, one_saved: Path) -> None:
    doubled = replace(RUN, batch=24)
    refused(rank_pool, r"saved after 2 batches of 12 samples.*global_batch_size is 24 now", doubled, one_saved)
    other = replace(RUN, samples=replace(RUN.samples, number=48))
    refused(rank_pool, r"middle of an epoch of 36 samples, but the training dataset has 48 now", other, one_saved)
    experts = replace(RUN, model=replace(RUN.model, experts=4))
    dense = apart(ModuleParallelism(dp=2), ModuleParallelism(dp=2))
    refused(rank_pool, r"does not hold 'language\.\S+', which this model has", experts, one_saved, dense)
    audio = replace(RUN, model=replace(RUN.model, audio=True), samples=replace(RUN.samples, clips=(1,)))
    refused(
        rank_pool,
        r"does not hold 'audio\.\S+'",
        audio,
        one_saved,
        apart(ModuleParallelism(), ModuleParallelism(), ModuleParallelism()),
    )


def test_checkpoint_of_a_larger_model_is_refused(rank_pool: RankPool, tmp_path: Path) -> None:
    run = replace(RUN, model=replace(RUN.model, audio=True), samples=replace(RUN.samples, clips=(1,)))
    rank_pool.run(
        save,
        run,
        apart(ModuleParallelism(), ModuleParallelism(), ModuleParallelism()),
        str(tmp_path / "audio.ckpt"),
        world_size=3,
    )
    refused(rank_pool, r"it holds 'audio\.\S+', which this model does not have", RUN, tmp_path / "audio.ckpt")


@pytest.mark.parametrize("how", ["flipped", "short", "missing"])
def test_damaged_file_is_named_before_anything_is_changed(
    rank_pool: RankPool, one_saved: Path, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "damaged.ckpt"
    shutil.copytree(one_saved, path)
    file = path / "language-rank00003.safetensors"
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-8] if how == "short" else data[:-1] + bytes([data[-1] ^ 1]))
    message = r"cannot be loaded: language-rank00003\.safetensors (has \d+ bytes|is missing).*Nothing was"
    refused(rank_pool, message, RUN, path)


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/lightning-mimo-bomb"),)


def test_nothing_in_a_checkpoint_is_executed(rank_pool: RankPool, one_saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    shutil.copytree(one_saved, path)
    torch.save({"state_dict": {}, "bomb": Bomb()}, path / "trainer.pt")
    sign(path, "trainer.pt")
    refused(rank_pool, r"trainer\.pt .* could only be read by executing code from it.*Nothing was", RUN, path)
    assert not Path("/tmp/lightning-mimo-bomb").exists()


class SavesAnObject(pl.Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        checkpoint["mine"] = Samples


def test_object_that_could_not_be_read_safely_is_refused_when_it_is_saved(rank_pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(
        RankFailure, match=r"'mine' of the checkpoint holds objects that could only be read by executing"
    ):
        rank_pool.run(save_object, str(tmp_path / "some.ckpt"), world_size=4)


def save_object(path: str) -> None:
    train(RUN, APART, callbacks=[SavesAnObject(), SaveOnce(path, 1)])


# ---- what cannot be written


class FullDisk(pl.Callback):
    """From the second batch on, no file of rank 1 may grow beyond 20 kB."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 1:
            trainer.strategy.finish_saving()  # the first checkpoint, where it is written behind the training
            if trainer.global_rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    def teardown(self, trainer, pl_module, stage) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class SaveEveryBatch(pl.Callback):
    def __init__(self, path: str) -> None:
        self._path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.save_checkpoint(self._path)


def on_full_disk(path: str, **strategy_options: Any) -> list[float]:
    callbacks = [FullDisk(), SaveEveryBatch(path)]
    recorder, _, strategy = train(RUN, APART, callbacks=callbacks, strategy_options=strategy_options)
    strategy.infra.destroy()
    return recorder.losses


@pytest.mark.parametrize(
    "asynchronous", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["waits", "behind"]
)
def test_full_disk_is_one_error_on_all_ranks_and_the_old_checkpoint_stays(
    rank_pool: RankPool, tmp_path: Path, asynchronous: bool
) -> None:
    path = tmp_path / "some.ckpt"
    with pytest.raises(RankFailure, match=r"some\.ckpt could not be written \(.*rank 1: .*File too large"):
        rank_pool.run(on_full_disk, str(path), saving=Saving(asynchronous=asynchronous), world_size=4)
    assert read_manifest(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["some.ckpt"], "nothing piles up"
    saving = Saving(asynchronous=asynchronous, on_error="warn")
    losses = rank_pool.run(on_full_disk, str(path), saving=saving, world_size=4)[0]
    assert len(losses) == RUN.steps
    assert read_manifest(path)["step"] == 1


def test_directory_that_cannot_be_made_is_one_error(rank_pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RankFailure, match=r"could not be written \(rank 0: NotADirectoryError|FileExistsError"):
        rank_pool.run(save, RUN, APART, str(tmp_path / "file" / "some.ckpt"), world_size=4)
