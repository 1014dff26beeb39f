"""Host memory for a checkpoint: exact copies, no more memory than needed, and what is said where none can be pinned."""

from __future__ import annotations

import pytest
import torch

from lightning_mimo.checkpoint import staging
from lightning_mimo.checkpoint.staging import StagingBuffer


def tensors(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1000, generator=generator),
        torch.randn(0, 3, generator=generator),
        torch.randn(7, 3, generator=generator).to(torch.bfloat16).t(),
        torch.tensor(3.0, dtype=torch.float64),
        torch.randint(9, (77,), generator=generator, dtype=torch.uint8),
        torch.randn(300, generator=generator).requires_grad_(),
    ]


@pytest.mark.parametrize("block", [64, 2048, 2**28])
def test_copies_are_exact_and_apart(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_BLOCK", block)
    originals = tensors()
    copies = StagingBuffer().copy(originals)
    for copy, original in zip(copies, originals, strict=True):
        assert copy.dtype == original.dtype and copy.is_contiguous() and not copy.requires_grad
        assert torch.equal(copy, original)
    with torch.no_grad():
        originals[0].zero_()
    assert copies[0].any(), "a copy shares no memory with its original"


def test_memory_is_exactly_as_much_as_is_needed() -> None:
    buffer = StagingBuffer()
    sizes = []
    allocate = buffer._allocate
    buffer._allocate = lambda size, *, pinned: (sizes.append((size, pinned)), allocate(size, pinned=pinned))[1]
    buffer.copy(tensors())
    assert sizes == [(4032 + 0 + 64 + 64 + 128 + 1216, False)]
    assert buffer.nbytes == 0, "ordinary memory is not kept"


def test_pinned_memory_that_is_refused_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_BLOCK", 64)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which pins memory")
    buffer = StagingBuffer()
    with pytest.warns(
        RuntimeWarning, match=r"No pinned memory for a checkpoint .* Raise the limit of locked memory"
    ) as caught:
        blocks = [buffer._allocate(64, pinned=True) for _ in range(2)]
    assert len(caught) == 1
    assert [block.numel() for block in blocks] == [64, 64]
