"""Rows of every kind, and every row that cannot be used is named with its field."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_mimo.data.chat.conversation import read_conversation
from lightning_mimo.data.chat.rows import Row, open_rows, shard_lengths_of
from lightning_mimo.errors import ConfigError, DataError
from tests.support.shards import write_tar

QUESTION = {"role": "user", "content": "Yes?"}
ANSWER = {"role": "assistant", "content": "A cat."}
ROWS = [{"messages": [QUESTION, ANSWER], "number": number} for number in range(5)]


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def as_parquet(folder: Path) -> Any:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_list(folder: Path) -> Any:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return str(folder / "rows.json")


def as_pattern(folder: Path) -> Any:
    write_lines(folder / "b.jsonl", ROWS[2:])
    write_lines(folder / "a.jsonl", ROWS[:2])
    return f"{folder}/*.jsonl"


def as_files(folder: Path) -> Any:
    return [write_lines(folder / "z.jsonl", ROWS[:3]), write_lines(folder / "a.jsonl", ROWS[3:])]


def as_tar(folder: Path) -> Any:
    for shard, rows in enumerate((ROWS[:2], ROWS[2:])):
        samples = [(f"{shard}-{row['number']}", {"json": json.dumps(row).encode()}) for row in rows]
        write_tar(folder / f"rows-{shard}.tar", samples)
    return f"{folder}/rows-{{0..1}}.tar"


def as_dataset(folder: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(ROWS)


def as_saved_dataset(folder: Path) -> Any:
    as_dataset(folder).save_to_disk(folder / "saved", num_proc=None)
    return folder / "saved"


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: ROWS,
        lambda folder: write_lines(folder / "rows.jsonl", ROWS),
        as_list,
        as_parquet,
        as_pattern,
        as_files,
        as_tar,
        as_dataset,
        as_saved_dataset,
    ],
    ids=["sequence", "jsonl", "json", "parquet", "pattern", "files", "tar", "dataset", "saved dataset"],
)
def test_rows_of_every_kind(make: Any, tmp_path: Path) -> None:
    rows = open_rows(make(tmp_path))
    assert len(rows) == 5
    assert [rows.read(index).value for index in (3, 0, 4, 1, 2)] == [ROWS[index] for index in (3, 0, 4, 1, 2)]


def test_images_in_tar_shards_are_found_beside_their_row(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    from lightning_mimo.data.chat.media import image_size

    files = {}
    for number in range(2):
        file = io.BytesIO()
        image.new("RGB", (4 + number, 3)).save(file, "png")
        files[f"{number}.png"] = file.getvalue()
    texts = [{"from": "human", "value": "<image><image>Which?"}, {"from": "gpt", "value": "Both."}]
    rows = [
        {"conversations": texts},  # all that there are
        {"conversations": texts, "image": ["1.png", "0.png"]},  # by their endings
        {"conversations": texts, "image": ["x2.1.png", "images/x2.0.png"]},  # by their names
    ]
    samples = [(f"x{number}", {"json": json.dumps(row).encode(), **files}) for number, row in enumerate(rows)]
    opened = open_rows(write_tar(tmp_path / "a.tar", samples))
    widths = []
    for number in range(3):
        conversation = read_conversation(opened.read(number), is_used=lambda key: False)
        widths.append([image_size(conversation, media).width for media in conversation.media])
    assert widths == [[4, 5], [5, 4], [5, 4]]
    assert shard_lengths_of(opened) == (3,)
    write_tar(tmp_path / "b.tar", [("x", {"txt": b"1"})])
    with pytest.raises(DataError, match=r"b.tar, sample 'x', has no .json file .* \['txt'\]"):
        open_rows(tmp_path / "b.tar").read(0)


def test_rows_have_shards_only_where_order_matters(tmp_path: Path) -> None:
    assert shard_lengths_of(open_rows(as_pattern(tmp_path))) is None
    assert shard_lengths_of(open_rows([as_tar(tmp_path), tmp_path / "a.jsonl", as_parquet(tmp_path)])) == [2, 3, 2, 5]


def test_rows_say_where_they_are(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]))
    rows = open_rows(file)
    assert len(rows) == 2
    assert rows.read(1).where == f"{file}, row 1 (line 4)"
    assert rows.read(1).folder == tmp_path
    assert open_rows(ROWS).read(3).where == "row 3"


def test_images_of_datasets_are_not_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), "image": datasets.Image(), "text": datasets.Value("string")}
    )
    picture = image.new("RGB", (4, 3))
    dataset = datasets.Dataset.from_list([{"images": [picture], "image": picture, "text": "a"}], features=features)
    value = open_rows(dataset).read(0).value
    assert image.open(io.BytesIO(value["image"]["bytes"])).size == (4, 3)
    assert set(value["images"][0]) == {"bytes", "path"}
    assert not isinstance(dataset[0]["image"], dict), "the user's own is as it was"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("{}/none.jsonl", ConfigError, r"There is no file '.*none.jsonl'"),
        ("{}/*.jsonl", ConfigError, r"There is no file that matches '.*\*.jsonl'"),
        ("{}", ConfigError, r"is a folder, but none of datasets.Dataset.save_to_disk"),
        ("{}/rows.csv", ConfigError, r"ends in '.csv'; conversations are in .jsonl, .json, .parquet, .tar"),
        ("{}/rows.json", DataError, r"rows.json holds a dict, but must hold a list of rows"),
        ({"messages": []}, ConfigError, r"are a dict, but must be a path"),
        (7, ConfigError, r"are a int, but must be a path"),
    ],
)
def test_sources_that_cannot_be_read(source: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(error, match=message):
        open_rows(source.format(tmp_path) if isinstance(source, str) else source)


def test_lines_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1\n[1]\n')
    rows = open_rows(file)
    with pytest.raises(DataError, match=r"rows.jsonl, row 0 \(line 1\) is no JSON: Expecting"):
        rows.read(0)
    with pytest.raises(DataError, match=r"row 1 \(line 2\) is a list, but must be a dict"):
        rows.read(1)
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"nothing")
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"rows.parquet cannot be read as parquet"):
        open_rows(file)


def test_splits_of_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="are a DatasetDict, but every rank must be able to read any row"):
        open_rows(datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}))
    with pytest.raises(ConfigError, match="are a IterableDataset"):
        open_rows(datasets.Dataset.from_list(ROWS).to_iterable_dataset())


def read(value: dict[str, Any]) -> Any:
    return read_conversation(Row(value=value, where="row 7", folder=Path()), is_used=lambda key: key == "name")


def of_one(content: Any, **fields: Any) -> Any:
    return read({"messages": [{"role": "user", "content": content}], **fields})


def kinds(conversation: Any) -> list[str]:
    """``image``, or the text, of the parts of the first message."""
    return [part.get("text", part["type"]) for part in conversation.messages[0]["content"]]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>\nWhat?", ["image", "What?"]),
        ("What?\n<image>", ["What?", "image"]),
        ("<image>\n<image>\nWhat?", ["image", "image", "What?"]),
        ("See <image> and <image>.", ["See ", "image", " and ", "image", "."]),
        ("Write <video> and <audio> in HTML.", ["Write <video> and <audio> in HTML."]),
    ],
)
def test_placeholders_in_strings(text: str, parts: list[str]) -> None:
    paths = [f"{number}.png" for number in range(text.count("<image>"))]
    conversation = of_one(text, images=paths)
    assert kinds(conversation) == parts
    assert [media.source for media in conversation.media] == paths


def test_videos_and_sounds_in_strings() -> None:
    conversation = of_one("<video><audio>\nWhat?", video=["0.png", "1.png"], audios=["a.wav"])
    assert kinds(conversation) == ["video", "audio", "What?"]
    assert [media.source for media in conversation.media] == [["0.png", "1.png"], "a.wav"]
    assert [media.field for media in conversation.media] == ["video", "audios[0]"]


def test_sources_of_images() -> None:
    picture = base64.b64encode(b"picture").decode()
    parts = [
        {"type": "image", "image": "0.png"},
        {"type": "image", "path": "1.png", "text": None},
        {"type": "image_url", "image_url": {"url": "2.png"}},
        {"type": "image", "base64": picture},
        {"type": "image"},
    ]
    conversation = of_one(parts, image="3.png")
    sources = ["0.png", "1.png", "2.png", f"data:;base64,{picture}", "3.png"]
    assert [media.source for media in conversation.media] == sources
    assert conversation.media[2].field == "messages[0].content[2].image_url"


def test_messages_keep_what_the_template_looks_at() -> None:
    conversation = read({"messages": [{**QUESTION, "name": "Ada", "time": None}, ANSWER], "tools": [{"a": 1}]})
    assert conversation.messages[0]["name"] == "Ada"
    assert conversation.tools == [{"a": 1}]
    assert conversation.answers == [1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "a"}, r"row 7 has the fields \['text'\], but must have one of 'messages' and 'conversations'"),
        ({"messages": [QUESTION], "conversations": [QUESTION]}, r"row 7 has both 'messages' and 'conversations'"),
        ({"messages": []}, r"row 7, messages: is \[\], but must be a list of at least one message"),
        ({"messages": "Yes?"}, r"row 7, messages: is 'Yes\?', but must be a list"),
        ({"messages": ["Yes?"]}, r"row 7, messages\[0\]: is 'Yes\?', but must be a dict with 'role' and 'content'"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]: has the keys \['content'\].* one of 'role' and 'from'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: has the keys \['role'\].* one of 'content' and 'value'"),
        (
            {"messages": [{"role": "boss", "content": "a"}]},
            r"messages\[0\]\.role: is 'boss'; known are system, .*, gpt",
        ),
        ({"conversations": [{"from": 1, "value": "a"}]}, r"conversations\[0\]\.from: is 1; known are"),
        ({"messages": [{**QUESTION, "weight": 0}]}, r"messages\[0\]\.weight: is a key that the chat template does not"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            r"messages\[0\]\.content: is 5, but must be a string or a list",
        ),
        ({"messages": [{"role": "user", "content": [5]}]}, r"content\[0\]: is 5, but must be a dict with 'type'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"content\[0\]\.text: is None, but must be a string",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "smell"}]}]},
            r"content\[0\]\.type: is 'smell'; known are text, image, video, audio",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a", "url": "b"}]}]},
            r"content\[0\]: has 'image' and 'url'. Leave one of them out",
        ),
        ({"messages": [QUESTION], "image": "a", "images": ["b"]}, r"row 7, image: stands beside 'images'"),
        (
            {"messages": [{"role": "user", "content": "<image>"}]},
            r"messages: has 1 placeholders <image>, but the row has 0 in 'image' or 'images'",
        ),
        (
            {"conversations": [{"from": "human", "value": "Yes?"}], "image": "a.png"},
            r"conversations: has 0 placeholders <image>, but the row has 1 in",
        ),
    ],
)
def test_rows_that_cannot_be_used(value: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(value)
