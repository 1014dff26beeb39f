"""Which tensors of a model are converted to the dtype of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_mimo.mimo.dtypes import DtypePolicy


class Rotary(torch.nn.Module):
    """Parameters, a buffer of a checkpoint, a table, and rotary frequencies as of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.full((2,), 1 / 3))
        self.register_buffer("table", torch.full((2,), 1 / 3), persistent=False)
        self.register_buffer("inv_freq", torch.full((2,), 1 / 3), persistent=False)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)], ids=str)
def test_frequencies_are_not_rounded(dtype: torch.dtype, kept: torch.dtype) -> None:
    model = DtypePolicy(dtype=dtype).convert(Rotary())
    assert {model.weight.dtype, model.mean.dtype, model.table.dtype} == {dtype}
    assert model.inv_freq.dtype == kept
    assert torch.equal(model.inv_freq.float(), torch.full((2,), 1 / 3))
    assert model.state_dict().keys() == {"weight", "mean"}


def test_tower_of_transformers_computes_in_bfloat16_what_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from lightning_mimo.models.hugging_face.towers import HiddenStates

    config = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=4
    )
    tower = HiddenStates(config, layer=-1, drop_first=False)
    tower.tower.save_pretrained(tmp_path)
    DtypePolicy(dtype=torch.bfloat16).convert(tower)
    theirs = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {buffer.dtype for name, buffer in theirs.named_buffers() if "inv_freq" in name} == {torch.float32}
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(tower(pixels), expected)
