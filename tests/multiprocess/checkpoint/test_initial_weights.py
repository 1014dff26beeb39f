"""A run that starts from files has their weights, in any layout, and everything else is new."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from lightning_mimo import MimoModelInfra, MimoModule, MimoStrategy
from lightning_mimo import ModuleParallelism as Cut
from lightning_mimo.checkpoint.reader import CheckpointReader
from lightning_mimo.checkpoint.shards import MAIN, ShardSpec, join
from lightning_mimo.checkpoint.tools import export
from lightning_mimo.mimo.parameter_names import named_parameters_of
from lightning_mimo.models import TransformerSize, vision_language_config
from tests.parity.layouts import PoolEnvironment
from tests.support.rank_pool import RankFailure, RankPool
from tests.support.tiny import IMAGE_PATCHES, IMAGE_TOKEN_ID, MAX_SEQUENCE_LENGTH, VOCAB_SIZE

SIZE = TransformerSize(num_layers=2, hidden_size=16, num_attention_heads=4, ffn_hidden_size=16)
APART = ({"images": Cut(dp=2), "language": Cut(tp=2)}, False)
PIPELINE = ({"images": Cut(tp=2), "language": Cut(pp=2)}, False)
TOGETHER = ({"images": Cut(dp=1), "language": Cut(dp=1)}, True)
PROJECTOR = "images.input_projections"


class Small(MimoModule):
    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        return vision_language_config(
            infra,
            patches=IMAGE_PATCHES,
            vision=SIZE,
            language=SIZE,
            vocab_size=VOCAB_SIZE,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            image_token_id=IMAGE_TOKEN_ID,
            tie_embeddings=True,
        )

    def configure_optimizers(self) -> Any:
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2))


@dataclass
class Start:
    """What a run starts with: shards of weights and of their float32 copies; step, epoch, size of optimizer state."""

    weights: dict[str, tuple[ShardSpec, torch.Tensor]] = field(default_factory=dict)
    mains: dict[str, tuple[ShardSpec, torch.Tensor]] = field(default_factory=dict)
    counts: tuple[int, int, int] = (-1, -1, -1)


class LookAtStart(pl.Callback):
    def __init__(self, seen: Start) -> None:
        self._seen = seen

    def on_train_start(self, trainer: pl.Trainer, pl_module: Small) -> None:
        infra, seen = pl_module.infra, self._seen
        for module in infra.participating_modules:
            for name, parameter in named_parameters_of(pl_module.model, infra, module):
                spec = ShardSpec.of(parameter, infra.pg_collections[module])
                seen.weights[name] = (spec, parameter.detach().clone())
                if getattr(parameter, "main_param", None) is not None:
                    seen.mains[name] = (spec, parameter.main_param.detach().clone().view(parameter.shape))
        state = trainer.optimizers[0].state
        seen.counts = (trainer.global_step, trainer.current_epoch, sum(map(len, state.values())))


def sample(index: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(index)
    ids = torch.tensor([IMAGE_TOKEN_ID, 1])
    images = torch.rand(1, 1, 4, 4, generator=generator)
    return {
        "input_ids": ids,
        "labels": torch.tensor([0, index % 8]),
        "loss_mask": torch.tensor([0, 1]),
        "modality_inputs": {"images": {"vit": {"pixel_values": images}}},
    }


def start(layout: tuple, *, save: Path | None = None, precision: str = "bf16-mixed", **options: Any) -> Start:
    """Train an epoch; what it started with."""
    torch.manual_seed(5)
    modules, colocate = layout
    seen = Start()
    strategy = MimoStrategy(modules, 4, colocate=colocate, cluster_environment=PoolEnvironment())
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=strategy,
        precision=precision,
        max_epochs=1,
        callbacks=[LookAtStart(seen)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Small(**options), DataLoader([sample(index) for index in range(8)], batch_size=4))
    assert trainer.global_step == 2
    if save is not None:
        trainer.save_checkpoint(save)
    strategy.infra.destroy()
    return seen


def whole(found: list[Start], what: str = "weights") -> dict[str, torch.Tensor]:
    pieces: dict[str, list] = {}
    for rank in found:
        for name, piece in getattr(rank, what).items():
            pieces.setdefault(name, []).append(piece)
    return {name: join(each) for name, each in pieces.items()}


@pytest.fixture(scope="module")
def checkpoint(rank_pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "stage1.ckpt"
    rank_pool.run(start, APART, save=path, world_size=4)
    return path


def test_run_starts_with_the_weights_of_a_checkpoint_of_another_layout(rank_pool: RankPool, checkpoint: Path) -> None:
    found = rank_pool.run(start, PIPELINE, init_from=str(checkpoint), world_size=4)
    with CheckpointReader(checkpoint, ("images", "language")) as reader:
        exact = {name: reader.whole(name, MAIN) for name in whole(found)}
    weights, mains = whole(found), whole(found, "mains")
    assert mains.keys() == exact.keys()
    assert all(torch.equal(mains[name], exact[name]) for name in exact)
    assert all(torch.equal(weights[name], exact[name].bfloat16()) for name in exact)
    assert {rank.counts for rank in found} == {(0, 0, 0)}


def test_what_files_lack_starts_from_the_seed_if_it_is_named(
    rank_pool: RankPool, checkpoint: Path, tmp_path: Path
) -> None:
    export(checkpoint, tmp_path / "all.safetensors")
    files = load_file(tmp_path / "all.safetensors")
    kept = {name: tensor for name, tensor in files.items() if not name.startswith(PROJECTOR)}
    folder = tmp_path / "parts"
    folder.mkdir()
    for module in ("images", "language"):
        own = {name: tensor for name, tensor in kept.items() if name.startswith(module)}
        save_file(
            own | ({"language.unused": torch.zeros(3)} if module == "language" else {}),
            folder / f"{module}.safetensors",
        )
    with pytest.raises(RankFailure, match=rf"does not hold '{PROJECTOR}.*init_missing=\['{PROJECTOR}'\]"):
        rank_pool.run(start, TOGETHER, init_from=folder, world_size=1)
    seeded = whole(rank_pool.run(start, TOGETHER, precision="32-true", world_size=1))
    found = rank_pool.run(start, APART, precision="32-true", init_from=folder, init_missing=[PROJECTOR], world_size=4)
    weights = whole(found)
    assert weights.keys() == files.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, seeded[name] if name.startswith(PROJECTOR) else files[name]), name
