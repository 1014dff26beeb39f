"""Every Python block of README and the documentation runs, in the order of its page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

from examples.digits.data import DigitsDataset
from tests.support.pages import PAGES, blocks_of, run_blocks

WITH_PYTHON = [page for page in PAGES if blocks_of(page, "python")]


def test_there_are_blocks() -> None:
    assert len(WITH_PYTHON) >= 9


@pytest.mark.parametrize("page", WITH_PYTHON, ids=str)
def test_blocks_run(page: Path) -> None:
    registered = set(StrategyRegistry)
    run_blocks(page)
    for name in set(StrategyRegistry) - registered:
        StrategyRegistry.remove(name)


@pytest.mark.parametrize("page", ["README.md", "docs/guide/data.md"])
def test_sample_has_the_keys_and_types_of_the_demos(page: str) -> None:
    sample = run_blocks(Path(page))["sample"]
    pool = torch.rand(3, 8, 8).numpy()
    demo = DigitsDataset(pool, torch.arange(3).numpy(), length=1, seed=0)[0]
    assert sample.keys() == demo.keys()
    for key in ("input_ids", "labels"):
        assert sample[key].dtype == demo[key].dtype == torch.int64
    lengths = {len(sample[key]) for key in ("input_ids", "labels", "loss_mask")}
    assert lengths == {5}
    pixels, of_demo = (each["modality_inputs"]["images"]["vit"]["pixel_values"] for each in (sample, demo))
    assert pixels.shape[1:] == of_demo.shape[1:]
    assert len(pixels) == (sample["input_ids"] == 13).sum(), "one placeholder for each embedding"
    assert sample["labels"][:-1].tolist() == sample["input_ids"][1:].tolist()


def test_labels_of_hugging_face_are_shifted() -> None:
    convert = run_blocks(Path("docs/guide/data.md"))["from_hugging_face"]
    input_ids = torch.tensor([5, 6, 7, 8])
    sample = convert(input_ids, torch.tensor([-100, -100, 7, 8]))
    assert sample["labels"].tolist() == [0, 7, 8, 0]
    assert sample["loss_mask"].tolist() == [0, 1, 1, 0]
    assert sample["input_ids"] is input_ids
    # The loss that transformers would compute, for any logits.
    logits, lost = torch.randn(4, 16), torch.nn.functional.cross_entropy
    theirs = lost(logits[:-1], torch.tensor([-100, 7, 8]))
    ours = (lost(logits, sample["labels"], reduction="none") * sample["loss_mask"]).sum() / sample["loss_mask"].sum()
    torch.testing.assert_close(ours, theirs)
