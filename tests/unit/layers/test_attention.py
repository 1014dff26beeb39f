"""Attention on torch's kernels is Megatron's own, number for number, and packed sequences do not see each other."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo import MimoLayout, MimoModelInfra, ModuleParallelism
from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.known_warnings import hush_known_warnings
from lightning_mimo.layers.attention import SdpaAttention
from lightning_mimo.models.gpt import gpt_spec
from lightning_mimo.models.sizes import TransformerSize
from lightning_mimo.parallel.random import seed_megatron

LAYOUT = MimoLayout.resolve({"language": ModuleParallelism()}, world_size=1)
HEADS, HEAD = 4, 6
EXACT = {"rtol": 1e-11, "atol": 1e-13}


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """A world of this process alone, with megatron-core on the CPU."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with megatron_on_cpu(), warnings.catch_warnings():
        hush_known_warnings()
        seed_megatron(LAYOUT, 0, seed=3)
        yield
    dist.destroy_process_group()


def attention(
    kind: type[DotProductAttention],
    mask_type: AttnMaskType = AttnMaskType.causal,
    *,
    groups: int = HEADS,
    dropout: float = 0.0,
    softmax_scale: float | None = None,
    **settings: Any,
) -> DotProductAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=dropout,
        params_dtype=torch.float64,
        **settings,
    )
    return kind(
        config=config,
        layer_number=3,
        attn_mask_type=mask_type,
        attention_type="self",
        softmax_scale=softmax_scale,
        pg_collection=ProcessGroupCollection(tp=dist.group.WORLD),
    )


def inputs(*shape: int, groups: int = HEADS, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key and value, ``[*shape, heads, head]``."""
    generator = torch.Generator().manual_seed(11)
    return [
        torch.randn(*shape, heads, HEAD, generator=generator, dtype=dtype).requires_grad_()
        for heads in (HEADS, groups, groups)
    ]


def results(layer: DotProductAttention, tensors: list[torch.Tensor], *args: Any, **kwargs: Any) -> list[torch.Tensor]:
    """Output, and the gradients of the inputs for some gradient of it."""
    output = layer(*tensors, *args, **kwargs)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, weights)]


def arbitrary_mask(length: int, batch: int) -> torch.Tensor:
    """Each query sees itself, and others by chance."""
    mask = torch.rand(batch, 1, length, length, generator=torch.Generator().manual_seed(5)) < 0.5
    return mask & ~torch.eye(length, dtype=torch.bool)


def padding_mask(length: int, batch: int) -> torch.Tensor:
    """Row b ends b + 1 places before the others would."""
    ends = length - 1 - torch.arange(batch)
    return (torch.arange(length) >= ends[:, None])[:, None, None]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


MASKS = {"none": lambda *size: None, "arbitrary": arbitrary_mask, "padding": padding_mask}


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask, AttnMaskType.arbitrary])
def test_is_megatrons_own(mask_type: AttnMaskType, mask: str, groups: int) -> None:
    given = MASKS[mask](9, 3)
    found, expected = (
        results(attention(kind, mask_type, groups=groups), inputs(9, 3, groups=groups), given)
        for kind in (SdpaAttention, DotProductAttention)
    )
    assert found[0].shape == (9, 3, HEADS * HEAD)
    assert_same(found, expected)


@pytest.mark.parametrize(
    "settings",
    [{"softmax_scale": 0.3}, {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}],
    ids=["softmax_scale", "query_key_layer_scaling"],
)
def test_scales_as_megatrons_own(settings: dict[str, Any]) -> None:
    kinds = (SdpaAttention, DotProductAttention)
    assert_same(*(results(attention(kind, **settings), inputs(7, 2), None) for kind in kinds))


def test_padding_causal_is_masked_by_both() -> None:
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    padding = padding_mask(9, 3)
    found = results(attention(SdpaAttention, AttnMaskType.padding_causal), inputs(9, 3), padding)
    expected = results(attention(DotProductAttention, AttnMaskType.arbitrary), inputs(9, 3), padding | causal)
    assert_same(found, expected)


def test_one_new_query_sees_all_keys_that_are_kept() -> None:
    found, expected = (
        results(attention(kind), [inputs(1, 2)[0], *inputs(6, 2)[1:]], None)
        for kind in (SdpaAttention, DotProductAttention)
    )
    assert_same(found, expected)


def test_a_query_that_may_see_nothing_gets_nothing_and_harms_nobody() -> None:
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    mask[:, :, 2] = True
    output, *gradients = results(attention(SdpaAttention, AttnMaskType.arbitrary), inputs(5, 1), mask)
    assert (output[2] == 0).all()
    assert (output[3] != 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_no_item_at_all() -> None:
    output, *gradients = results(attention(SdpaAttention, AttnMaskType.no_mask), inputs(4, 0), None)
    assert output.shape == (4, 0, HEADS * HEAD)
    assert [gradient.numel() for gradient in gradients] == [0, 0, 0]


# ---- packed sequences


def ends_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed(lengths: list[int], padded: list[int] | None = None) -> PackedSeqParams:
    ends = ends_of(lengths)
    padded_ends = None if padded is None else ends_of(padded)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=padded_ends,
        cu_seqlens_kv_padded=padded_ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


@pytest.mark.parametrize("padded", [None, [5, 4, 3, 3]], ids=["close", "padded"])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_packed_sequences_are_as_each_alone(mask_type: AttnMaskType, groups: int, padded: list[int] | None) -> None:
    lengths = [5, 1, 0, 3]
    tensors = inputs(sum(padded or lengths), groups=groups)
    alone = attention(DotProductAttention, mask_type, groups=groups)
    output = attention(SdpaAttention, mask_type, groups=groups)(
        *tensors, None, packed_seq_params=packed(lengths, padded)
    )
    starts = [start for start, _ in pairwise(ends_of(padded or lengths).tolist())]
    found, expected = [], []
    for start, length in zip(starts, lengths, strict=True):
        if length:
            found.append(output[start : start + length])
            sequence = [tensor[start : start + length].unsqueeze(1) for tensor in tensors]
            expected.append(alone(*sequence, None).squeeze(1))
    found, expected = torch.cat(found), torch.cat(expected)
    assert output.shape == (len(tensors[0]), HEADS * HEAD)
    torch.testing.assert_close(found, expected, **EXACT)
    weights = torch.linspace(-1, 2, found.numel(), dtype=torch.float64).view_as(found)
    assert_same(*(list(torch.autograd.grad(each, tensors, weights)) for each in (found, expected)))


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_a_packed_row_of_a_gpt_is_its_sequences(style: str) -> None:
    lengths = [5, 2, 6]
    infra = MimoModelInfra.build(LAYOUT)
    size = TransformerSize(num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, style=style)
    spec = gpt_spec(infra, size, vocab_size=12, max_sequence_length=16)
    torch.manual_seed(1)
    model = spec.module(**spec.params).double()
    ids = torch.randint(12, (1, sum(lengths)))

    def run(one: torch.Tensor, parameters: PackedSeqParams | None = None) -> torch.Tensor:
        positions = torch.arange(one.size(1))[None]
        return model(one, positions, attention_mask=None, packed_seq_params=parameters)

    together = run(ids, packed(lengths))
    alone = torch.cat([run(part) for part in ids.split(lengths, dim=1)], dim=1)
    # Rotary positions are computed in float32, and are those of each sequence.
    torch.testing.assert_close(together, alone, **EXACT)
    weights = torch.linspace(-1, 2, together.numel(), dtype=torch.float64).view_as(together)
    gradients = [torch.autograd.grad(each, list(model.parameters()), weights) for each in (together, alone)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    infra.destroy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": ends_of([3, 4])}, r"must cover all 9 tokens .* cu_seqlens are \[0, 3, 7\]"),
        ({"cu_seqlens_q": torch.tensor([0, 7, 5, 9])}, "must cover all 9 tokens"),
        ({"cu_seqlens_q": None}, "cu_seqlens_q is None"),
        ({"cu_seqlens_kv": ends_of([5, 4])}, "cu_seqlens of keys must equal those of queries"),
        ({"qkv_format": "sbhd"}, "qkv_format is 'sbhd'"),
    ],
    ids=["short", "backwards", "none", "keys", "format"],
)
def test_packed_sequences_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    parameters = packed([3, 6])
    for name, value in change.items():
        setattr(parameters, name, value)
    with pytest.raises(ValueError, match=message):
        attention(SdpaAttention)(*inputs(9), None, packed_seq_params=parameters)


# ---- dropout


def drop(layer: DotProductAttention, *args: Any, seed: int = 3, **kwargs: Any) -> list[torch.Tensor]:
    """Results after all generators were seeded anew."""
    seed_megatron(LAYOUT, 0, seed=seed)
    return results(layer, *args, **kwargs)


def test_dropout_draws_from_the_tensor_parallel_generator_alone() -> None:
    layer = attention(SdpaAttention, dropout=0.4)
    first = drop(layer, inputs(8, 2), None)
    before, tracked = torch.get_rng_state(), get_cuda_rng_tracker().get_states()["model-parallel-rng"].clone()
    second = results(layer, inputs(8, 2), None)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(get_cuda_rng_tracker().get_states()["model-parallel-rng"], tracked)
    again, other = drop(layer, inputs(8, 2), None), drop(layer, inputs(8, 2), None, seed=4)
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])


def test_dropout_with_sequence_parallelism_draws_from_what_the_block_has_forked() -> None:
    layer = attention(SdpaAttention, dropout=0.4)
    layer.config.sequence_parallel = True
    before = torch.get_rng_state()
    results(layer, inputs(8, 2), None)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_dropout_leaves_the_mean_as_it_is(is_packed: bool) -> None:
    draws, lengths = 500, [3, 5]
    layers = (attention(SdpaAttention, dropout=0.25), attention(SdpaAttention))
    with torch.no_grad():
        if is_packed:  # the same sequences over and over in one row
            tensors = [tensor.repeat(draws, 1, 1) for tensor in inputs(sum(lengths))]
            parameters = packed(lengths * draws)
            outputs, exact = (each(*tensors, None, packed_seq_params=parameters) for each in layers)
            outputs, exact = (output.view(draws, sum(lengths), -1) for output in (outputs, exact))
        else:
            tensors = [tensor.repeat(1, draws, 1, 1) for tensor in inputs(8, 1)]
            outputs, exact = (each(*tensors, None).transpose(0, 1) for each in layers)
    deviation = outputs.std(dim=0)
    assert (deviation > 0).all()
    assert ((outputs.mean(dim=0) - exact[0]).abs() < 5 * deviation / draws**0.5).all()


def test_nothing_is_dropped_in_evaluation() -> None:
    layer = attention(SdpaAttention, dropout=0.4).eval()
    assert_same(results(layer, inputs(8, 2), None), results(attention(DotProductAttention), inputs(8, 2), None))


# ---- memory


def kept_bytes(layer: DotProductAttention, length: int) -> int:
    """What autograd keeps for the backward pass."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tensors = inputs(length, 1, groups=2, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(*tensors, None)  # noqa: F841  (alive until all is counted)
        return sum(storages.values())


def test_memory_grows_with_the_sequence_and_not_with_its_square() -> None:
    ours, own = attention(SdpaAttention, groups=2), attention(DotProductAttention, groups=2)
    assert kept_bytes(own, 512) > HEADS * 512 * 512 * 4
    assert kept_bytes(ours, 512) < 6 * 512 * HEADS * HEAD * 4
    assert kept_bytes(ours, 1024) == pytest.approx(2 * kept_bytes(ours, 512), rel=0.01)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"softmax_type": "off-by-one"}, r"Layer 3: SdpaAttention does not support softmax_type='off-by-one'"),
        ({"window_size": (4, 0)}, r"does not support window_size=\(4, 0\)"),
        ({"context_parallel_size": 2}, "does not support context_parallel_size=2"),
        ({"qk_clip": True}, "does not support qk_clip=True"),
        ({"mask_type": AttnMaskType.causal_bottom_right}, "does not support attn_mask_type=causal_bottom_right"),
    ],
    ids=["softmax_offset", "window", "context_parallel", "qk_clip", "bottom_right"],
)
def test_what_it_cannot_do_is_refused_when_it_is_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(SdpaAttention, **settings)


def test_inputs_that_it_cannot_use_are_refused() -> None:
    layer, tensors = attention(SdpaAttention), inputs(4, 1)
    with pytest.raises(ValueError, match="takes no attention_bias"):
        layer(*tensors, None, attention_bias=torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"attention_mask is torch\.float64; it must be bool"):
        layer(*tensors, torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="Causal attention of 2 queries to 4 keys"):
        layer(inputs(2, 1)[0], *tensors[1:], None)
    with pytest.raises(ValueError, match="Packed sequences take no attention_mask"):
        layer(*inputs(4), torch.zeros(4, 4, dtype=torch.bool), packed_seq_params=packed([4]))


def test_an_unknown_attention_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="attention='flash' is not one of 'sdpa', 'megatron', 'te'"):
        TransformerSize(num_layers=1, hidden_size=8, num_attention_heads=2, attention="flash")


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed")
def test_transformer_engine_is_refused_where_it_is_not_installed() -> None:
    with pytest.raises(ValueError, match=r"attention='te' needs Transformer Engine.*pip install.*attention='sdpa'"):
        TransformerSize(num_layers=1, hidden_size=8, num_attention_heads=2, attention="te")


@pytest.mark.parametrize(("kind", "expected"), [("sdpa", SdpaAttention), ("megatron", DotProductAttention)])
def test_the_chosen_attention_is_in_every_layer(kind: str, expected: type) -> None:
    infra = MimoModelInfra.build(LAYOUT)
    size = TransformerSize(num_layers=2, hidden_size=16, num_attention_heads=4, num_experts=2, attention=kind)
    spec = gpt_spec(infra, size, vocab_size=12, max_sequence_length=16)
    model = spec.module(**spec.params)
    assert [type(layer.self_attention.core_attention) for layer in model.decoder.layers] == [expected, expected]
    infra.destroy()
