"""Qwen2-VL and Qwen2.5-VL: positions as transformers computes them, names of files, and what is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from lightning_mimo import ConfigError, DataError, HuggingFaceModule, LayoutError, ModuleParallelism
from lightning_mimo.data import ChatDataset
from lightning_mimo.data.sample_format import SampleFormat, read_ids, read_text
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.models.hugging_face.decoder import BuildOptions
from lightning_mimo.models.hugging_face.grid_positions import GridPositions
from lightning_mimo.models.hugging_face.qwen_vision import GridTower
from lightning_mimo.models.hugging_face.qwen_vl import QWEN2_5_VISION
from lightning_mimo.models.hugging_face.registry import model_of
from lightning_mimo.weights.files import SafetensorsFolder
from tests.hugging_face.comparison import Pretrained, compare
from tests.hugging_face.reference import conversations, exactly, load, truth
from tests.hugging_face.runs import Layout, Observed, as_samples, make_trainer, run
from tests.hugging_face.tiny_models import (
    GRIDS,
    IMAGE_TOKEN,
    ITEMS,
    MODELS,
    PATCH,
    VIDEO_TOKEN,
    VISION_START,
    save_model,
)
from tests.support import processors
from tests.support.rank_pool import RankPool

KINDS = ["qwen2_vl", "qwen2_5_vl"]
MERGE = PATCH["spatial_merge_size"]
APART = {"images": ModuleParallelism(), "language": ModuleParallelism()}
POSITIONS = GridPositions(
    module="images", encoder="vision", argument="image_grid_thw", token=IMAGE_TOKEN, merge_size=MERGE
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2_5_vl", tmp_path_factory.mktemp("models") / "qwen2_5_vl")


def test_an_example_for_estimates_is_what_the_encoder_declares(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    tower = GridTower(config.vision_config, QWEN2_5_VISION)
    inputs, number = tower.example_inputs(2)
    assert tower.item_sizes.embeddings(inputs).tolist() == [number] * 2
    rows = tower.item_sizes.rows["pixel_values"](inputs)
    assert rows.sum() == len(inputs["pixel_values"]) == 2 * number * MERGE**2
    small, side = inputs["image_grid_thw"].new_tensor([[1, 2 * MERGE, 2 * MERGE]]), 4 * MERGE**2
    assert len(tower(inputs["pixel_values"][:side], small)) == 4, "the patches are as wide as the model's"


def with_grids(grids: object) -> dict[str, Any]:
    return {"images": {"vision": {"image_grid_thw": grids}}}


def indices_of(model: Any, ids: torch.Tensor, **grids: torch.Tensor | None) -> torch.Tensor:
    """``[3, S]`` as transformers' get_rope_index computes them."""
    options: dict[str, Any] = dict(grids)
    if "mm_token_type_ids" in inspect.signature(model.get_rope_index).parameters:
        options["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()[None] + 2 * (ids == VIDEO_TOKEN).int()[None]
    return model.get_rope_index(input_ids=ids[None], **options)[0][:, 0]


# Positions.


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_those_of_transformers(kind: str) -> None:
    model = MODELS[kind]().model
    generator = torch.Generator().manual_seed(5)
    for images in [1, 1, 2, 3, 5]:
        grids = [GRIDS[int(torch.randint(len(GRIDS), (), generator=generator))] for _ in range(images)]
        ids: list[int] = []
        for _, height, width in grids:
            before = int(torch.randint(4, (), generator=generator))
            ids += [5] * before + [VISION_START] + [IMAGE_TOKEN] * (height * width // MERGE**2)
        ids += [7] * int(torch.randint(4, (), generator=generator))
        tokens = torch.tensor(ids)
        expected = indices_of(model, tokens, image_grid_thw=torch.tensor(grids))
        found = POSITIONS(0, tokens, with_grids(torch.tensor(grids)))
        assert found is not None and torch.equal(found, expected)


def test_text_alone_has_the_usual_positions() -> None:
    assert POSITIONS(0, torch.tensor([1, 2, 3]), {}) is None
    assert POSITIONS(0, torch.tensor([1, 2, 3]), with_grids(torch.zeros(0, 3, dtype=torch.int64))) is None


@pytest.mark.parametrize(
    ("ids", "inputs", "message"),
    [
        ([1, 99], {}, r"neither 'position_ids' nor modality_inputs\['images'\]\['vision'\]\['image_grid_thw'\]"),
        ([1, 99], {"images": {"vision": {}}}, r"dataset with load\(index, modules\) must give it also where 'images'"),
        ([1, 99, 99], with_grids([[1, 2, 6]]), r"has 2 placeholder tokens for 'images', but image_grid_thw makes 3"),
        ([99, 1, 99], with_grids([[1, 2, 4]]), r"the 2 placeholder tokens of an image, from input_ids\[0\] on"),
        ([99], with_grids([[1, 4, 1]]), r"is \[\[1, 4, 1\]\], but must be \[images, 3\]: .* multiples of 2"),
        ([99], with_grids([1, 2, 2]), r"is \[1, 2, 2\], but must be \[images, 3\]"),
        ([99, 99], with_grids([[2, 2, 2]]), r"has \[2, 2, 2\], a video .*: give position_ids \[3, S\]"),
    ],
)
def test_grids_that_do_not_belong_to_the_tokens_are_refused(ids: list[int], inputs: dict, message: str) -> None:
    with pytest.raises(DataError, match="^Sample 4.*" + message):
        POSITIONS(4, torch.tensor(ids), inputs)


def format_of(kind: str) -> SampleFormat:
    common = SampleFormat(special_token_ids={"images": IMAGE_TOKEN}, position_type="mrope", labels_required=False)
    return model_of(MODELS[kind]().config).complete_format(common)


def test_positions_of_a_samples_own_are_kept() -> None:
    expected, own = format_of("qwen2_vl"), torch.tensor([[0, 7], [0, 8], [0, 9]])
    sample = {"input_ids": [1, IMAGE_TOKEN], "modality_inputs": with_grids([[1, 2, 2]])}
    computed = read_text(0, sample, expected).position_ids
    assert computed is not None and computed.tolist() == [[0, 1]] * 3
    given = read_text(0, {**sample, "position_ids": own}, expected).position_ids
    assert given is not None and torch.equal(given, own)


def test_videos_are_refused_with_the_way_to_give_them_as_images() -> None:
    message = rf"^Sample 2: input_ids has the token {VIDEO_TOKEN}, which stands for a video.* {IMAGE_TOKEN} in place of"
    with pytest.raises(DataError, match=message):
        read_ids(2, {"input_ids": [1, VIDEO_TOKEN]}, format_of("qwen2_5_vl"))


# Configs.


def changed(kind: str, changes: dict[str, Any]) -> Any:
    config = MODELS[kind]().config
    for name, value in changes.items():
        part, _, last = name.rpartition("__")
        setattr(getattr(config, part) if part else config, last, value)
    return config


ROPE_FIELD = "rope_parameters" if hasattr(transformers.Qwen2VLTextConfig(), "rope_parameters") else "rope_scaling"
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def rope(section: list[int], kind: str = "default", **more: float) -> dict[str, Any]:
    fields = {"rope_type": kind, "rope_theta": 1e4, "mrope_section": section, **more}
    return {f"text_config__{ROPE_FIELD}": fields}


def vision(**changes: Any) -> dict[str, Any]:
    return {f"vision_config__{name}": value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen2_vl", rope([1, 1, 2], "yarn"), "rope_type='yarn' is not supported"),
        ("qwen2_vl", rope([1, 1, 2], "llama3", **LLAMA3), "rope_type='llama3' is not supported"),
        ("qwen2_vl", rope([1, 1, 1]), "add up to half of head_dim=8, 4; they add up to 3"),
        ("qwen2_vl", rope([2, 2]), r"mrope_section=\[2, 2\] must be three numbers"),
        ("qwen2_vl", {"text_config__attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported"),
        ("qwen2_vl", {"text_config__head_dim": 16, **rope([2, 2, 4])}, "head_dim=16 is not supported"),
        ("qwen2_vl", vision(hidden_size=64), r"of the width 64 \(hidden_size in vision_config\), but .* 32"),
        ("qwen2_5_vl", vision(out_hidden_size=64), r"of the width 64 \(out_hidden_size in vision_config\)"),
        ("qwen2_5_vl", vision(fullatt_block_indexes=[1, 3]), r"\[1, 3\] with depth=3 .* There is no layer 3"),
        ("qwen2_5_vl", vision(window_size=12), r"window_size=12 is not supported\. .* multiple of .* = 8 pixels"),
        ("qwen2_5_vl", vision(deepstack_visual_indexes=[1]), r"deepstack_visual_indexes=\[1\] is not supported"),
        ("qwen2_5_vl", {"model_type": "qwen3_vl"}, "model_type='qwen3_vl'; supported are .*qwen2_5_vl"),
    ],
)
def test_config_that_is_not_covered_is_refused(kind: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(changed(kind, changes))


def resolve(images: ModuleParallelism) -> MimoLayout:
    modules = {"images": images, "language": ModuleParallelism(dp=1)}
    return MimoLayout.resolve(modules, world_size=images.size + 1, colocate=False)


def test_what_cannot_run_in_a_layout_is_refused() -> None:
    whole = resolve(ModuleParallelism(dp=1))
    model = model_of(MODELS["qwen2_vl"]().config)
    for cut in (ModuleParallelism(tp=2, dp=1), ModuleParallelism(pp=2, dp=1)):
        with pytest.raises(LayoutError, match=r"'qwen2_vl.*' is taken from transformers as it is"):
            model.check(resolve(cut), BuildOptions())
    windows = {"text_config__sliding_window": 32, "text_config__use_sliding_window": True}
    model = model_of(changed("qwen2_vl", windows))
    with pytest.raises(ConfigError, match="sliding_window=32 with max_sequence_length=128"):
        model.check(whole, BuildOptions())
    model.check(whole, BuildOptions(max_sequence_length=32))
    with pytest.raises(ConfigError, match="image_token_id=200, but vocab_size=130"):
        model_of(changed("qwen2_vl", {"image_token_id": 200})).check(whole, BuildOptions())


# Files.

FLAT = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


def test_published_config_has_its_fields_on_the_outside() -> None:
    """As that of Qwen2.5-VL-3B."""
    model = model_of(transformers.Qwen2_5_VLConfig(**FLAT))
    assert model.text.tied and model.vocab_size == 151936
    assert model.text.size.mrope_section == (16, 24, 24) and model.text.size.rotary_base == 1e6
    assert model.text.size.num_layers == 36 and model.text.size.query_groups == 2
    model.check(resolve(ModuleParallelism(dp=1)), BuildOptions())


def test_files_may_have_the_names_of_parameters(folder: Path, tmp_path: Path) -> None:
    """As published, and as a state_dict is called."""
    outer = {"visual.": "model.visual.", "model.": "model.language_model.", "lm_head.": "lm_head."}
    published = load_file(folder / "model.safetensors")
    assert {name.partition(".")[0] for name in published} == {"visual", "model"}
    renamed = {outer[f"{name.partition('.')[0]}."] + name.partition(".")[2]: each for name, each in published.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = model_of(MODELS["qwen2_5_vl"]().config)
    tables = []
    for path in (folder, tmp_path):
        with SafetensorsFolder(path) as files:
            tables.append(model.rules(files.shapes(), model.padded_vocab_size(1)))
            tables[-1].check_files(files.shapes(), where=str(path))
    assert tables[0].rules.keys() == tables[1].rules.keys()
    parts = {name.rpartition(".")[0].split(".tower.")[0].split(".merger.")[0] for name in tables[0].rules}
    assert {part for part in parts if part.startswith("images")} == {
        "images.encoders.vision",
        "images.input_projections.0",
    }


def test_rotary_frequencies_are_not_rounded() -> None:
    config = MODELS["qwen2_5_vl"]().config.vision_config
    before, tower = GridTower(config, QWEN2_5_VISION), GridTower(config, QWEN2_5_VISION).bfloat16()
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    frequencies = dict(tower.named_buffers())
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies.values())
    assert all(torch.equal(frequencies[name], buffer) for name, buffer in before.named_buffers())
    tower.to("meta")
    assert {buffer.device.type for buffer in tower.buffers()} == {"meta"}


# Against transformers.


@pytest.mark.hugging_face
@pytest.mark.parametrize("part", ["encoders", "input_projections"])
def test_tower_and_merger_can_be_frozen_apart(rank_pool: RankPool, tmp_path: Path, part: str) -> None:
    theirs = {"encoders": ("visual.patch_embed", "visual.blocks"), "input_projections": ("visual.merger",)}
    folder = save_model("qwen2_5_vl", tmp_path / "model", dtype=torch.float64)
    samples = conversations(6, ITEMS["qwen2_5_vl"])
    made = Pretrained(folder, samples, truth(folder, samples, frozen=theirs[part]))
    layout = Layout(modules={**APART, "language": ModuleParallelism(tp=2)})
    checkpoint = tmp_path / "trained.ckpt"
    found = rank_pool.run(run, folder, samples, layout, checkpoint, frozen=[f"images.{part}"], world_size=layout.ranks)
    trained = {name for rank in found for name in rank.gradients[0]}
    assert not any(name.startswith(f"images.{part}.") for name in trained)
    assert any(name.startswith("images.") for name in trained)
    # Only what is trained has gradients here; the weights after both steps say as much.
    found = [replace(rank, gradients=[]) for rank in found]
    made = replace(made, truth=replace(made.truth, gradients=[]))
    result = compare(made, layout, found, checkpoint, tmp_path / "exported")
    assert max(result.logits, result.loss, result.weight, result.export) < 1e-9


def _logits(folder: Path, samples: list[dict[str, Any]]) -> dict[int, torch.Tensor]:
    layout = Layout(modules=APART, colocate=True)
    trainer = make_trainer(layout, len(samples))
    module = Observed(str(folder))
    with exactly():
        trainer.validate(module, DataLoader(samples, batch_size=len(samples)), verbose=False)
    trainer.strategy.infra.destroy()
    return module.logits


@pytest.mark.hugging_face
@pytest.mark.parametrize("kind", KINDS)
def test_video_given_as_an_image_is_the_same_as_a_video(rank_pool: RankPool, tmp_path: Path, kind: str) -> None:
    folder = save_model(kind, tmp_path / "model", dtype=torch.float64)
    grids = torch.tensor([[3, 4, 4]])
    values = torch.randn(48, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([5, VISION_START, *[VIDEO_TOKEN] * 12, 7, 8, 9, 10])
    model = load(folder)
    positions = indices_of(model.model, ids, video_grid_thw=grids)
    with torch.no_grad(), exactly():
        expected = model(
            input_ids=ids[None], position_ids=positions[:, None], pixel_values_videos=values, video_grid_thw=grids
        ).logits[0]
    sample = {
        "input_ids": torch.where(ids == VIDEO_TOKEN, IMAGE_TOKEN, ids),
        "labels": [-100] * 14 + [8, 9, 10, 11],
        "position_ids": positions,
        "modality_inputs": {"images": {"vision": {"pixel_values": values, "image_grid_thw": grids}}},
    }
    (found,) = rank_pool.run(_logits, folder, [sample], world_size=1)
    difference = (found[0][:, : expected.size(-1)] - expected).abs().max()
    assert difference < 1e-9 * expected.abs().max()


class _TextOnly(torch.utils.data.Dataset):
    """Opens images only for the module that takes them, and gives the grids to all."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def load(self, index: int, modules: frozenset[str]) -> dict[str, Any]:
        sample = dict(self._samples[index])
        inputs = sample.get("modality_inputs", {}).get("images", {}).get("vision")
        if inputs and "images" not in modules:
            sample["modality_inputs"] = with_grids(inputs["image_grid_thw"])
        return sample


def _losses(folder: Path, *, load: Callable[[list], Any]) -> float:
    samples = as_samples(conversations(4, ITEMS["qwen2_5_vl"]))
    trainer = make_trainer(Layout(modules=APART), len(samples))
    (metrics,) = trainer.validate(
        HuggingFaceModule(str(folder)), DataLoader(load(samples), batch_size=len(samples)), verbose=False
    )
    trainer.strategy.infra.destroy()
    return metrics["val/loss"]


@pytest.mark.hugging_face
def test_dataset_needs_no_pixels_for_the_language_module(rank_pool: RankPool, folder: Path) -> None:
    whole = rank_pool.run(_losses, folder, load=list, world_size=2)
    assert rank_pool.run(_losses, folder, load=_TextOnly, world_size=2) == whole


def _with_processor(folder: Path) -> Path:
    """A model for the tokens of a processor, which lies beside it."""
    processor = processors.qwen("Qwen2_5_VL", patch_size=PATCH["patch_size"])
    config = MODELS["qwen2_5_vl"]().config
    config.text_config.vocab_size = len(processor.tokenizer)
    for name in ("image", "video", "vision_start", "vision_end"):
        token = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        setattr(config, f"{name}_token_id", processor.tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(7)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _row(question: str, images: int, folder: Path) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    for number in range(images):
        path = folder / f"{question}{number}.png"
        processors.image(20 + 9 * number, 31 + 5 * images, seed=number).save(path)
        content.append({"type": "image", "image": str(path)})
    content.append({"type": "text", "text": question})
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes, two."}]}


def _chat(folder: Path, rows: list[dict[str, Any]]) -> dict[int, torch.Tensor]:
    trainer = make_trainer(Layout(modules=APART), len(rows))
    module = Observed(str(folder))
    with exactly():
        trainer.validate(module, DataLoader(ChatDataset(rows, str(folder)), batch_size=len(rows)), verbose=False)
    trainer.strategy.infra.destroy()
    return module.logits


@pytest.mark.hugging_face
def test_conversations_through_the_processor_of_the_model(rank_pool: RankPool, tmp_path: Path) -> None:
    folder = _with_processor(tmp_path / "model")
    rows = [_row(question, images, tmp_path) for images, question in enumerate(["A cat?", "A dog?", "Two?"])]
    _, ours = rank_pool.run(_chat, folder, rows, world_size=2)
    model, processor = load(folder), transformers.AutoProcessor.from_pretrained(folder)
    for index, row in enumerate(rows):
        question, answer = row["messages"]
        answer = {**answer, "content": [{"type": "text", "text": answer["content"]}]}
        text = processor.apply_chat_template([question, answer], tokenize=False)
        images = [Image.open(part["image"]) for part in question["content"] if part["type"] == "image"]
        inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt")
        with torch.no_grad(), exactly():
            expected = model(**inputs).logits[0]
        difference = (ours[index][:, : expected.size(-1)] - expected).abs().max()
        assert difference < 1e-9 * expected.abs().max()
