"""Rules against the same done by hand on whole tensors, cut and uncut, forwards and backwards."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mimo.errors import CheckpointError, ConfigError
from lightning_mimo.mimo.initialization import cut_evenly
from lightning_mimo.weights.rules import (
    Concatenate,
    InterleaveGroups,
    PadVocabulary,
    Rename,
    Rule,
    RuleTable,
    Source,
    read_shard,
)


class Files:
    """Tensors in memory, in place of files; counts what is read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.numbers = 0

    def read(self, name: str, index: tuple[int | slice, ...]) -> torch.Tensor:
        found = self.tensors[name][index]
        self.numbers += found.numel()
        return found

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype


@dataclass(frozen=True)
class Shard:
    dim: int = 0
    stride: int = 1
    tp_rank: int = 0
    tp_size: int = 1


def source(name: str, *shape: int, **look: object) -> Source:
    return Source(name=name, shape=shape, **look)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(rule: Rule, files: Files, whole: torch.Tensor, *, dim: int, stride: int = 1, tp: int) -> None:
    """Every shard is that of the whole, nothing else is read, and the way back gives the files' tensors."""
    assert rule.shape == tuple(whole.shape)
    for rank in range(tp):
        found = read_shard(rule, files, Shard(dim, stride, rank, tp))
        assert torch.equal(found, cut_evenly(whole, dim=dim, stride=stride, rank=rank, size=tp))
    assert files.numbers <= sum(tensor.numel() for tensor in files.tensors.values())
    table = RuleTable([rule])
    table.check_files({name: tensor.shape for name, tensor in files.tensors.items()}, where="here")
    for name, tensor in files.tensors.items():
        assert torch.equal(table.gather(name, {rule.target: whole}.__getitem__), tensor)


@given(
    groups=st.sampled_from([2, 4, 8]), per_group=st.integers(1, 3), head=st.integers(1, 4), tp=st.sampled_from([1, 2])
)
def test_queries_keys_and_values_are_interleaved_by_group(groups: int, per_group: int, head: int, tp: int) -> None:
    q, k, v = numbers(groups * per_group * head, 6), numbers(groups * head, 6), numbers(groups * head, 6) + 1
    whole = torch.cat([q.view(groups, -1, 6), k.view(groups, -1, 6), v.view(groups, -1, 6)], dim=1).flatten(0, 1)
    sources = [source(name, *tensor.shape) for name, tensor in zip("qkv", (q, k, v), strict=True)]
    rule = InterleaveGroups("qkv", sources, groups=groups)
    check(rule, Files({"q": q, "k": k, "v": v}), whole, dim=0, tp=tp)


def test_biases_are_interleaved_like_weights() -> None:
    q, k, v = numbers(8), numbers(4), numbers(4) + 1
    whole = torch.cat([q.view(2, 4), k.view(2, 2), v.view(2, 2)], dim=1).flatten()
    rule = InterleaveGroups("qkv", [source("q", 8), source("k", 4), source("v", 4)], groups=2)
    check(rule, Files({"q": q, "k": k, "v": v}), whole, dim=0, tp=2)


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_gate_and_up_are_each_cut_on_their_own(tp: int) -> None:
    gate, up = numbers(6, 4), numbers(6, 4) + 1
    rule = Concatenate("fc1", [source("gate", 6, 4), source("up", 6, 4)])
    check(rule, Files({"gate": gate, "up": up}), torch.cat([gate, up]), dim=0, stride=2, tp=tp)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_vocabulary_is_padded_and_cut_again(tp: int) -> None:
    table = numbers(10, 3)
    whole = torch.cat([table, torch.zeros(6, 3)])
    check(PadVocabulary("embedding", source("table", 10, 3), rows=16), Files({"table": table}), whole, dim=0, tp=tp)


@pytest.mark.parametrize("dim", [0, 1])
def test_matrices_may_be_stored_transposed(dim: int) -> None:
    stored = numbers(6, 4)
    rule = Rename("weight", source("stored", 6, 4, transposed=True))
    check(rule, Files({"stored": stored}), stored.T, dim=dim, tp=2)


def test_kernels_of_convolutions_become_matrices() -> None:
    kernel = numbers(4, 3, 2, 2)
    for dim in (0, 1):
        rule = Rename("weight", source("kernel", 4, 3, 2, 2, flatten=True))
        found = Files({"kernel": kernel})
        whole = kernel.flatten(1)
        for rank in range(2):
            shard = read_shard(rule, found, Shard(dim, 1, rank, 2))
            assert torch.equal(shard, cut_evenly(whole, dim=dim, stride=1, rank=rank, size=2))
    assert torch.equal(RuleTable([rule]).gather("kernel", {"weight": whole}.__getitem__), kernel)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_may_be_stacked(transposed: bool) -> None:
    stacked = numbers(3, 6, 4)
    sources = [source("experts", 3, 6, 4, index=expert, transposed=transposed) for expert in range(3)]
    rules = [Rename(f"expert{i}", each) for i, each in enumerate(sources)]
    whole = {f"expert{i}": stacked[i].T if transposed else stacked[i] for i in range(3)}
    files = Files({"experts": stacked})
    for rule in rules:
        found = read_shard(rule, files, Shard(1, 1, 1, 2))
        assert torch.equal(found, whole[rule.target].chunk(2, dim=1)[1])
    assert torch.equal(RuleTable(rules).gather("experts", whole.__getitem__), stacked)


def test_rows_that_no_rule_uses_are_named() -> None:
    experts = [Rename("expert0", source("experts", 2, 6, 4, index=0))]
    with pytest.raises(CheckpointError, match=r"The rules use 0 rows of 'experts'; it has 6\."):
        RuleTable(experts)
    with pytest.raises(CheckpointError, match=r"use rows 0 to 4 of 'weight' twice"):
        RuleTable([Rename("a", source("weight", 4)), Rename("b", source("weight", 4))])
    with pytest.raises(CheckpointError, match="Two rules are about the parameter 'a'"):
        RuleTable([Rename("a", source("weight", 4)), Rename("a", source("other", 4))])


def test_tensors_that_do_not_fit_are_named() -> None:
    table = RuleTable([Rename("a", source("weight", 4))], kept=["unused.*"])
    table.check_files({"weight": (4,), "unused.bias": (2,)}, where="folder")
    with pytest.raises(ConfigError, match="folder: there is no tensor 'weight'"):
        table.check_files({}, where="folder")
    with pytest.raises(ConfigError, match=r"'weight' has the shape \(5,\), but config.json makes it \(4,\)"):
        table.check_files({"weight": (5,)}, where="folder")
    with pytest.raises(ConfigError, match="no rule is about 'x' and 1 more tensors"):
        table.check_files({"weight": (4,), "x": (1,), "y": (1,)}, where="folder")
    with pytest.raises(CheckpointError, match=r"No rule says what the parameter 'b' \(4,\) consists of"):
        table.check_parameters({"b": (4,)}, all_of=False)
    with pytest.raises(CheckpointError, match=r"'a' has the shape \(3,\), but its rule gives \(4,\)"):
        table.check_parameters({"a": (3,)}, all_of=False)
    with pytest.raises(CheckpointError, match="There is no parameter 'a'"):
        table.check_parameters({}, all_of=True)
