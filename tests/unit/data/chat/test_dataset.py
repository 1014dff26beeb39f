"""Samples of conversations, token for token what transformers' own processors make of them."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mimo.data import ChatDataset
from lightning_mimo.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision", reason="transformers' processors of videos need it")

from PIL import Image, ImageOps  # noqa: E402

from tests.support import processors  # noqa: E402

says_what_it_puts = pytest.mark.skipif(
    not processors.IS_5, reason="version 4 of transformers does not say what it puts for an image"
)
SIZES = {"none": [], "one": [(30, 20)], "several": [(20, 50), (64, 16), (33, 33)]}
PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": processors.llava,
    "llava_siglip": lambda: processors.llava(
        image_processor=transformers.SiglipImageProcessor(size={"height": 24, "width": 24})
    ),
    "llava_next": processors.llava_next,
    "qwen2_vl": processors.qwen,
    "qwen2_5_vl": lambda: processors.qwen("Qwen2_5_VL"),
}


def conversation(images: list[Any]) -> list[dict[str, Any]]:
    """Two turns; the images stand before and after the text."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": "What is in the image?"}]
    for number, image in enumerate(images):
        parts.insert(2 * number, {"type": "image", "image": image})
    return [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat 🐈 and a dog."}]},
        {"role": "user", "content": [{"type": "text", "text": "Yes?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two of them."}]},
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of images, ``0.png`` and so on, one of each size."""
    folder = tmp_path_factory.mktemp("images")
    for sizes in SIZES.values():
        for height, width in sizes:
            processors.image(height, width, seed=height).save(folder / f"{height}x{width}.png")
    return folder


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images cannot be decoded."""

    def load(self: Image.Image) -> None:
        raise AssertionError("an image is decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)


@pytest.mark.parametrize("images", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_samples_are_what_the_processor_makes(name: str, images: str, folder: Path) -> None:
    processor = PROCESSORS[name]()
    paths = [f"{height}x{width}.png" for height, width in SIZES[images]]
    opened = [Image.open(folder / path).convert("RGB") for path in paths]
    theirs = processor.apply_chat_template(conversation(opened), tokenize=True, return_dict=True, return_tensors="pt")
    dataset = ChatDataset([{"messages": conversation(paths)}], processor, media_folder=folder)
    sample = dataset.load(0, {"images"})

    assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64
    assert sample["input_ids"].tolist() == theirs["input_ids"][0].tolist()
    inputs = sample["modality_inputs"].get("images", {}).get("vision", {})
    names = {key for key in theirs if key in ("pixel_values", "image_sizes", "image_grid_thw")}
    assert inputs.keys() == names
    assert bool(inputs) == bool(paths)
    for key, value in inputs.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_language_rank_has_the_same_text_and_decodes_nothing(name: str, folder: Path, no_pixels: None) -> None:
    processor = PROCESSORS[name]()
    paths = [f"{height}x{width}.png" for height, width in SIZES["several"]]
    dataset = ChatDataset([{"messages": conversation(paths)}], processor, media_folder=folder)
    theirs = dataset.load(0, {"language"})
    with pytest.raises(DataError, match="an image is decoded"):
        dataset.load(0, {"images", "language"})
    inputs = theirs["modality_inputs"]
    if "qwen" in name:
        assert list(inputs["images"]["vision"]) == ["image_grid_thw"], "positions are made from it"
    else:
        assert inputs == {}


@pytest.mark.parametrize("name", PROCESSORS)
def test_ranks_agree(name: str, folder: Path) -> None:
    paths = [f"{height}x{width}.png" for height, width in SIZES["several"]]
    dataset = ChatDataset([{"messages": conversation(paths)}], PROCESSORS[name](), media_folder=folder)
    samples = [dataset.load(0, modules) for modules in ({"language"}, {"images"}, {"images", "language"})]
    for sample in samples[1:]:
        for key in ("input_ids", "labels"):
            assert torch.equal(sample[key], samples[0][key])
    assert "pixel_values" in dataset[0]["modality_inputs"]["images"]["vision"]


@says_what_it_puts
@pytest.mark.parametrize("images", SIZES)
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_marked_turns_are_those_of_the_processor(name: str, images: str, folder: Path) -> None:
    processor = PROCESSORS[name]()
    messages = conversation([Image.open(folder / f"{height}x{width}.png") for height, width in SIZES[images]])
    theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    labels = ChatDataset([{"messages": messages}], processor, labels_shifted=False)[0]["labels"]
    assert (labels != -100).int().tolist() == theirs["assistant_masks"][0]


@pytest.mark.parametrize(
    ("train_on", "learned"),
    [
        ("assistant", ["A cat 🐈 and a dog.<|im_end|>\n", "Two of them.<|im_end|>\n"]),
        ("last", ["Two of them.<|im_end|>\n"]),
    ],
)
def test_turns_are_found_by_prefixes(train_on: Any, learned: list[str], folder: Path) -> None:
    processor = processors.qwen()
    row = {"messages": conversation([str(folder / "30x20.png")])}
    sample = ChatDataset([row], processor, labels_shifted=False, train_on=train_on)[0]
    counted = sample["labels"] != -100
    assert torch.equal(sample["labels"][counted], sample["input_ids"][counted])
    assert processor.tokenizer.decode(sample["labels"][counted]) == "".join(learned)


def test_last_of_marked_turns() -> None:
    processor = processors.llava()
    sample = ChatDataset([{"messages": conversation([])}], processor, labels_shifted=False, train_on="last")[0]
    learned = sample["labels"][sample["labels"] != -100]
    assert processor.tokenizer.decode(learned) == "Two of them. "


def test_all_tokens_but_placeholders(folder: Path) -> None:
    processor = processors.llava()
    row = {"messages": conversation([str(folder / "30x20.png")])}
    sample = ChatDataset([row], processor, labels_shifted=False, train_on="all")[0]
    ignored = sample["input_ids"][sample["labels"] == -100].tolist()
    assert ignored == [1, *[processor.image_token_id] * 4], "the first token and the image's"


def test_labels_are_shifted_by_default() -> None:
    row = {"messages": conversation([])}
    plain = ChatDataset([row], processors.llava(), labels_shifted=False)[0]["labels"]
    shifted = ChatDataset([row], processors.llava())[0]["labels"]
    assert shifted.tolist() == [*plain[1:].tolist(), -100]


def test_both_forms_of_rows_give_the_same(folder: Path) -> None:
    text = "What is in the images?"
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
    answer = "A cat."
    images = ["30x20.png", "20x50.png"]
    rows = [
        {
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}],
            "images": images,
        },
        {
            "image": images,
            "conversations": [
                {"from": "human", "value": f"<image>\n<image>\n{text}"},
                {"from": "gpt", "value": answer},
            ],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "url": f"file://{folder / image}"} for image in images]},
                {"role": "assistant", "content": [{"type": "text", "text": answer, "image": None}]},
            ],
        },
    ]
    rows[2]["messages"][0]["content"].append(text)
    dataset = ChatDataset(rows, processors.qwen(), media_folder=folder)
    first, *others = [dataset[index] for index in range(3)]
    for other in others:
        assert torch.equal(other["input_ids"], first["input_ids"])
        assert torch.equal(other["labels"], first["labels"])
        for name, value in other["modality_inputs"]["images"]["vision"].items():
            assert torch.equal(value, first["modality_inputs"]["images"]["vision"][name])


def test_a_tokenizer_serves_text() -> None:
    tokenizer = processors.tokenizer(processors.QWEN_TOKENS, template=processors.CHATML_TEMPLATE)
    messages = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "A cat."}]
    sample = ChatDataset([{"messages": messages}], tokenizer, labels_shifted=False)[0]
    theirs = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert sample["input_ids"].tolist() == theirs["input_ids"]
    assert tokenizer.decode(sample["labels"][sample["labels"] != -100]) == "A cat.<|im_end|>\n"


def test_prompts_for_answers(folder: Path) -> None:
    processor = processors.llava()
    messages = conversation([Image.open(folder / "30x20.png")])
    answered = ChatDataset([{"messages": messages}], processor, for_generation=True)[0]
    open_ended = ChatDataset([{"messages": messages[:-1]}], processor, for_generation=True)[0]
    theirs = processor.apply_chat_template(messages[:-1], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert "labels" not in answered
    assert answered["input_ids"].tolist() == open_ended["input_ids"].tolist() == theirs["input_ids"][0]


def test_an_image_that_is_to_be_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    processors.image(20, 60).save(tmp_path / "a.jpg", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    assert upright.size == (20, 60)
    processor = processors.qwen()
    theirs = processor.apply_chat_template(
        conversation([upright]), tokenize=True, return_dict=True, return_tensors="pt"
    )
    dataset = ChatDataset([{"messages": conversation(["a.jpg"])}], processor, media_folder=tmp_path)
    assert dataset.load(0, {"language"})["input_ids"].tolist() == theirs["input_ids"][0].tolist()
    torch.testing.assert_close(
        dataset[0]["modality_inputs"]["images"]["vision"]["pixel_values"], theirs["pixel_values"], rtol=0, atol=0
    )


@says_what_it_puts
def test_frames_of_a_video_are_decoded_everywhere(folder: Path) -> None:
    processor = processors.qwen()
    frames = [str(folder / "30x20.png")] * 4
    parts = [{"type": "video", "video": frames}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    with pytest.warns(UserWarning, match=r"Qwen2VLProcessor does not tell .* of the kind video .*all ranks decode"):
        dataset = ChatDataset([{"messages": messages}], processor, labels_shifted=False)
    sample = dataset.load(0, {"language"})
    opened = [[Image.open(frame).convert("RGB") for frame in frames]]
    text = processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    theirs = processor(text=[text], videos=opened, return_tensors="pt")
    ids, labels = sample["input_ids"], sample["labels"]
    assert ids[: theirs["input_ids"].size(1)].tolist() == theirs["input_ids"][0].tolist()
    assert processor.tokenizer.decode(labels[labels != -100]) == "A cat.<|im_end|>\n"
    video = sample["modality_inputs"]["videos"]["vision"]
    assert torch.equal(video["video_grid_thw"], theirs["video_grid_thw"])
    torch.testing.assert_close(video["pixel_values_videos"], theirs["pixel_values_videos"], rtol=0, atol=0)


@says_what_it_puts
def test_sound_is_decoded_everywhere(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    processor = processors.qwen_audio()
    samples = np.random.default_rng(1).uniform(-1, 1, 3000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "other.wav", samples, 8000)
    parts = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    with pytest.warns(UserWarning, match="of the kind audio"):
        dataset = ChatDataset([{"messages": messages}], processor, labels_shifted=False, media_folder=tmp_path)
    sample = dataset.load(0, {"language"})
    text = processor.apply_chat_template(messages, tokenize=False)
    theirs = processor(text=[text], audio=[samples], sampling_rate=16000, return_tensors="pt")
    ids, labels = sample["input_ids"], sample["labels"]
    assert ids.tolist() == theirs["input_ids"][0].tolist()
    assert processor.tokenizer.decode(labels[labels != -100]) == "A cat.<|im_end|>\n"
    features = sample["modality_inputs"]["audio"]["encoder"]
    torch.testing.assert_close(features["input_features"], theirs["input_features"], rtol=0, atol=0)

    parts[0]["audio"] = "other.wav"
    with pytest.raises(
        DataError, match=r"content\[0\]\.audio: has 8000 samples a second, but the processor takes 16000"
    ):
        dataset.load(0, {"language"})


@says_what_it_puts
def test_tiles_with_text_between_them_are_decoded_everywhere(folder: Path) -> None:
    processor = processors.idefics3()
    paths = [f"{height}x{width}.png" for height, width in SIZES["several"]]
    opened = [Image.open(folder / path).convert("RGB") for path in paths]
    theirs = processor.apply_chat_template(
        conversation(opened),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
    )
    with pytest.warns(UserWarning, match="Idefics3Processor does not tell .* of the kind image"):
        dataset = ChatDataset([{"messages": conversation(paths)}], processor, media_folder=folder, labels_shifted=False)
    sample = dataset.load(0, {"language"})
    assert sample["input_ids"].tolist() == theirs["input_ids"][0].tolist()
    assert (sample["labels"] != -100).int().tolist() == list(theirs["assistant_masks"][0])
    for name, value in sample["modality_inputs"]["images"]["vision"].items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)


@says_what_it_puts
def test_decode_everywhere(folder: Path) -> None:
    row = {"messages": conversation([str(folder / "30x20.png")])}
    plain = ChatDataset([row], processors.llava())[0]
    with pytest.warns(UserWarning, match="of the kind image"):
        dataset = ChatDataset([row], processors.llava(), decode_everywhere=True)
    sample = dataset.load(0, {"language"})
    assert torch.equal(sample["input_ids"], plain["input_ids"])
    assert torch.equal(sample["labels"], plain["labels"])
    assert "pixel_values" in sample["modality_inputs"]["images"]["vision"]


@says_what_it_puts
def test_a_processor_whose_counts_are_wrong_is_run_in_full(folder: Path) -> None:
    """What it says of sizes is compared with what it makes, so an error of its own does no harm."""

    class Wrong(type(processors.llava_next())):
        def _get_num_multimodal_tokens(self, **options: Any) -> Any:
            return {"num_image_tokens": [7]}

    right = processors.llava_next()
    wrong = Wrong(
        right.image_processor,
        right.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=right.chat_template,
    )
    row = {"messages": conversation([str(folder / "20x50.png")])}
    with pytest.warns(UserWarning, match="all ranks decode"):
        dataset = ChatDataset([row], wrong)
    assert torch.equal(dataset.load(0, {"language"})["input_ids"], ChatDataset([row], right)[0]["input_ids"])


def test_ranks_that_encode_compare(folder: Path) -> None:
    """An image becomes another number of placeholders than its size had said."""
    row = {"messages": conversation([str(folder / "64x16.png")])}
    processor = processors.qwen()
    dataset = ChatDataset([row], processor)
    processor.image_processor.size = {"shortest_edge": 28**2, "longest_edge": 28**2}
    with pytest.raises(DataError, match=r"row 0, images: .*decode_everywhere=True"):
        dataset.load(0, {"images"})


def test_too_long_a_row_is_an_error_or_skipped(folder: Path) -> None:
    rows = [{"messages": conversation([])}, {"messages": conversation([str(folder / "20x50.png")] * 3)}]
    lengths = [len(sample["input_ids"]) for sample in ChatDataset(rows, processors.llava())]
    limit = lengths[0]
    with pytest.raises(DataError, match=rf"row 1, messages: {lengths[1]} tokens, .* are more than max_length={limit}"):
        ChatDataset(rows, processors.llava(), max_length=limit)
    with pytest.warns(UserWarning, match=rf"row 1: {lengths[1]} tokens.* it is skipped"):
        dataset = ChatDataset(rows, processors.llava(), max_length=limit, too_long="skip")
    sample = dataset[1]  # once is enough
    assert sample["labels"].tolist() == [-100]
    assert len(sample["input_ids"]) == 1
    assert sample["modality_inputs"] == {}
    assert len(dataset[0]["input_ids"]) == limit
    assert [dataset.length(index) for index in range(2)] == [limit, 1]


def test_no_placeholder_stands_for_a_sample_that_is_skipped(folder: Path) -> None:
    template = "{% for part in messages[0]['content'] %}{{ '<|image_pad|>' if part['type'] == 'image' }}{% endfor %}Yes"
    row = {"messages": conversation([str(folder / "20x50.png")])}
    options: dict[str, Any] = {"max_length": 2, "too_long": "skip", "train_on": "all", "chat_template": template}
    with pytest.warns(UserWarning, match="it is skipped"):
        (token,) = ChatDataset([row], processors.qwen(), **options)[0]["input_ids"].tolist()
    assert token == processors.qwen().tokenizer("Yes")["input_ids"][0]


def test_extra_keys() -> None:
    row = {"messages": conversation([]), "weight": 0.5, "id": 7}
    assert ChatDataset([row], processors.llava(), extra_keys=("weight",))[0]["weight"] == 0.5
    with pytest.raises(DataError, match="row 0, source: is missing"):
        ChatDataset([row], processors.llava(), extra_keys=("source",))


def test_places_of_inputs(folder: Path) -> None:
    row = {"messages": conversation([str(folder / "20x50.png")])}
    places = {"pixel_values": "pictures.vit.x", "image_sizes": None}
    sample = ChatDataset([row], processors.llava_next(), inputs=places).load(0, {"pictures"})
    assert list(sample["modality_inputs"]) == ["pictures"]
    assert list(sample["modality_inputs"]["pictures"]["vit"]) == ["x"]
    with pytest.raises(ConfigError, match=r"inputs\['pixel_values'\]='images' must have three parts"):
        ChatDataset([row], processors.llava(), inputs={"pixel_values": "images"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "user"}, r"train_on='user'; known are 'assistant', 'last', 'all'"),
        ({"too_long": "cut"}, r"too_long='cut'; known are 'error', 'skip'"),
        ({"too_long": "skip"}, r"too_long='skip' needs max_length"),
        ({"chat_template": "missing.jinja"}, r"chat_template='missing.jinja' is neither a template nor the path"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatDataset([{"messages": conversation([])}], processors.llava(), **options)


def test_a_processor_without_a_template() -> None:
    with pytest.raises(ConfigError, match="LlavaProcessor has no chat template"):
        ChatDataset([{"messages": conversation([])}], processors.llava(template=None))
    row = {"messages": conversation([])}
    given = ChatDataset([row], processors.llava(template=None), chat_template=processors.LLAVA_TEMPLATE)
    assert given[0]["input_ids"].tolist() == ChatDataset([row], processors.llava())[0]["input_ids"].tolist()


# What samples cost.


@pytest.mark.parametrize("name", PROCESSORS)
def test_costs_are_about_the_tokens_and_exactly_the_embeddings(name: str, folder: Path, no_pixels: None) -> None:
    rows = [
        {"messages": conversation([f"{height}x{width}.png" for height, width in sizes])} for sizes in SIZES.values()
    ]
    dataset = ChatDataset(rows, PROCESSORS[name](), media_folder=folder)
    cost = dataset.cost
    assert cost is not None
    for index, sizes in enumerate(SIZES.values()):
        ids = dataset.load(index, {"language"})["input_ids"]
        embeddings = int((ids == dataset._processor.placeholders["image"]).sum())
        assert cost(index).get("images", 0) == embeddings
        assert bool(embeddings) == bool(sizes)
        assert cost(index)["language"] == pytest.approx(len(ids), rel=0.2)


def test_costs_that_a_worker_found_are_known_to_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ChatDataset([{"messages": conversation(["30x20.png"])}] * 2, processors.qwen(), media_folder=folder)
    cost = dataset.cost
    assert cost is not None
    worker = multiprocessing.get_context("fork").Process(target=cost, args=(1,))
    worker.start()
    worker.join()
    found = dataset._costs._known[1].tolist()
    with monkeypatch.context() as patched:
        patched.setattr(dataset._rows, "read", None)
        assert cost(1) == {"language": found[0], "images": found[2]}
    # Both times the same number, and the same in every process.
    assert cost(0) == cost(0) == cost(1)
    assert pickle.loads(pickle.dumps(dataset._costs._known)).tolist() == [found, found]


def test_costs_by_count_open_no_file_and_may_be_left_out(folder: Path, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": conversation(["30x20.png", "not_there.png"])}]
    processor = processors.qwen()
    counted = ChatDataset(rows, processor, media_folder=folder, check_rows=0, costs_from="counts")
    assert counted.cost is not None
    assert counted.cost(0)["images"] == 2
    by_size = ChatDataset(rows, processor, media_folder=folder, check_rows=0)
    assert by_size.cost is not None
    with pytest.raises(DataError, match=r"row 0, messages\[0\]\.content\[2\]\.image: not_there\.png cannot be read"):
        by_size.cost(0)
    assert ChatDataset(rows, processor, check_rows=0, costs_from="none").cost is None
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert ChatDataset(tmp_path / "rows.parquet", processor, check_rows=0).cost is None, "its images would be read"
    with pytest.raises(ConfigError, match=r"costs_from='pixels'; known are 'auto', 'sizes', 'counts', 'none'"):
        ChatDataset(rows, processor, costs_from="pixels")
