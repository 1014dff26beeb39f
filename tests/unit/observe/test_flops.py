"""Which operations count for a module, and the peaks of GPUs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from lightning_mimo.microbatch import Microbatch, ModalityCounts, Ragged
from lightning_mimo.observe.flops import ModuleFlops, Work, work_of
from lightning_mimo.observe.peak_flops import peak_flops
from lightning_mimo.observe.spans import BACKWARD, FORWARD, SpanInfo, Spans

WIDTH = 8


def text(samples: int, length: int) -> Microbatch:
    return Microbatch(input_ids=torch.zeros(samples, length, dtype=torch.int64), is_packed=False)


def images(*items: int, tokens: int = 4, inputs: bool = True) -> Microbatch:
    counts = ModalityCounts(
        sample_indices=tuple(range(len(items))),
        placeholders=tuple(tokens * each for each in items),
        samples_per_position=(1,) * len(items),
        own=range(len(items)),
        items=items,
    )
    pixels = {"vit": {"pixels": torch.zeros(sum(items), 3, 6), "grid": torch.zeros(sum(items), 2, dtype=torch.int64)}}
    return Microbatch(modality_counts={"images": counts}, modality_inputs={"images": pixels if inputs else None})


def run(flops: ModuleFlops, spans: Spans, name: str, action: object) -> None:
    """Run ``action()`` as the forward pass of a module, and its backward pass."""
    with flops.counting():
        with spans.span(SpanInfo(kind=FORWARD, label="", module=name)):
            output = action()
        with spans.span(SpanInfo(kind=BACKWARD, label="", module=name)):
            output.sum().backward()
        with spans.span(SpanInfo(kind="optimizer", label="")):
            torch.ones(9, 9) @ torch.ones(9, 9)


@pytest.mark.parametrize("again", [False, True], ids=["plain", "recomputed"])
def test_matrix_products_count_three_times_and_recomputation_not_at_all(again: bool) -> None:
    spans = Spans()
    flops = ModuleFlops(["language"], spans)
    layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward() -> torch.Tensor:
        inputs = torch.randn(20, WIDTH, requires_grad=True)
        return checkpoint(layer, inputs, use_reentrant=True) if again else layer(inputs)

    run(flops, spans, "language", forward)
    assert flops.of_batch([text(2, 10)]) == {"language": 3 * 2 * 20 * WIDTH**2}
    with flops.counting() as counter:
        assert counter is None, "counted once"
    assert flops.of_batch([text(1, 5), text(3, 5)]) == {"language": 3 * 2 * 20 * WIDTH**2}
    assert flops.of_batch([text(2, 5)]) == {"language": 3 * 2 * 10 * WIDTH**2}


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_pairs_and_half_of_them_under_a_causal_mask(causal: bool, key_heads: int) -> None:
    spans = Spans()
    flops = ModuleFlops(["language"], spans)

    def forward() -> torch.Tensor:
        query, key, value = (
            torch.randn(2, heads, 16, WIDTH, requires_grad=True) for heads in (4, key_heads, key_heads)
        )
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=key_heads < 4)

    run(flops, spans, "language", forward)
    once = 2 * 2 * 4 * WIDTH * (2 * 16**2) * (0.5 if causal else 1)
    assert flops.of_batch([text(2, 16)])["language"] == pytest.approx(3 * once)
    assert flops.of_batch([text(2, 32)])["language"] == pytest.approx(3 * 4 * once)


def test_a_module_is_counted_in_the_first_batch_that_has_something_for_it() -> None:
    spans = Spans()
    flops = ModuleFlops(["images"], spans)
    layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    run(flops, spans, "images", lambda: layer(torch.randn(1, WIDTH)))  # what stands in for images where there are none
    assert flops.of_batch([images(0, 0)]) == {"images": 0.0}
    run(flops, spans, "images", lambda: layer(torch.randn(6, WIDTH)))
    assert flops.of_batch([images(2, 1)]) == {"images": 2 * 2 * 6 * WIDTH**2}
    assert flops.of_batch([images(0, 1)]) == {"images": pytest.approx(2 * 2 * 2 * WIDTH**2)}
    assert flops.of_batch([images(0, 0)]) == {"images": 0.0}


def test_packed_samples_do_not_attend_to_each_other() -> None:
    packed = Microbatch(input_ids=torch.zeros(1, 12, dtype=torch.int64), is_packed=True, sample_lengths=(3, 4, 5))
    assert work_of(packed, "language") == Work(rows=12, pairs=9 + 16 + 25)
    assert work_of(text(3, 4), "language") == Work(rows=12, pairs=3 * 16)


def test_work_of_an_encoder() -> None:
    assert work_of(images(2, 0, 1), "images") == Work(rows=3 * 3 * 6, pairs=3 * 4**2)
    assert work_of(images(2, 0, 1, inputs=False), "images") == Work(rows=3 * 4, pairs=3 * 4**2)
    ragged = images(1)
    ragged["modality_inputs"]["images"] = {
        "clips": {"frames": Ragged(values=torch.zeros(7, 5), lengths=torch.tensor([7]))}
    }
    assert work_of(ragged, "images").rows == 35


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_peaks(name: str, tera: float | None) -> None:
    assert peak_flops(name, torch.bfloat16) == (None if tera is None else pytest.approx(tera * 1e12))
    assert peak_flops(name, torch.float32) is None
