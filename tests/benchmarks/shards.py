"""Samples a second that a rank reads from tar and parquet shards, with and without their images."""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from lightning_mimo.data import ParquetShards, ShardSampler, TarShards
from lightning_mimo.data.streams.dataset import StreamDataset
from lightning_mimo.data.streams.reader import Place, StreamReader
from tests.benchmarks.report import Cell, Report
from tests.support.rank_pool import RankPool
from tests.support.shards import write_tar

SHARDS, SAMPLES, SIZE, BATCH = 8, 128, 336, 64  # files, samples of each, pixels of a side
MODULES = {"with images": frozenset({"images"}), "text alone": frozenset({"language"})}


def decode(record: Any, modules: frozenset[str]) -> dict[str, Any]:
    sample = {"input_ids": torch.tensor(json.loads(record["json"]))}
    if "images" in modules:
        with Image.open(io.BytesIO(record["jpg"])) as image:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        sample["modality_inputs"] = {"images": {"vit": {"pixel_values": pixels.unsqueeze(0)}}}
    return sample


def write(folder: Path) -> int:
    """Write the same samples as tar and parquet. Returns the mean size of an image in bytes."""
    draw = np.random.default_rng(0)
    sizes = []
    for shard in range(SHARDS):
        rows = []
        for _ in range(SAMPLES):
            small = Image.fromarray(draw.integers(0, 256, (21, 21, 3), np.uint8))
            file = io.BytesIO()
            small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
            rows.append({"json": json.dumps(draw.integers(0, 32000, 300).tolist()).encode(), "jpg": file.getvalue()})
            sizes.append(len(rows[-1]["jpg"]))
        write_tar(folder / f"{shard}.tar", [(f"{shard}-{number}", row) for number, row in enumerate(rows)])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard}.parquet", row_group_size=64)
    return round(statistics.mean(sizes))


def measure(pool: RankPool, *, quick: bool) -> Report:
    rounds = 1 if quick else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write(folder)
        datasets = {
            "tar": TarShards(f"{folder}/*.tar", decode),
            "parquet, row groups of 64": ParquetShards(f"{folder}/*.parquet", decode),
        }
        rows: list[list[Cell]] = []
        for kind, dataset in datasets.items():
            order = list(ShardSampler(dataset))
            for what, modules in MODULES.items():
                rows.append([kind, what, *_rates(partial(_read, dataset, order, modules), len(order), rounds)])
        rows.append(["tar as a stream", "not decoded", *_rates(partial(_stream, datasets["tar"]), len(order), rounds)])
        begun = time.perf_counter()
        TarShards(f"{folder}/*.tar", decode)
        index = (time.perf_counter() - begun) / len(order)
    return Report(
        title=f"Reading shards: samples a second of one process, images of {SIZE} * {SIZE} pixels and {size} bytes",
        columns=("shards", "of a sample", "median", "least", "most"),
        rows=rows,
        notes=(f"The index of a tar shard takes {index * 1e6:.0f} microseconds a sample, once.",),
        details={"index_seconds_per_sample": index, "bytes_per_image": size},
    )


def _rates(read: Callable[[], object], number: int, rounds: int) -> list[float]:
    read()  # into the cache of files
    rates = []
    for _ in range(rounds):
        begun = time.perf_counter()
        read()
        rates.append(number / (time.perf_counter() - begun))
    return [statistics.median(rates), min(rates), max(rates)]


def _read(dataset: Any, order: list[int], modules: frozenset[str]) -> None:
    for index in order:
        dataset.load(index, modules)


def _stream(dataset: Any) -> None:
    source = [dict(dataset[number]) for number in range(len(dataset))]
    for _ in StreamReader(StreamDataset(source), batch_size=BATCH, drop_last=False, seed=1).read(Place()):
        pass
