"""What HuggingFaceModule does around its weights: when they are read, and into what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

pytest.importorskip("transformers")

from megatron.core.models.mimo import MimoModelConfig
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_mimo import ConfigError, HuggingFaceModule, MimoModelInfra, ModuleParallelism
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.mimo.model import build_mimo_model
from lightning_mimo.models import TransformerSize, encoder_spec, gpt_spec
from lightning_mimo.models.hugging_face.folder import read_config
from lightning_mimo.models.hugging_face.registry import model_of, register
from lightning_mimo.models.sizes import stage_ends
from lightning_mimo.planning.memory_estimate import memory_estimate
from tests.hugging_face.reference import conversations
from tests.hugging_face.runs import Layout, Observed, as_samples, make_trainer
from tests.hugging_face.tiny_models import save_model
from tests.parity.layouts import open_world
from tests.support.rank_pool import RankFailure, RankPool

ALONE = Layout(modules={"language": ModuleParallelism()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


class _Look(pl.Callback):
    """Keeps one weight, and the optimizer's copy of it, at the start of training."""

    def __init__(self) -> None:
        self.weight = self.main = torch.empty(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Observed) -> None:
        (language,) = (pl_module.model.language_model,)
        weight = language.module.decoder.final_layernorm.weight
        self.weight = weight.detach().clone()
        self.main = getattr(weight, "main_param", weight).detach().clone()


def _fit(folder: Path, precision: str, *, steps: int, ckpt_path: Path | None = None, save: Path | None = None) -> Any:
    samples = as_samples(conversations(2))
    look = _Look()
    trainer = make_trainer(ALONE, 2, precision=precision, max_steps=steps, max_epochs=steps, callbacks=[look])
    module = Observed(str(folder))
    trainer.fit(module, DataLoader(samples, batch_size=2), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    final = module.model.language_model.module.decoder.final_layernorm.weight.detach().clone()
    trainer.strategy.infra.destroy()
    return look.weight, look.main, final


def test_main_parameters_have_the_very_values_of_the_files(rank_pool: RankPool, folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert not torch.equal(expected, expected.bfloat16().float())
    ((weight, main, _),) = rank_pool.run(_fit, folder, "bf16-mixed", steps=1, world_size=1)
    assert torch.equal(weight, expected.bfloat16())
    assert main.dtype == torch.float32
    assert torch.equal(main, expected)


def test_checkpoint_wins_when_a_run_goes_on(rank_pool: RankPool, folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "one_step.ckpt"
    ((start, _, trained),) = rank_pool.run(_fit, folder, "32-true", steps=1, save=checkpoint, world_size=1)
    assert not torch.equal(start, trained)
    ((resumed, _, further),) = rank_pool.run(_fit, folder, "32-true", steps=2, ckpt_path=checkpoint, world_size=1)
    assert torch.equal(resumed, trained)
    assert not torch.equal(further, trained)


def _fit_with_long_sample(folder: Path) -> None:
    samples = as_samples(conversations(2))
    trainer = make_trainer(ALONE, 2, max_steps=1)
    trainer.fit(Observed(str(folder), max_sequence_length=4), DataLoader(samples, batch_size=2))


def test_samples_that_are_too_long_are_named(rank_pool: RankPool, folder: Path) -> None:
    with pytest.raises(RankFailure, match=r"Sample 0: input_ids has \d+ tokens, but .* max_sequence_length=4"):
        rank_pool.run(_fit_with_long_sample, folder, world_size=1)


def test_missing_transformers_is_named_with_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"transformers, which is not installed: pip install 'lightning-mimo\[hf\]'"):
        HuggingFaceModule(str(folder))


def test_family_of_a_users_own_can_be_registered() -> None:
    import transformers

    class OwnConfig(transformers.LlamaConfig):
        model_type = "own_llama"

    from lightning_mimo.models.hugging_face.decoder import text_model
    from lightning_mimo.models.hugging_face.llama import llama_size

    with pytest.raises(ConfigError, match="model_type='own_llama'; supported are"):
        model_of(OwnConfig())
    register("own_llama", text_model(llama_size))
    assert model_of(OwnConfig()).modules == ("language",)


QWEN2_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


QWEN2_AUDIO_7B = {"text_config": {"model_type": "qwen2", "vocab_size": 156032, "intermediate_size": 11008}}
SMOLVLM_256M = {
    "scale_factor": 4,
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    },
    "image_token_id": 49190,
}


# Published numbers of parameters. Of LLaVA's encoder, what comes after the layer that is used is not built:
# its last layer and the norm after it.
@pytest.mark.parametrize(
    ("kind", "sizes", "published"),
    [
        (
            "Llama",
            {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
            8_030_261_248,
        ),
        (
            "Qwen2",
            QWEN2_7B,
            7_615_616_512,
        ),
        ("Llava", {}, 7_063_427_072 - 12_596_224 - 2_048),
        # Half of the bytes that model.safetensors.index.json of Qwen/Qwen2.5-VL-7B-Instruct sums up, 16,584,333,312.
        ("Qwen2_5_VL", {}, 8_292_166_656),
        ("LlavaNext", {}, 7_566_747_648 - 12_596_224 - 2_048),
        ("SmolVLM", SMOLVLM_256M, 256_484_928),
        ("Qwen2Audio", QWEN2_AUDIO_7B, 8_397_094_912),
    ],
)
def test_full_sizes_have_the_published_numbers_of_parameters(kind: str, sizes: dict, published: int) -> None:
    import transformers

    if kind == "Llava":
        config = read_config(Path("configs/llava_1_5_7b"))
    elif kind == "Qwen2_5_VL":
        config = read_config(Path("configs/qwen2_5_vl_7b"))
    elif kind == "LlavaNext":
        config = transformers.LlavaNextConfig(text_config=transformers.MistralConfig(vocab_size=32064))
    else:
        config = getattr(transformers, f"{kind}Config")(**sizes)
    model = model_of(config)
    tp = {"Qwen2": 4, "Qwen2_5_VL": 4, "Qwen2Audio": 4, "SmolVLM": 1}.get(kind, 8)
    cuts = {name: ModuleParallelism(tp=tp, dp=1) for name in model.modules}
    if kind in ("Qwen2_5_VL", "Qwen2Audio"):
        cuts[model.modules[0]] = ModuleParallelism(dp=1)
    from megatron.core.distributed import DistributedDataParallelConfig

    from lightning_mimo.models.hugging_face.decoder import BuildOptions

    layout = MimoLayout.resolve(cuts, world_size=sum(cut.size for cut in cuts.values()), colocate=False)
    found = memory_estimate(
        layout,
        lambda infra: model.mimo_config(infra, BuildOptions()),
        dtype_policy=DtypePolicy(),
        ddp={name: DistributedDataParallelConfig() for name in cuts},
    )
    assert sum(found.parameters.values()) == published


@pytest.mark.parametrize("layers", range(4, 40))
@pytest.mark.parametrize("pp", range(2, 9))
def test_stages_differ_by_one_layer_at_most(layers: int, pp: int) -> None:
    first, last = stage_ends(layers, pp)
    if first is None and last is None:
        return
    middle = pp - (first is not None) - (last is not None)
    left = layers - (first or 0) - (last or 0)
    each = [left // middle] * middle if middle else []
    stages = [*([first] if first is not None else []), *each, *([last] if last is not None else [])]
    assert sum(stages) == layers
    assert max(stages) - min(stages) <= 1


class _FromPretrained(torch.nn.Module):
    """An encoder of a user's own that loads its weights itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import CLIPVisionModel

        self.clip = CLIPVisionModel.from_pretrained(folder)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.clip(pixel_values=pixel_values).last_hidden_state


def _build_with_own_encoder(folder: Path) -> bool:
    def configure(infra: MimoModelInfra) -> MimoModelConfig:
        size = TransformerSize(num_layers=1, hidden_size=32, num_attention_heads=4)
        gpt = gpt_spec(infra, size, vocab_size=16, max_sequence_length=8)
        spec = encoder_spec(
            infra,
            "images",
            lambda folder: _FromPretrained(folder),
            options={"folder": folder},
            projector=lambda: torch.nn.Linear(48, 32),
        )
        return MimoModelConfig(gpt, {"images": spec}, {"images": 15})

    from tests.parity.layouts import Layout as Cuts

    with open_world(
        Cuts(modules={name: ModuleParallelism(dp=1) for name in ("images", "language")}, colocate=True)
    ) as infra:
        model = build_mimo_model(configure(infra), infra, seed=0)
        projector = dict(model.modality_submodules["images"].input_projections.named_parameters())
        assert {name: tuple(each.shape) for name, each in projector.items()} == {"0.weight": (32, 48), "0.bias": (32,)}
        loaded = dict(model.modality_submodules["images"].encoders["encoder"].clip.named_parameters())
        files = load_file(folder / "model.safetensors")
        return bool(files) and all(torch.equal(loaded[name], files[name]) for name in loaded)


@pytest.mark.hugging_face
def test_encoder_may_load_itself_with_from_pretrained(rank_pool: RankPool, tmp_path: Path) -> None:
    import transformers

    from tests.hugging_face.tiny_models import VISION

    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "clip")
    assert rank_pool.run(_build_with_own_encoder, tmp_path / "clip", world_size=1) == [True]
