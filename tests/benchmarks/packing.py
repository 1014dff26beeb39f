"""Packed rows against padded samples of lognormal lengths: what is computed, how even rows are, and tokens per second.

The first table counts what the loaders of eight language replicas give. The second trains a small Llama on the same
samples: packed and padded by this package, and by a plain loop around the model of transformers, with its collator that
flattens a batch into one row and with padding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

from lightning_mimo import MimoLayout, MimoModelInfra, MimoModule, MimoStrategy, ModuleParallelism
from lightning_mimo.data.collation import MicrobatchCollator, SampleRequest
from lightning_mimo.data.loader import shard_dataloader
from lightning_mimo.data.packing import Packing, pack_rows
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layout.batch_plan import RankBatchPlan
from lightning_mimo.models.gpt import gpt_spec
from lightning_mimo.models.sizes import TransformerSize
from tests.benchmarks.paired import compare
from tests.benchmarks.quiet import quiet_trainer
from tests.benchmarks.report import Cell, Report
from tests.parity.layouts import PoolEnvironment
from tests.support.rank_pool import RankPool

SIGMA, MEAN, LONGEST, IN_A_ROW = 0.8, 64, 16 * 64, 16
REPLICAS, BATCHES = 8, 50
SIZE = TransformerSize(
    num_layers=2, hidden_size=256, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=768, style="llama"
)
VOCABULARY = 256


class Texts(Dataset[dict[str, Any]]):
    """Texts of lognormal lengths."""

    def __init__(self, number: int, *, seed: int = 0) -> None:
        drawn = np.random.default_rng(seed).lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, number)
        self.lengths = np.clip(drawn, 2, LONGEST).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(1, VOCABULARY, (int(self.lengths[index]) + 1,), generator=generator)
        return {"input_ids": text[:-1], "labels": text[1:]}

    @property
    def budget(self) -> int:
        """16 mean lengths, as they were before they were cut."""
        return LONGEST


def counted(number: int, packs: bool) -> tuple[float, float]:
    """Positions computed over tokens used, and tokens of the fullest replica over the mean, of so many samples."""
    texts = Texts(number)
    layout = MimoLayout.resolve({"language": ModuleParallelism(dp=REPLICAS)}, world_size=REPLICAS)
    batch = REPLICAS if packs else REPLICAS * IN_A_ROW
    computed, used, by_replica = 0, 0, []
    for rank in range(REPLICAS):
        loader = shard_dataloader(
            DataLoader(texts, batch_size=batch, shuffle=True, drop_last=True),
            RankBatchPlan.build(layout, rank, global_batch_size=batch, num_microbatches=1),
            sample_format=SampleFormat(),
            seed=1,
            packing=Packing(budget=texts.budget, lengths=texts.lengths) if packs else None,
        )
        positions = [each["input_ids"].numel() for (each,) in loader]
        used += sum(sum(each["sample_lengths"]) for (each,) in loader)
        computed += sum(positions)
        by_replica.append(positions)
    work = np.array(by_replica)
    return computed / used, float((work.max(axis=0) / work.mean(axis=0)).mean())


def seconds_to_pack(number: int) -> float:
    """Of a sample."""
    texts = Texts(number)
    order = np.random.default_rng(1).permutation(number).tolist()
    began = time.perf_counter()
    pack_rows(order, Packing(budget=texts.budget, lengths=texts.lengths))
    return (time.perf_counter() - began) / number


def seconds_to_collate(packs: bool, repetitions: int) -> float:
    """Of a sample, read and checked and put together, but not made."""
    texts = Texts(IN_A_ROW)
    layout = MimoLayout.resolve({"language": ModuleParallelism()}, world_size=1)
    plan = RankBatchPlan.build(layout, 0, global_batch_size=1 if packs else IN_A_ROW, num_microbatches=1)
    collate = MicrobatchCollator(
        plan, SampleFormat(vocab_size=VOCABULARY), packing=Packing(budget=1, lengths=texts.lengths) if packs else None
    )
    both: Any = {"modules": frozenset({"language"}), "epoch": 0, "is_padding": False}
    loaded = [
        (
            SampleRequest(
                index=i, position=0 if packs else i, drawn=0 if packs else i, place=i if packs else 0, **both
            ),
            texts[i],
        )
        for i in range(IN_A_ROW)
    ]
    collate(loaded)
    began = time.perf_counter()
    for _ in range(repetitions):
        collate(loaded)
    return (time.perf_counter() - began) / repetitions / IN_A_ROW


class Llama(MimoModule):
    """A small language model."""

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        return MimoModelConfig(gpt_spec(infra, SIZE, vocab_size=VOCABULARY, max_sequence_length=LONGEST), {}, {})

    def configure_optimizers(self) -> Any:
        return self.build_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4))


class Clock(pl.Callback):
    """Seconds and tokens of all batches but the first."""

    def __init__(self) -> None:
        self.began, self.ended, self.tokens = 0.0, 0.0, 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ended = time.perf_counter()
        if not self.began:
            self.began = self.ended
            return
        for each in batch:
            lengths = zip(each["sample_lengths"], each["is_padding"], strict=True)
            self.tokens += sum(length for length, fills in lengths if not fills)


def ours(packs: bool, samples: int) -> float:
    """Seconds for a token that is used, under Trainer and MimoStrategy."""
    texts, clock = Texts(samples), Clock()
    batch = 1 if packs else IN_A_ROW
    strategy = MimoStrategy(
        {"language": ModuleParallelism()},
        batch,
        pack_to=texts.budget if packs else None,
        cluster_environment=PoolEnvironment(),
    )
    trainer = quiet_trainer(strategy, callbacks=[clock], max_epochs=1)
    trainer.fit(Llama(), DataLoader(texts, batch_size=batch))
    strategy.infra.destroy()
    return (clock.ended - clock.began) / clock.tokens


def theirs(flattens: bool, samples: int) -> float:
    """Seconds for a token that is used, in a plain loop around the model of transformers."""
    texts = Texts(samples)
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=SIZE.hidden_size,
            intermediate_size=SIZE.ffn,
            num_hidden_layers=SIZE.num_layers,
            num_attention_heads=SIZE.num_attention_heads,
            num_key_value_heads=SIZE.query_groups,
            max_position_embeddings=LONGEST * 2,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    flatten = DataCollatorWithFlattening()
    began, used = 0.0, 0
    for start in range(0, samples, IN_A_ROW):
        rows = [texts[index]["input_ids"].tolist() for index in range(start, start + IN_A_ROW)]
        inputs = flatten([{"input_ids": row} for row in rows]) if flattens else _padded(rows)
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        used += sum(map(len, rows)) if began else 0
        began = began or time.perf_counter()
    return (time.perf_counter() - began) / used


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.size(1)) < lengths.unsqueeze(1)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(mask, -100)}


def _compared(first: Callable[[], float], second: Callable[[], float], rounds: int) -> Any:
    """In a rank."""
    return compare(first, second, rounds=rounds)


def measure(pool: RankPool, *, quick: bool) -> Report:
    samples, rounds = (4 * IN_A_ROW, 1) if quick else (8 * IN_A_ROW, 3)
    rows: list[list[Cell]] = []
    details: dict[str, Any] = {}
    number = REPLICAS * IN_A_ROW * (4 if quick else BATCHES)
    for name, packs in (("padded", False), ("packed", True)):
        computed, slowest = counted(number, packs)
        rows += [
            [f"{name}: positions computed / tokens used", computed],
            [f"{name}: fullest of {REPLICAS} replicas / mean", slowest],
            [f"{name}: collation, us a sample", 1e6 * seconds_to_collate(packs, 20 if quick else 200)],
        ]
    texts = Texts(100_000)
    packed = pack_rows(range(len(texts)), Packing(budget=texts.budget, lengths=texts.lengths))
    rows.append(
        [f"budget of rows / tokens used, {IN_A_ROW} mean lengths", len(packed) * texts.budget / texts.lengths.sum()]
    )
    rows.append(["packer, us a sample", 1e6 * seconds_to_pack(100_000)])
    pairs = {
        "packed / padded": (partial(ours, True, samples), partial(ours, False, samples)),
        "packed / transformers, flattened": (partial(ours, True, samples), partial(theirs, True, samples)),
        "packed / transformers, padded": (partial(ours, True, samples), partial(theirs, False, samples)),
    }
    for name, pair in pairs.items():
        found = pool.run(_compared, *pair, rounds, world_size=1, timeout=1200)[0]
        speed = 1 / found.ratio
        rows.append([f"tokens used per second, {name}", speed])
        details[name] = {"first": found.a, "second": found.b, "tokens_per_second": 1 / float(np.median(found.a))}
    return Report(
        title=f"Packing: lognormal lengths, sigma {SIGMA}, mean {MEAN}, rows of {IN_A_ROW} mean lengths",
        columns=("what", "figure"),
        rows=rows,
        notes=(
            f"Padded: {IN_A_ROW} samples a replica and microbatch. Targets: computed / used at most 1.05 where padding "
            f"makes 2 to 3; the packer under 50 us a sample.",
            f"Tokens per second: a Llama of {SIZE.num_layers} layers, width {SIZE.hidden_size}, one rank, one thread, "
            f"float32, {rounds} rounds of A B B A. transformers: its model, its collator, torch's AdamW, no Trainer.",
        ),
        details=details,
    )
