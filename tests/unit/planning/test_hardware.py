from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_mimo.errors import ConfigError
from lightning_mimo.planning.hardware import Link, load_hardware, shipped


@pytest.mark.parametrize("name", ["a100", "b200", "cpu", "h100", "h200"])
def test_shipped_files(name: str) -> None:
    hardware = load_hardware(name)
    assert name in shipped() and hardware.name == name
    assert len(hardware.sources) > 1 and any("assum" in source or "measured" in source for source in hardware.sources)
    assert hardware.peak("float32") > 1e9
    assert hardware.device_type == ("cpu" if name == "cpu" else "cuda")
    assert hardware.within_node.bandwidth >= hardware.between_nodes.bandwidth


def test_collectives() -> None:
    link = Link(bandwidth=1e9, latency=1e-3)
    assert link.seconds(1e9) == pytest.approx(1.001)
    assert link.all_gather(4e9, 4) == pytest.approx(2e-3 + 3)
    assert link.all_reduce(4e9, 4) == pytest.approx(2 * (2e-3 + 3))
    assert link.all_reduce(4e9, 1) == 0


_H100 = Path(__file__).parents[3] / "lightning_mimo/planning/hardware_data/h100.yaml"


def _changed(folder: Path, **changes: object) -> str:
    values = yaml.safe_load(_H100.read_text())
    values |= changes
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return str(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": None}, "lacks memory; a hardware file has the keys name, "),
        ({"speed": 3}, r"has unknown keys \(speed\)"),
        ({"launch": -1}, "launch=-1 must be a positive number"),
        ({"memory": "many"}, "memory='many' must be a positive number"),
        ({"flops": {"int8": 1e12}}, r"flops must map dtypes \(float32, bfloat16, float64\)"),
        ({"within_node": {"bandwidth": 1e9}}, "within_node must have the keys bandwidth and latency"),
        ({"device_type": "tpu"}, "device_type='tpu' is not one of cpu, cuda"),
        ({"matmul_efficiency": 1.2}, "matmul_efficiency=1.2 is a share of the peak, at most 1"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_hardware(_changed(tmp_path, **changes))


def test_own_file(tmp_path: Path) -> None:
    assert load_hardware(_changed(tmp_path, memory=40e9)).memory == 40e9


def test_no_such_hardware(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--hardware=h900: there is no such file and no such hardware; choose a100, b200"
    ):
        load_hardware("h900")
    file = tmp_path / "bad.yaml"
    file.write_text("a: [")
    with pytest.raises(ConfigError, match="is no YAML"):
        load_hardware(str(file))


def test_a_dtype_without_flops(tmp_path: Path) -> None:
    hardware = load_hardware(_changed(tmp_path, flops={"float32": 1e12}))
    with pytest.raises(ConfigError, match="has no flops for bfloat16; it has float32"):
        hardware.peak("bfloat16")
