"""Floating-point operations of each module: counted once with torch's formulas, then computed from the microbatches.

Counting sends every operation through Python, so it is done in one batch only. Its result gives two rates for each
module: operations per row (matrix products and convolutions) and per pair of positions that attend to each other.
"""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import flop_registry

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch, Ragged
from lightning_mimo.observe.spans import BACKWARD, COMPUTING, Spans
from lightning_mimo.upstream.torch import TorchDispatchMode


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object) -> int:
    """Two products, of queries and keys and of scores and values, for every head of the queries."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (width + value.shape[-1])


def _attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
) -> int:
    """Five products: the scores again, and the gradients of scores, queries, keys and values."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (3 * width + 2 * value.shape[-1])


_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
_OF_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{suffix}"): formula
    for kernel in _KERNELS
    for suffix, formula in (("", _attention), ("_backward", _attention_backward))
}
FLOP_FORMULAS: Mapping[Any, Callable[..., int]] = ChainMap(_OF_ATTENTION, flop_registry)
"""Operation -> formula of its floating-point operations: torch's, but for attention, where torch 2.11 has none for its
kernel on CPUs, and refuses fewer key heads than query heads."""

_BATCHED = ("bmm", "baddbmm")
_PACKED = "varlen_attn"  # in the names of kernels for packed sequences


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one module has to do on a rank in some microbatches.

    Attributes:
        rows: positions of the language module, padding included; for an encoder, numbers in its inputs, or on pipeline
            stages that load none, its embeddings.
        pairs: pairs of positions that attend to each other, before a causal mask.
    """

    rows: float = 0.0
    pairs: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(rows=self.rows + other.rows, pairs=self.pairs + other.pairs)


def work_of(microbatch: Microbatch, name: str) -> Work:
    """The work of a module in a microbatch, from shapes and from counts on the host. Reads no tensor.

    For an encoder, embeddings of a sample are divided evenly over its items.
    """
    if name == LANGUAGE:
        samples, length = microbatch["input_ids"].shape
        sequences = microbatch["sample_lengths"] if microbatch["is_packed"] else [length] * samples
        return Work(rows=samples * length, pairs=sum(each**2 for each in sequences))
    counts = microbatch["modality_counts"][name]
    own = [(tokens, items) for tokens, items in zip(counts.own_placeholders, counts.items, strict=True) if items]
    inputs = microbatch["modality_inputs"].get(name) or {}
    numbers = sum(_numel(value) for arguments in inputs.values() for value in arguments.values())
    return Work(
        rows=(numbers or sum(tokens for tokens, _ in own)) if own else 0.0,
        pairs=sum(tokens**2 / items for tokens, items in own),
    )


def _numel(value: torch.Tensor | Ragged) -> int:
    tensor = value.values if isinstance(value, Ragged) else value
    return tensor.numel() if tensor.is_floating_point() else 0


class ModuleFlops:
    """Operations of the modules of a rank, forward and backward, as its GPU has to execute them.

    What is computed again (recomputation of activations, scores of attention in the backward pass) is not counted.
    Kernels of attention that leave out what a causal mask hides count half. Frozen weights have no gradient to compute.
    """

    def __init__(self, names: Sequence[str], spans: Spans) -> None:
        """
        Args:
            names: modules of this rank.
            spans: this rank's recorder, which knows the module that computes.
        """
        self._names = names
        self._spans = spans
        self._rates: dict[str, tuple[float, float]] = {}  # operations per row and per pair
        self._counter: _Counter | None = None

    def counting(self) -> AbstractContextManager[object]:
        """Enclose the forward and backward passes of a batch. Counts if a module of this rank has no rates yet."""
        is_complete = len(self._rates) == len(self._names)
        self._counter = None if is_complete else _Counter(self._spans)
        return self._counter or nullcontext()

    def of_batch(self, microbatches: Sequence[Microbatch]) -> Mapping[str, float]:
        """Operations of each module in the batch that was enclosed last.

        Args:
            microbatches: of the batch, with what pipeline stages have been told in it.
        """
        flops = {}
        for name in self._names:
            work = sum((work_of(each, name) for each in microbatches), Work())
            if self._counter is not None and name not in self._rates and work.rows:
                counted = self._counter.counts[name]
                per_pair = counted.of_pairs / work.pairs if work.pairs else 0.0
                self._rates[name] = counted.of_rows / work.rows, per_pair + counted.per_pair / len(microbatches)
            linear, attention = self._rates.get(name, (0.0, 0.0))
            flops[name] = linear * work.rows + attention * work.pairs
        self._counter = None
        return flops


@dataclass(kw_only=True)
class _Counts:
    """Operations of one module.

    Attributes:
        of_rows: of matrix products and convolutions.
        of_pairs: of products of one position with another.
        per_pair: the same of kernels for packed sequences, whose lengths the host does not know, for each pair.
    """

    of_rows: float = 0.0
    of_pairs: float = 0.0
    per_pair: float = 0.0


class _Counter(TorchDispatchMode):
    """Counts the operations that are executed while it is active, for the module whose span is open.

    Attributes:
        counts: module -> its operations.
    """

    supports_higher_order_operators = True

    def __init__(self, spans: Spans) -> None:
        super().__init__()
        self.counts: defaultdict[str, _Counts] = defaultdict(_Counts)
        self._spans = spans
        self._depth = 0  # of modules whose forward() runs

    def __enter__(self) -> _Counter:
        self._hooks = [
            register_module_forward_pre_hook(self._begin),
            register_module_forward_hook(self._end, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: object) -> None:
        self._depth += 1

    def _end(self, *_: object) -> None:
        self._depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _is_counted(func):
            return result
        work = self._spans.innermost
        if work is None or work.kind not in COMPUTING or (work.kind == BACKWARD and self._depth > 0):
            return result  # in a backward pass, modules run to compute activations again
        operation = getattr(func, "_overloadpacket", func)
        counts, name = self.counts[work.module], getattr(operation, "__name__", "")
        if _PACKED in name:
            counts.per_pair += _per_pair_of_packed(func, name, args, kwargs)
        else:
            flops = FLOP_FORMULAS[operation](*args, **kwargs, out_val=result)
            if "attention" in name:
                counts.of_pairs += flops * _needed_of_attention(_given(func, args, kwargs), name)
            elif name in _BATCHED:
                counts.of_pairs += flops
            else:
                counts.of_rows += flops
        return result


@cache
def _is_counted(func: Any) -> bool:
    operation = getattr(func, "_overloadpacket", func)
    return operation in FLOP_FORMULAS or _PACKED in getattr(operation, "__name__", "")


def _given(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of an operation by name."""
    schema = getattr(func, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _needed_of_attention(given: Mapping[str, Any], name: str) -> float:
    """Part that a model needs of what torch counts for a kernel of attention.

    torch counts all pairs of positions, and in a backward pass also the scores, which are computed again: one of five
    products.
    """
    return (0.5 if given.get("is_causal") else 1.0) * (0.8 if "backward" in name else 1.0)


def _per_pair_of_packed(func: Any, name: str, args: tuple, kwargs: Mapping[str, Any]) -> float:
    """Operations per pair of positions of attention over packed sequences; twice as many in a backward pass."""
    given = _given(func, args, kwargs)
    heads, width = given["query"].shape[-2:]
    is_causal = given.get("is_causal") or list(given.get("window_size") or ()) == [-1, 0]
    return 4.0 * heads * width * (2.0 if "backward" in name else 1.0) * (0.5 if is_causal else 1.0)
