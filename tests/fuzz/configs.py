"""Damaged configs: values of wrong types and ranges, removed and doubled keys, and text that is hardly YAML."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

BASE = """
seed_everything: 1
ckpt_path: null
trainer:
  accelerator: cpu
  devices: 2
  num_nodes: 1
  precision: 32-true
  max_steps: 2
  max_epochs: -1
  val_check_interval: 2
  check_val_every_n_epoch: null
  limit_val_batches: 1
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  accumulate_grad_batches: 1
  gradient_clip_val: null
  default_root_dir: logs
  logger: false
  callbacks: null
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  strategy:
    class_path: lightning_mimo.MimoStrategy
    init_args:
      modules:
        images: {tp: 1, cp: 1, pp: 1, dp: 1, ep: 1, expt_tp: 1}
        language: {tp: 1, pp: 1, dp: 1}
      colocate: false
      global_batch_size: 8
      num_microbatches: 1
      encoder_run_ahead: 0
      ddp:
        class_path: megatron.core.distributed.DistributedDataParallelConfig
        init_args: {overlap_grad_reduce: false}
      checks: {samples: first, on_nonfinite: raise}
      saving: {asynchronous: false, on_error: raise}
      monitoring: {telemetry: true, timeout: "0:10:00"}
model:
  class_path: examples.digits.model.DigitsModule
  init_args:
    vision: {num_layers: 2, hidden_size: 16, num_attention_heads: 4, ffn_hidden_size: 32, dropout: 0.0}
    language:
      num_layers: 2
      hidden_size: 16
      num_attention_heads: 4
      num_query_groups: 2
      ffn_hidden_size: 32
      style: gpt
      dropout: 0.1
      num_experts: null
      experts_per_token: 2
      attention: sdpa
      head_dim: 4
      layernorm_epsilon: 1.0e-5
      rotary_base: 10000.0
      recompute: null
    max_images: 2
    lr: 1.0e-3
    weight_decay: 0.01
    warmup_steps: 1
    clip_grad: 1.0
    frozen: []
    overrides: {images: {lr: 1.0e-4, weight_decay: 0.0}}
data:
  class_path: examples.digits.data.DigitsData
  init_args: {global_batch_size: 8, max_images: 2, num_workers: 0}
"""

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, "", "two", "null", "../..", "/etc/passwd", "\u0000", "x" * 10_000, "{", "${oc.env:HOME}"),
    *(-1, 0, 1, 3, 7, 10**6, 10**12, 2**63, 10**30, -(10**6)),
    *(0.5, -0.5, 1.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *(
        [],
        {},
        [1],
        [None],
        [[]],
        {"a": 1},
        {"class_path": "os.system"},
        {"class_path": "builtins.dict"},
        {"": 1},
        {1: 2},
    ),
)


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A damaged config.

    Attributes:
        what: was done to it.
        text: of the file.
    """

    what: str
    text: str


def damaged_configs(seed: int, number: int) -> Iterator[Damaged]:
    """Yield damaged configs; the same ones for the same seed."""
    draw = random.Random(seed)
    base = yaml.safe_load(BASE)
    places = list(_places(base))
    for i in range(number):
        if i % 5 == 4:
            yield _TEXTS[draw.randrange(len(_TEXTS))](draw)
            continue
        config = copy.deepcopy(base)
        what = [_change(config, draw.choice(places), draw) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        yield Damaged(what="; ".join(what), text=yaml.safe_dump(config, sort_keys=False))


def _places(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _places(value, (*path, key))


def _change(config: Any, path: tuple[Any, ...], draw: random.Random) -> str:
    name = ".".join(map(str, path))
    for key in path[:-1]:
        config = config.get(key)
        if not isinstance(config, dict):
            return f"nothing at {name}"
    how = draw.random()
    if how < 0.12:
        config.pop(path[-1], None)
        return f"{name} removed"
    if how < 0.2:
        config[f"{path[-1]}x"] = config.pop(path[-1], None)
        return f"{name} misspelled"
    value = draw.choice(HOSTILE)
    config[path[-1]] = copy.deepcopy(value)
    return f"{name}={str(value)[:40]!r}"


def _bomb(draw: random.Random) -> Damaged:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return Damaged(what="YAML bomb", text="\n".join(lines) + BASE)


def _self_reference(draw: random.Random) -> Damaged:
    place = draw.choice(["trainer: &a\n  callbacks: [*a]\n", "model: &a {b: *a}\n", "data: &a [*a]\n"])
    return Damaged(what=f"self-reference {place!r}", text=place)


def _doubled(draw: random.Random) -> Damaged:
    lines = BASE.splitlines()
    i = draw.choice([i for i, line in enumerate(lines) if line and ":" in line and line[-1] != ":"])
    return Damaged(what=f"line {lines[i].strip()!r} twice", text="\n".join([*lines[: i + 1], *lines[i:]]))


def _cut_off(draw: random.Random) -> Damaged:
    end = draw.randrange(len(BASE))
    return Damaged(what=f"cut off at {end}", text=BASE[:end])


def _flipped(draw: random.Random) -> Damaged:
    text = list(BASE)
    places = [draw.randrange(len(text)) for _ in range(draw.randrange(1, 6))]
    for i in places:
        text[i] = chr(draw.randrange(1, 300))
    return Damaged(what=f"characters {places} changed", text="".join(text))


def _nested(draw: random.Random) -> Damaged:
    return Damaged(what="deeply nested", text="trainer: " + "[" * 5_000 + "]" * 5_000)


def _emptied(draw: random.Random) -> Damaged:
    lines = [line for line in BASE.splitlines() if line.endswith(":")]
    line = draw.choice(lines)
    kept, skipping = [], False
    for each in BASE.splitlines():
        indent = len(each) - len(each.lstrip())
        skipping = skipping and indent > len(line) - len(line.lstrip())
        if not skipping:
            kept.append(each)
        skipping = skipping or each == line
    return Damaged(what=f"{line.strip()} is empty", text="\n".join(kept))


_TEXTS: tuple[Callable[[random.Random], Damaged], ...] = (
    _bomb,
    _self_reference,
    _doubled,
    _doubled,
    _cut_off,
    _cut_off,
    _flipped,
    _flipped,
    _nested,
    _emptied,
    _emptied,
)


def write(folder: Path, config: Damaged) -> Path:
    """Write a damaged config to a file."""
    path = folder / "config.yaml"
    path.write_text(config.text, errors="surrogatepass")
    return path
