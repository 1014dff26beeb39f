"""Attention on a GPU: the same as on the CPU in float64, without asking the device, in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.layers.attention import SdpaAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning"),  # TransformerConfig about itself
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

HEADS, HEAD = 8, 64
LENGTHS = [300, 1, 0, 211, 512]


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def attention(mask_type: AttnMaskType, groups: int) -> SdpaAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=0.0,
    )
    return SdpaAttention(
        config=config,
        layer_number=1,
        attn_mask_type=mask_type,
        attention_type="self",
        pg_collection=ProcessGroupCollection(tp=dist.group.WORLD),
    )


def inputs(*shape: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    drawn = [torch.randn(*shape, heads, HEAD, generator=generator) for heads in (HEADS, groups, groups)]
    return [tensor.to(device="cuda", dtype=dtype).requires_grad_() for tensor in drawn]


@contextmanager
def no_host_reads() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def results(layer: SdpaAttention, tensors: list[torch.Tensor], *args: object, **kwargs: object) -> list[torch.Tensor]:
    output = layer(*tensors, *args, **kwargs)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, weights)]


def exact(tensors: list[torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
    """Of ``[s, b, heads, head]``, by the formula, in float64; ``mask`` is True where nothing is seen."""
    tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in tensors)
    key, value = (tensor.repeat_interleave(HEADS // tensor.size(1), dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(-1, -2) / HEAD**0.5).masked_fill(mask, -torch.inf)
    output = (scores.softmax(dim=-1) @ value).permute(2, 0, 1, 3).flatten(2)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, weights)]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < tolerance


DTYPES = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_is_exact_without_a_host_read_and_in_little_memory(masked: bool, groups: int, dtype: torch.dtype) -> None:
    length, batch = 2048, 2
    causal = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
    layer = attention(AttnMaskType.arbitrary if masked else AttnMaskType.causal, groups)
    tensors = inputs(length, batch, groups=groups, dtype=dtype)
    expected = exact(tensors, causal)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_host_reads():
        found = results(layer, tensors, causal[None, None] if masked else None)
    # A kernel with a mask of its own holds that, for all heads at once.
    most = (batch * HEADS * length**2 * dtype.itemsize) / 2
    assert torch.cuda.max_memory_allocated() - before < most
    assert_near(found, expected, DTYPES[dtype])


@pytest.mark.parametrize("padded", [None, [320, 8, 8, 256, 512]], ids=["close", "padded"])
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_packed_sequences_are_as_each_alone(mask_type: AttnMaskType, groups: int, padded: list[int] | None) -> None:
    ends = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
    starts = torch.tensor([0, *accumulate(padded or LENGTHS)], dtype=torch.int32)
    tokens = int(starts[-1])
    sequence = torch.full((tokens,), -1)
    for number, (start, length) in enumerate(zip(starts.tolist(), LENGTHS, strict=False)):
        sequence[start : start + length] = number
    parameters = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends.cuda(),
        cu_seqlens_kv=ends.cuda(),
        cu_seqlens_q_padded=None if padded is None else starts.cuda(),
        cu_seqlens_kv_padded=None if padded is None else starts.cuda(),
        max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
    )
    tensors = inputs(tokens, groups=groups, dtype=torch.bfloat16)
    real = (sequence >= 0).cuda()[:, None]
    with no_host_reads():
        output = attention(mask_type, groups)(*tensors, None, packed_seq_params=parameters)
        weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device="cuda").view_as(output)
        gradients = torch.autograd.grad(output, tensors, weights * real)
    assert output.isfinite().all()
    others = (sequence[:, None] != sequence).cuda()
    if mask_type == AttnMaskType.causal:
        others |= torch.ones_like(others).triu(1)
    alone = [tensor.detach().double().unsqueeze(1).requires_grad_() for tensor in tensors]
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in alone)
    key, value = (tensor.repeat_interleave(HEADS // groups, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(-1, -2) / HEAD**0.5).masked_fill(others, -torch.inf)
    expected = (scores.softmax(dim=-1) @ value).permute(2, 0, 1, 3).flatten(1)
    expected_gradients = torch.autograd.grad(expected, alone, weights.double() * real)
    assert_near([output.detach() * real], [expected.detach() * real], DTYPES[torch.bfloat16])
    assert_near(list(gradients), [each.squeeze(1) for each in expected_gradients], DTYPES[torch.bfloat16])


def test_float32_is_packed_one_after_the_other() -> None:
    ends = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device="cuda")
    parameters = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    tensors = inputs(sum(LENGTHS), groups=2, dtype=torch.float32)
    layer = attention(AttnMaskType.causal, 2)
    output = layer(*tensors, None, packed_seq_params=parameters)
    parts = zip(*(tensor.split(LENGTHS) for tensor in tensors), strict=True)
    expected = torch.cat([layer(*(part.unsqueeze(1) for part in each), None) for each in parts if len(each[0])])
    torch.testing.assert_close(output, expected.flatten(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_may_see_nothing_gets_nothing_and_harms_nobody(dtype: torch.dtype) -> None:
    mask = torch.zeros(1, 1, 256, 256, dtype=torch.bool, device="cuda")
    mask[:, :, 7] = True
    output, *gradients = results(attention(AttnMaskType.arbitrary, 8), inputs(256, 1, groups=8, dtype=dtype), mask)
    assert (output[7] == 0).all()
    assert all(each.isfinite().all() for each in (output, *gradients))
