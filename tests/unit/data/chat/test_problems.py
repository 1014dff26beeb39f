"""Images, templates and numbers of placeholders that cannot be used: each is named with its row and field."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_mimo.data import ChatDataset
from lightning_mimo.data.packages import require
from lightning_mimo.errors import ConfigError, DataError

pytest.importorskip("transformers")
pytest.importorskip("torchvision", reason="transformers' processors of videos need it")

from tests.support import processors

ANSWER = {"role": "assistant", "content": "A cat."}


def with_image(source: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image", "image": source}]}, ANSWER]}


def with_text(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    encoded = io.BytesIO()
    processors.image(40, 60).save(encoded, "PNG")
    (tmp_path / "whole.png").write_bytes(encoded.getvalue())
    (tmp_path / "cut.png").write_bytes(encoded.getvalue()[:3000])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.png", r"none.png cannot be read: .*No such file"),
        ("text.png", r"text.png cannot be read: cannot identify image file"),
        (b"no image", r"bytes cannot be read: cannot identify image file"),
        ("http://example.com/a.png", r"is http://example.com/a.png. Training opens local files only"),
        (5, r"is a int, but must be a path, bytes, or what Pillow has opened"),
        ("data:image/png;base64,???", r"data:image/png;base64,\?\?\? cannot be read"),
    ],
)
def test_images_are_checked_before_training(source: Any, message: str, folder: Path) -> None:
    field = r"row 1, messages\[0\]\.content\[0\]\.image: "
    with pytest.raises(DataError, match=field + message):
        ChatDataset([with_text("Yes?", "A cat."), with_image(source)], processors.llava(), media_folder=folder)


def test_an_image_that_is_cut_is_found_where_it_is_encoded(folder: Path) -> None:
    dataset = ChatDataset([with_image("cut.png")], processors.llava(), media_folder=folder)
    assert len(dataset.load(0, {"language"})["input_ids"]) > 4
    with pytest.raises(
        DataError, match=r"row 0, messages\[0\]\.content\[0\]\.image: cut.png cannot be read: .*truncated"
    ):
        dataset.load(0, {"images"})


def test_later_rows_are_checked_on_request(folder: Path) -> None:
    rows = [with_image("whole.png")] * 3 + [with_image("none.png")]
    dataset = ChatDataset(rows, processors.llava(), media_folder=folder, check_rows=3)
    with pytest.raises(DataError, match=r"row 3, .*none.png cannot be read"):
        dataset.load(3, {"language"})
    with pytest.raises(DataError, match=r"row 3, .*none.png cannot be read"):
        ChatDataset(rows, processors.llava(), media_folder=folder, check_rows=None)


def test_images_of_other_kinds(folder: Path) -> None:
    content = (folder / "whole.png").read_bytes()
    opened = processors.image(40, 60)
    sources: list[Any] = ["whole.png", folder / "whole.png", content, {"bytes": content, "path": None}, opened]
    samples = list(ChatDataset([with_image(each) for each in sources], processors.qwen(), media_folder=folder))
    for sample in samples[1:]:
        pixels = [each["modality_inputs"]["images"]["vision"]["pixel_values"] for each in (samples[0], sample)]
        assert pixels[0].equal(pixels[1])


def test_an_image_that_the_processor_refuses() -> None:
    with pytest.raises(DataError, match=r"image: 2 \* 600 pixels: absolute aspect ratio must be smaller than 200"):
        ChatDataset([with_image(processors.image(2, 600))], processors.qwen())


def test_a_video_is_given_as_frames() -> None:
    parts = [{"type": "video", "path": "a.mp4"}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWER]}
    with pytest.warns(UserWarning, match="of the kind video"):
        dataset = ChatDataset([row], processors.qwen())
    with pytest.raises(DataError, match=r"content\[0\]\.path: is the file a.mp4, but a video is given as a list"):
        dataset.load(0, {"language"})


def test_text_cannot_write_placeholders() -> None:
    content = [{"type": "text", "text": "What is <image>?"}]
    row = {"messages": [{"role": "user", "content": content}, ANSWER]}
    with pytest.raises(
        DataError, match=r"row 0, messages: the text has 1 tokens '<image>', but there are 0 of the kind"
    ):
        ChatDataset([row], processors.llava())


def test_a_template_must_write_all_placeholders() -> None:
    template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"image: the text has 0 tokens '<image>', but there are 1"):
        ChatDataset([with_image(processors.image(8, 8))], processors.llava(template=template), train_on="all")


def test_keys_that_the_template_does_not_look_at() -> None:
    row = with_text("Yes?", "A cat.")
    row["messages"][0]["type"] = "image"  # a word of the template
    row["messages"][0]["pad"] = 1  # a part of one
    with pytest.raises(DataError, match=r"messages\[0\]\.pad: is a key that the chat template does not look at"):
        ChatDataset([row], processors.qwen())


def test_nothing_to_learn() -> None:
    with pytest.raises(DataError, match="row 0, role: none of the messages is the assistant's"):
        ChatDataset([with_text("Yes?")], processors.qwen())


def test_turns_that_cannot_be_found() -> None:
    """A template that leaves out what was said before, as those of some models do with what they thought."""
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}"
        "{% if loop.last or message['role'] == 'user' %}{{ message['content'][0]['text'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    row = with_text("Yes?", "A cat.", "A dog?", "Two.")
    with pytest.raises(DataError, match=r"row 0, message 1: the assistant's turn cannot be found .* {% generation %}"):
        ChatDataset([row], processors.qwen(), chat_template=template)
    sample = ChatDataset([row], processors.qwen(), chat_template=template, train_on="last", labels_shifted=False)[0]
    assert processors.qwen().tokenizer.decode(sample["labels"][sample["labels"] != -100]) == "Two."


def test_a_template_that_fails() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="row 0, messages: the chat template cannot render them: roles must alternate"):
        ChatDataset([with_text("Yes?", "A cat.")], processors.llava(template=template))


def test_a_tokenizer_takes_no_images() -> None:
    tokenizer = processors.tokenizer([], template=processors.CHATML_TEMPLATE)
    with pytest.raises(DataError, match=r"image: is no text, but the processor is a tokenizer"):
        ChatDataset([with_image("a.png")], tokenizer)


def test_inputs_without_a_place(folder: Path) -> None:
    """An output that nothing is known of is not dropped."""
    processor = processors.llava_next()
    dataset = ChatDataset([with_image("whole.png")], processor, media_folder=folder)
    del dataset._places["image_sizes"]
    with pytest.raises(
        DataError, match=r"makes 'image_sizes' of it, for which there is no place. .*inputs={'image_sizes'"
    ):
        dataset.load(0, {"images"})


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ConfigError, match="There are no conversations"):
        ChatDataset(tmp_path / "rows.jsonl", processors.llava())


def test_folders_of_processors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"processor='missing' is no folder. Give the folder of a model"):
        ChatDataset([with_text("Yes?", "A cat.")], "missing")
    with pytest.raises(ConfigError, match=rf"processor='{tmp_path}': "):
        ChatDataset([with_text("Yes?", "A cat.")], tmp_path)
    processors.llava().save_pretrained(tmp_path)
    saved = ChatDataset([with_text("Yes?", "A cat.")], tmp_path)[0]
    assert saved["input_ids"].equal(ChatDataset([with_text("Yes?", "A cat.")], processors.llava())[0]["input_ids"])


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"This needs the package no_such_package, .*: pip install 'such'"):
        require("no_such_package.part", what="This", install="such")
    processors.llava().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"A processor needs the package transformers, .* 'lightning-mimo\[hf\]'"):
        ChatDataset([with_text("Yes?", "A cat.")], tmp_path)
