"""No damaged sample is trained on in silence, or refused without its index."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mimo import ItemSizes, MimoLayout, ModuleParallelism
from lightning_mimo.data.collation import MicrobatchCollator, SampleRequest
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.errors import DataError
from lightning_mimo.layout.batch_plan import RankBatchPlan
from tests.fuzz.samples import DAMAGES, IMAGE, LONGEST, VOCABULARY, damaged_samples, sample
from tests.fuzz.tally import HEAD, Tally, TooLong, limited

_FIRST = 10  # index of the first sample of a batch


def collate(samples: list[Any]) -> Any:
    layout = MimoLayout.resolve(
        {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}, world_size=1, colocate=True
    )
    plan = RankBatchPlan.build(layout, 0, global_batch_size=len(samples), num_microbatches=1)
    expected = SampleFormat(
        special_token_ids={"images": IMAGE},
        pad_token_id=0,
        vocab_size=VOCABULARY,
        max_sequence_length=LONGEST,
        position_type="rope",
        modules=("images",),
        encoders={"images": {"vit": ItemSizes.of_grid(merge_size=2)}},
    )
    modules = frozenset({"images", "language"})
    requests = [
        SampleRequest(index=_FIRST + i, position=i, drawn=i, modules=modules, epoch=0, is_padding=False)
        for i in range(len(samples))
    ]
    (batch,) = MicrobatchCollator(plan, expected)(list(zip(requests, samples, strict=True)))
    counts = batch["modality_counts"]["images"]
    assert counts.embeddings is not None, "declared"
    counts.check_rows("images", sum(counts.embeddings), uniform=False)  # as the encoder's output is checked
    return batch


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(np.array_equal(one, two))


def try_all(seed: int, number: int) -> Tally:
    tally = Tally(kind="samples")
    for i, (what, expected, samples) in enumerate(damaged_samples(seed, number)):
        try:
            with limited(20):
                batch = collate(samples)
        except DataError as error:
            text = str(error)
            is_clear = re.search(r"[Ss]amples? .*\b1[0-2]\b", text) and expected == "refused"
            tally.add("refused" if is_clear else "raw", what, text)
        except TooLong:
            tally.add("hung", what)
        except Exception as error:
            tally.add("raw", what, f"{type(error).__name__}: {error}")
        else:
            undamaged = collate([sample(3 * i + k) for k in range(3)])
            is_right = expected == "valid" or (expected == "equal" and equal(batch, undamaged))
            tally.add("accepted" if is_right else "silent", what)
    return tally


def test_damaged_samples_are_refused_by_name() -> None:
    tally = try_all(1, len(DAMAGES) + 50)
    assert not tally.bad, "\n".join(tally.bad)
    assert tally.outcomes["refused"] > 60


@pytest.mark.exhaustive
def test_many_damaged_samples_are_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    tally = try_all(2, 2_000)
    with capsys.disabled():
        print(f"\n{HEAD}\n{tally}")
    assert not tally.bad, "\n".join(tally.bad)
