"""Which file each parameter starts from, what is refused, and the table that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_mimo import CheckpointError, ConfigError, MimoModule, ModuleParallelism
from lightning_mimo.checkpoint.initial import SEED, check_origins, draw_table, find_origins
from lightning_mimo.checkpoint.sources import source_of
from lightning_mimo.layout.layout import MimoLayout

HELD = {"images.encoders.vit.weight": (4, 2), "images.input_projections.0.weight": (2, 4), "language.head": (8,)}
LAYOUT = MimoLayout.resolve(
    {"images": ModuleParallelism(), "language": ModuleParallelism()}, world_size=1, colocate=True
)


@dataclass(frozen=True)
class Held:
    label: str
    shapes: Mapping[str, tuple[int, ...]]
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


STAGE_1 = Held("init_from='one'", {"images.input_projections.0.weight": (2, 4), "language.old": (5,)})
BASE = Held("base", {**HELD, "images.input_projections.0.weight": (9, 9)}, {"vision_tower.layers.23.weight": (3, 3)})


def test_first_source_that_holds_a_parameter_is_taken() -> None:
    origins = find_origins(HELD, [STAGE_1, BASE], [])
    assert list(origins.found.values()) == [1, 0, 1]
    check_origins(origins, [])
    table = draw_table(HELD, origins.found, [STAGE_1, BASE]).splitlines()
    assert [line.split("  ")[0] for line in table[2:]] == [
        "images.encoders",
        "images.input_projections",
        "language.head",
        "left out: language.old",
        "left out: vision_tower.layers",
    ]
    assert table[3].split()[-3:] == ["1", "8", "init_from='one'"]


def test_what_is_named_starts_from_the_seed() -> None:
    names = ["images.input_projections"]
    for sources in ([Held("file", {**HELD, "images.input_projections.0.weight": (9, 9)})], [BASE]):
        origins = find_origins(HELD, sources, names)
        assert origins.found["images.input_projections.0.weight"] == SEED
        check_origins(origins, names)
    assert ["images.input_projections", "1", "8", "the", "seed"] in [
        line.split() for line in draw_table(HELD, origins.found, [BASE]).splitlines()
    ]


@pytest.mark.parametrize(
    ("sources", "names", "message"),
    [
        ([STAGE_1], [], r"does not hold 'images.encoders.*\(and 1 more .*init_missing=\['images.encoders', 'lang"),
        ([BASE], [], r"base holds '.*' with the shape \(9, 9\), but this model has \(2, 4\)\. If .* init_missing="),
        ([Held("f", HELD)], ["images"], r"init_missing names 'images', but all of it is in the files\. Leave it out"),
        ([Held("f", HELD)], ["images.vit"], r"init_missing names 'images\.vit', but no parameter of the model lies"),
    ],
)
def test_what_starts_from_nothing_is_refused(sources: list[Held], names: list[str], message: str) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message):
        check_origins(find_origins(HELD, sources, names), names)


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises((CheckpointError, ConfigError), match=message):
            MimoModule(init_from=path).check_weights(LAYOUT)

    refused(tmp_path / "missing", r"init_from='.*missing': there is nothing at this path\. Give a checkpoint")
    refused(tmp_path, r"it has no checkpoint\.json")
    (tmp_path / "model.bin").write_bytes(b"")
    refused(tmp_path / "model.bin", r"neither a safetensors file nor a folder of them\. Pickles .* are not opened")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 20)
    refused(tmp_path / "bad.safetensors", r"bad\.safetensors cannot be read")
    (tmp_path / "bad.safetensors").unlink()
    for name in ("a", "b"):
        save_file({"language.head": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, r"a\.safetensors and b\.safetensors both hold 'language\.head'")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, r"is a folder of the Hugging Face hub.*HuggingFaceModule\(pretrained=")


def test_init_missing_is_checked_before_any_process_starts(tmp_path: Path) -> None:
    save_file({"language.head": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert source_of(tmp_path / "a.safetensors", argument="init_from").shapes == {"language.head": (2,)}
    with pytest.raises(ConfigError, match=r"init_from is not set"):
        MimoModule(init_missing=["images"]).check_weights(LAYOUT)
    with pytest.raises(ConfigError, match=r"there is no module 'audio'; the layout has 'images', 'language'"):
        MimoModule(init_from=tmp_path / "a.safetensors", init_missing=["audio"]).check_weights(LAYOUT)
    with pytest.raises(ConfigError, match=r"is a string; write \['images'\]"):
        MimoModule(init_missing="images")
