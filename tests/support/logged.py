"""What loggers of Lightning wrote to disk: every metric with its steps and values, in the order written."""

from __future__ import annotations

import csv
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

Logged = dict[str, list[tuple[int, float]]]
"""Metric -> (step, value), in the order written."""


def in_csv(folder: Path) -> Logged:
    found: Logged = {}
    with next(folder.rglob("metrics.csv")).open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if "/" in name and value:
                    found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def in_tensorboard(folder: Path) -> Logged:
    event = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    (file,) = folder.rglob("events.out.tfevents*")
    data, start, found = file.read_bytes(), 0, {}
    while start < len(data):  # TFRecord: length, its checksum, the event, its checksum
        end = start + 12 + struct.unpack_from("<Q", data, start)[0]
        read = event.FromString(data[start + 12 : end])
        for value in read.summary.value:
            if "/" in value.tag:
                found.setdefault(value.tag, []).append((read.step, value.simple_value))
        start = end + 4
    return found


def in_wandb(folder: Path) -> Logged:
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found: Logged = {}
    for data in _records(file.read_bytes()[7:], first_block=32768 - 7):
        record = protocol.Record.FromString(data)
        items = {"".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for name, value in items.items():
            if "/" in name and name != "trainer/global_step":
                found.setdefault(name, []).append((int(items["trainer/global_step"]), float(value)))
    return found


def _records(data: bytes, first_block: int) -> Iterator[bytes]:
    """Records of LevelDB's log format: checksum, length, and which part of a record it is, in blocks."""
    at, left, record = 0, first_block, b""
    while at < len(data):
        if left < 7:
            at, left = at + left, 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at, left = at + 7 + length, left - 7 - length
        if kind in (1, 4):
            yield record
            record = b""
