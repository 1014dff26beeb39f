"""Seconds and memory to load a pretrained model of 2 GiB in several layouts, beside transformers on one rank.

Memory is what is the process's own, anonymous and shared, over what it held before it read. Pages of the files, which
the kernel may drop at any time, are not in it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from lightning_mimo import ModuleParallelism
from tests.benchmarks.report import Cell, Report
from tests.parity.layouts import Layout, open_world
from tests.support.rank_pool import RankPool
from tests.support.resident import PeakMemory

_MIB = 2**20
# 2 GiB in float32; 4 divides heads, groups, layers and the MLP's width.
_TEXT = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
_QUICK = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512}
# A language module alone has no pipeline, so it is that of a LLaVA, whose encoder is small.
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def _layout(**language: int) -> Layout:
    return Layout(modules={"images": ModuleParallelism(dp=1), "language": ModuleParallelism(**{"dp": 1, **language})})


LAYOUTS = {"tp=4": _layout(tp=4), "pp=4": _layout(pp=4), "dp=4": _layout(dp=4)}


def make_folder(folder: Path, sizes: dict[str, int]) -> int:
    """Write a LLaVA with random weights; returns the bytes of its files."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**sizes),
        image_token_index=sizes["vocab_size"] - 1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load(folder: Path, layout: Layout) -> tuple[float, int, int]:
    """Seconds, peak and bytes held on this rank. Collective over the world."""
    import torch
    import torch.distributed as dist

    from lightning_mimo.checkpoint.state import load_shards
    from lightning_mimo.mimo.model import build_mimo_model
    from lightning_mimo.models.hugging_face.decoder import BuildOptions
    from lightning_mimo.models.hugging_face.folder import read_config
    from lightning_mimo.models.hugging_face.registry import model_of
    from lightning_mimo.weights.files import SafetensorsFolder
    from lightning_mimo.weights.importing import PretrainedReader

    torch.set_num_threads(1)
    pretrained = model_of(read_config(folder))
    with open_world(layout) as infra:
        built = build_mimo_model(pretrained.mimo_config(infra, BuildOptions()), infra, seed=0, initialize=())
        dist.barrier()
        with PeakMemory() as memory:
            start = time.perf_counter()
            with SafetensorsFolder(folder) as files:
                table = pretrained.rules(files.shapes(), pretrained.padded_vocab_size(layout.modules["language"].tp))
                load_shards(built, infra, PretrainedReader(files, table), None)
            seconds = time.perf_counter() - start
            peak = memory.take()
        dist.barrier()
        return seconds, peak, _held(built)


def load_by_transformers(folder: Path) -> tuple[float, int, int]:
    """The same for transformers' own loading."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with PeakMemory() as memory:
        start = time.perf_counter()
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1)  # it maps files into memory; the first step of a training would read and copy them
        seconds = time.perf_counter() - start
        peak = memory.take()
    return seconds, peak, _held(model)


def _held(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def measure(pool: RankPool, *, quick: bool) -> Report:
    runs = 1 if quick else 3
    sizes = {**_TEXT, **(_QUICK if quick else {})}
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "llava")
        (size,) = pool.run(make_folder, folder, sizes, world_size=1, timeout=600)
        for title, layout in [("transformers, one process", None), *LAYOUTS.items()]:
            found = []
            for _ in range(runs):
                fresh = RankPool(layout.ranks if layout else 1)
                if layout is None:
                    found.append(fresh.run(load_by_transformers, folder, world_size=1, timeout=600))
                else:
                    # Rank 0 has the encoder.
                    found.append(fresh.run(load, folder, layout, world_size=layout.ranks, timeout=600)[1:])
                fresh.close()
            held = max(rank[2] for rank in found[0])
            over = max(rank[1] - rank[2] for run in found for rank in run)
            seconds = min(max(rank[0] for rank in run) for run in found)
            rows.append([title, seconds, held / _MIB, over / _MIB])
    largest = sizes["vocab_size"] * sizes["hidden_size"] * 4
    return Report(
        title=f"Loading a pretrained model of {size / _MIB:,.0f} MiB",
        columns=("layout of the language module", "seconds", "held MiB", "peak over held MiB"),
        rows=rows,
        notes=(
            f"held, peak: of the rank with the most. The largest tensor has {largest / _MIB:.0f} MiB.",
            f"seconds: of the slowest rank, best of {runs} runs, files in the page cache, one thread for each rank.",
        ),
    )
