"""Folders that cannot be used are refused before any process starts, and what goes in comes out bit for bit."""

from __future__ import annotations

import filecmp
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from lightning_mimo import ConfigError, HuggingFaceModule, LayoutError, ModuleParallelism
from lightning_mimo.commands.cli import main
from lightning_mimo.commands.export_hf import export_hf
from lightning_mimo.layout.layout import MimoLayout
from tests.hugging_face.runs import Layout, load_and_save
from tests.hugging_face.tiny_models import ITEMS, UNDIVIDED, VOCABULARY, save_model
from tests.support.rank_pool import RankPool

Edit = Callable[[dict], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llava_clip", tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "llava"))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    for name, value in changes.items():
        part = content
        *path, last = name.split("__")
        for each in path:
            part = part[each]
        part[last] = value
    file.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def resolve(images: ModuleParallelism, language: ModuleParallelism, ranks: int) -> MimoLayout:
    return MimoLayout.resolve({"images": images, "language": language}, world_size=ranks, colocate=False)


def check(folder: Path, **options: object) -> None:
    """What happens before processes start."""
    layout = resolve(ModuleParallelism(), ModuleParallelism(), 2)
    module = HuggingFaceModule(str(folder), **options)
    module.check_layout(layout)
    module.check_weights(layout)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config__rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='yarn'"),
        ({"text_config__hidden_act": "gelu_10"}, "hidden_act='gelu_10' is not supported"),
        ({"text_config__mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer=\[-2, -1\] is not supported"),
        ({"model_type": "t5"}, "model_type='t5'; supported are .*llama, llava"),
        ({"text_config__num_hidden_layers": 5}, "there is no tensor 'language_model.model.layers.4"),
        ({"text_config__num_hidden_layers": 3}, "no rule is about 'language_model.model.layers.3"),
        (
            {"text_config__intermediate_size": 64},
            r"gate_proj.weight' has the shape \(48, 32\), but .* makes it \(64, 32\)",
        ),
        ({"image_token_index": VOCABULARY}, f"image_token_index={VOCABULARY}, but vocab_size={VOCABULARY}"),
    ],
)
def test_config_that_is_not_covered_is_refused(copied: Path, changes: dict, message: str) -> None:
    edit_config(copied, **changes)
    with pytest.raises(ConfigError, match=message):
        check(copied)


def test_sliding_window_is_refused_where_it_would_be_used(tmp_path: Path) -> None:
    folder = save_model("mistral", tmp_path / "mistral")
    edit_config(folder, sliding_window=32)
    layout = MimoLayout.resolve({"language": ModuleParallelism()}, world_size=1, colocate=False)
    with pytest.raises(ConfigError, match="sliding_window=32 with max_sequence_length=128"):
        HuggingFaceModule(str(folder)).check_layout(layout)
    HuggingFaceModule(str(folder), max_sequence_length=32).check_layout(layout)


def test_sequences_longer_than_the_model_was_made_for_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_sequence_length=129 is more than the 128 positions"):
        check(folder, max_sequence_length=129)


@pytest.mark.parametrize(
    ("images", "language", "ranks", "message"),
    [
        (ModuleParallelism(), ModuleParallelism(tp=4), 5, r"'language': tp=4 does not divide num_query_groups=2"),
        (
            ModuleParallelism(tp=3, dp=1),
            ModuleParallelism(),
            4,
            r"'images': tp=3 does not divide num_attention_heads=4",
        ),
    ],
)
def test_heads_that_tp_does_not_divide_are_refused(
    folder: Path, images: ModuleParallelism, language: ModuleParallelism, ranks: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        HuggingFaceModule(str(folder)).check_layout(resolve(images, language, ranks))


def test_layout_with_other_modules_is_refused(folder: Path) -> None:
    layout = MimoLayout.resolve({"language": ModuleParallelism()}, world_size=1, colocate=False)
    with pytest.raises(LayoutError, match=r"The model has the modules \['images', 'language'\]"):
        HuggingFaceModule(str(folder)).check_layout(layout)


def test_encoder_of_transformers_is_not_divided(tmp_path: Path) -> None:
    folder = save_model("llava_dinov2", tmp_path / "llava")
    with pytest.raises(LayoutError, match="'dinov2' is taken from transformers as it is, which cannot be divided"):
        HuggingFaceModule(str(folder)).check_layout(resolve(ModuleParallelism(tp=2), ModuleParallelism(), 3))


def test_folder_that_is_no_model_is_refused(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no folder\. Give the folder of a model"):
        HuggingFaceModule(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"is no folder of a model: there is no config\.json"):
        HuggingFaceModule(str(tmp_path))
    (copied / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"it has neither model.safetensors.index.json nor model.safetensors"):
        check(copied)
    (copied / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pickles \(pytorch_model.bin\), which may run any code .*Convert them"):
        check(copied)


def test_model_of_the_hub_is_taken_from_its_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "models--some--llava"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123")
    shutil.copytree(folder, model / "snapshots" / "0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert HuggingFaceModule("some/llava").pretrained == model / "snapshots" / "0123"
    with pytest.raises(ConfigError, match=r"pretrained='some/other' is no folder, and no model of this name could be"):
        HuggingFaceModule("some/other")


def test_missing_tensor_is_named(copied: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.pop("multi_modal_projector.linear_2.bias"))
    with pytest.raises(ConfigError, match=r"there is no tensor 'multi_modal_projector\.linear_2\.bias'"):
        check(copied)


@pytest.mark.parametrize("kind", ["llava_next", "qwen2_audio"])
def test_names_of_both_versions_of_transformers_are_known(tmp_path: Path, kind: str) -> None:
    """Published files begin with language_model.model; others are called like the parameters in transformers 5."""
    folder = save_model(kind, tmp_path / kind)
    modules = {ITEMS[kind].module: ModuleParallelism(), "language": ModuleParallelism()}
    layout = MimoLayout.resolve(modules, world_size=2, colocate=False)
    HuggingFaceModule(str(folder)).check_layout(layout)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tail = name.removeprefix("language_model.")
            inside = f"model.language_model.{tail.removeprefix('model.')}" if tail != name else f"model.{name}"
            tensors[tail if "lm_head" in name else inside] = tensors.pop(name)

    edit_weights(folder, rename)
    assert "model.language_model.embed_tokens.weight" in load_file(folder / "model.safetensors")
    HuggingFaceModule(str(folder)).check_layout(layout)


def test_tokenizer_larger_than_the_vocabulary_is_refused(copied: Path) -> None:
    tokens = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": VOCABULARY, "content": "<image>"}]}
    (copied / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ConfigError, match=f"token ids up to {VOCABULARY}, but the model has embeddings for 0 to"):
        check(copied)


def no_tokenizer_fits(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": VOCABULARY}}}))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_projector(folder: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "projector" in name]:
            del tensors[name]

    edit_weights(folder, drop)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (shutil.rmtree, [], "is no folder. Give the folder of a model"),
        (no_tokenizer_fits, [], f"has token ids up to {VOCABULARY}, but the model has embeddings for"),
        (only_pickles, [], "holds its weights as pickles (pytorch_model.bin), which may run any code"),
        (drop_projector, [], "What is to start from the seed is named: init_missing=['images.input_projections']"),
        (
            lambda folder: edit_config(folder, text_config__num_attention_heads=1, text_config__num_key_value_heads=1),
            [],
            "Module 'language': tp=2 does not divide num_attention_heads=1",
        ),
        (
            lambda folder: None,
            ["--model.init_args.init_from=missing.ckpt"],
            "init_from='missing.ckpt': there is nothing",
        ),
        (
            lambda folder: None,
            ["--model.init_args.init_missing=[images]"],
            "init_missing names 'images', but all of it",
        ),
    ],
    ids=["missing", "tokenizer", "pickles", "projector", "heads", "init_from", "init_missing"],
)
def test_command_refuses_in_one_line_before_any_process_starts(
    copied: Path,
    spoil: Edit,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-mimo"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("os.fork", lambda: pytest.fail("a process was started"))
    spoil(copied)
    root = [f"--trainer.default_root_dir={copied.parent}", "--data.train=configs", "--data.val=null"]
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "configs/tiny_llava.yaml", f"--model.init_args.pretrained={copied}", *root, *options])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-mimo: error: ")]
    assert len(error) == 1
    assert message in error[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llava_clip", {"max_shard_size": "40KB"}),
        pytest.param("llava_clip", {}, marks=pytest.mark.hugging_face),
        pytest.param("qwen3", {}, marks=pytest.mark.hugging_face),
        pytest.param("llava_mixtral", {"max_shard_size": "40KB"}, marks=pytest.mark.hugging_face),
        pytest.param("llava_dinov2", {}, marks=pytest.mark.hugging_face),
        pytest.param("qwen2_vl", {"max_shard_size": "40KB"}, marks=pytest.mark.hugging_face),
        pytest.param("qwen2_5_vl", {}, marks=pytest.mark.hugging_face),
        pytest.param("llava_next", {}, marks=pytest.mark.hugging_face),
        pytest.param("idefics3", {"max_shard_size": "40KB"}, marks=pytest.mark.hugging_face),
        pytest.param("smolvlm", {}, marks=pytest.mark.hugging_face),
        pytest.param("qwen2_audio", {}, marks=pytest.mark.hugging_face),
    ],
)
def test_import_and_export_without_training_is_the_same_bit_for_bit(
    rank_pool: RankPool, tmp_path: Path, kind: str, options: dict
) -> None:
    source = save_model(kind, tmp_path / "source", dtype=torch.bfloat16, **options)
    (source / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    (source / "preprocessor_config.json").write_text("{}")
    modules = {"language": ModuleParallelism(tp=2)}
    if kind in ITEMS:
        encoder = ModuleParallelism(tp=1 if kind in UNDIVIDED else 2)
        modules = {ITEMS[kind].module: encoder, "language": ModuleParallelism(pp=2)}
    layout, checkpoint = Layout(modules=modules, options={"sequence_parallel": True}), tmp_path / "weights.ckpt"
    for precision in ("32-true", "bf16-mixed"):
        out = tmp_path / f"out-{precision}"
        shutil.rmtree(checkpoint, ignore_errors=True)
        rank_pool.run(load_and_save, kind, source, layout, checkpoint, precision, world_size=layout.ranks)
        export_hf(checkpoint, out, pretrained=source)
        names = sorted(file.name for file in source.iterdir())
        assert sorted(file.name for file in out.iterdir()) == names
        assert filecmp.cmpfiles(source, out, names, shallow=False) == (names, [], [])


def test_export_divides_tensors_over_files_of_a_given_size(rank_pool: RankPool, tmp_path: Path) -> None:
    source = save_model("qwen3", tmp_path / "source", dtype=torch.bfloat16)
    layout, checkpoint, out = Layout(modules={"language": ModuleParallelism()}), tmp_path / "w.ckpt", tmp_path / "out"
    rank_pool.run(load_and_save, "qwen3", source, layout, checkpoint, "32-true", world_size=1)
    export_hf(checkpoint, out, pretrained=source, max_shard_bytes=40_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 45_000 for file in files)
    ours: dict[str, torch.Tensor] = {}
    for file in files:
        ours |= load_file(file)
    theirs = load_file(source / "model.safetensors")
    assert (
        ours.keys()
        == theirs.keys()
        == json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys()
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ConfigError, match="exists already"):
        export_hf(checkpoint, out, pretrained=source)


def test_projector_that_a_folder_lacks_starts_from_the_seed_and_is_exported(
    rank_pool: RankPool, copied: Path, tmp_path: Path
) -> None:
    names = set(load_file(copied / "model.safetensors"))
    drop_projector(copied)
    layout = Layout(
        modules={"images": ModuleParallelism(), "language": ModuleParallelism()},
        colocate=True,
        options={"init_missing": ["images.input_projections"]},
    )
    checkpoint, out = tmp_path / "w.ckpt", tmp_path / "out"
    rank_pool.run(load_and_save, "llava_clip", copied, layout, checkpoint, "32-true", world_size=1)
    out.mkdir()  # an empty folder may be there
    export_hf(checkpoint, out)
    exported, kept = load_file(out / "model.safetensors"), load_file(copied / "model.safetensors")
    assert exported.keys() == names
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    weights = exported["multi_modal_projector.linear_1.weight"]
    assert 0.5 < float(weights.std()) * weights.size(1) ** 0.5 < 2
