"""Samples of one rank, put together: items of different sizes, what a loss of one's own sees, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mimo import DataError, ItemSizes, MimoLayout, ModuleParallelism, Ragged, sum_by_sample
from lightning_mimo.data.collation import MicrobatchCollator, SampleRequest
from lightning_mimo.data.packing import Packing
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layout.batch_plan import RankBatchPlan

IMAGE, PAD, WIDTH = 9, 0, 5
GRID = ItemSizes.of_grid(merge_size=2)
TILES = ItemSizes.of_tiles(embeddings_per_tile=3)


def plan(samples: int, *, microbatches: int = 1) -> RankBatchPlan:
    layout = MimoLayout.resolve(
        {"images": ModuleParallelism(dp=1), "language": ModuleParallelism(dp=1)}, world_size=1, colocate=True
    )
    return RankBatchPlan.build(layout, 0, global_batch_size=samples, num_microbatches=microbatches)


def sample(placeholders: int, arguments: Mapping[str, Any] | None, **keys: Any) -> dict[str, Any]:
    text = {
        "input_ids": torch.tensor([1, *[IMAGE] * placeholders, 2]),
        "labels": torch.tensor([*[-100] * (placeholders + 1), 3]),
        **keys,
    }
    return text if arguments is None else {**text, "modality_inputs": {"images": {"vit": arguments}}}


def collate(
    *samples: Any,
    microbatches: int = 1,
    sizes: ItemSizes | None = None,
    rows: list[int] | None = None,
    **fields: Any,
) -> list[Any]:
    """Microbatches of samples 10, 11, 12, …, packed if so many samples of each row are given."""
    wanted = {
        "special_token_ids": {"images": IMAGE},
        "pad_token_id": PAD,
        "modules": ("images",),
        "encoders": {"images": {"vit": sizes}},
    }
    both, in_rows = frozenset({"images", "language"}), rows or [1] * len(samples)
    places = [(position, place) for position, number in enumerate(in_rows) for place in range(number)]
    requests = [
        SampleRequest(
            index=10 + i, position=position, drawn=position, place=place, modules=both, epoch=0, is_padding=False
        )
        for i, (position, place) in enumerate(places)
    ]
    packing = None
    if rows is not None:
        lengths = [0] * 10 + [len(each["input_ids"]) for each in samples]
        packing = Packing(budget=99, lengths=np.array(lengths))
    collator = MicrobatchCollator(
        plan(len(in_rows), microbatches=microbatches), SampleFormat(**{**wanted, **fields}), packing=packing
    )
    return collator(list(zip(requests, samples, strict=True)))


def grids(*shapes: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    grid = torch.tensor(shapes, dtype=torch.int64).view(-1, 3)
    return {"pixel_values": torch.rand(int(grid.prod(dim=-1).sum()), WIDTH), "image_grid_thw": grid}


# Items of different sizes.


def test_patches_with_a_grid_are_counted_item_by_item() -> None:
    one, none, two = grids((1, 4, 6)), grids(), grids((1, 2, 2), (2, 4, 2))
    (batch,) = collate(sample(6, one), sample(0, none), sample(5, two), sizes=GRID)
    together = batch["modality_inputs"]["images"]["vit"]
    assert torch.equal(together["pixel_values"], torch.cat([one["pixel_values"], two["pixel_values"]]))
    assert together["image_grid_thw"].tolist() == [[1, 4, 6], [1, 2, 2], [2, 4, 2]]
    counts = batch["modality_counts"]["images"]
    assert (counts.items, counts.embeddings, counts.placeholders) == ((1, 0, 2), (6, 0, 5), (6, 0, 5))
    assert counts.rows == {"vit.pixel_values": (24, 0, 20), "vit.image_grid_thw": (1, 0, 2)}


def test_tiles_of_images_are_counted() -> None:
    arguments = {"pixel_values": torch.rand(4, 3, 2, 2), "num_tiles": [1, 3], "image_sizes": np.ones((2, 2), int)}
    (batch,) = collate(sample(12, arguments), sample(0, None), sizes=TILES)
    counts = batch["modality_counts"]["images"]
    assert (counts.items, counts.embeddings) == ((2, 0), (12, 0))
    assert batch["modality_inputs"]["images"]["vit"]["num_tiles"].tolist() == [1, 3]


def test_items_that_are_filled_up_are_filled_up_to_the_largest_of_the_microbatch() -> None:
    sizes = ItemSizes(embeddings=lambda inputs: inputs["tiles"], padded=("pixels",))
    one = {"pixels": torch.ones(1, 2, 3), "tiles": torch.tensor([2])}
    two = {"pixels": torch.ones(2, 3, 2), "tiles": torch.tensor([1, 3])}
    (batch,) = collate(sample(2, one), sample(0, None), sample(4, two), sizes=sizes)
    pixels = batch["modality_inputs"]["images"]["vit"]["pixels"]
    assert pixels.shape == (3, 3, 3)
    assert torch.equal(pixels[0], torch.nn.functional.pad(one["pixels"][0], (0, 0, 0, 1)))
    assert torch.equal(pixels[1:], torch.nn.functional.pad(two["pixels"], (0, 1)))


def test_items_that_are_filled_up_have_one_kind_of_numbers() -> None:
    sizes = ItemSizes(embeddings=lambda inputs: [1] * len(inputs["pixels"]), padded=("pixels",))
    message = r"^Sample 11: images.vit.pixels is float64 \[n, any\], but float32 \[n, any, any\] in sample 10"
    with pytest.raises(DataError, match=message):
        collate(
            sample(1, {"pixels": torch.ones(1, 2, 3)}),
            sample(1, {"pixels": torch.ones(1, 2, dtype=torch.float64)}),
            sizes=sizes,
        )


def test_ragged_items_need_no_declaration() -> None:
    one = Ragged(values=torch.rand(4, WIDTH), lengths=torch.tensor([3, 1]))
    two = Ragged(values=torch.rand(2, WIDTH), lengths=torch.tensor([2]))
    (batch,) = collate(sample(4, {"frames": one}), sample(2, {"frames": two}))
    together = batch["modality_inputs"]["images"]["vit"]["frames"]
    assert torch.equal(together.values, torch.cat([one.values, two.values]))
    assert together.lengths.tolist() == [3, 1, 2]
    assert batch["modality_counts"]["images"].embeddings == (4, 2)
    assert batch["modality_counts"]["images"].items == (2, 1)


def test_nothing_stands_in_for_ragged_items_where_there_are_none() -> None:
    first, second = collate(sample(0, grids()), sample(6, grids((1, 4, 6))), microbatches=2, sizes=GRID)
    assert first["modality_inputs"] == {"images": None}
    assert second["modality_inputs"]["images"] is not None


def test_dense_items_are_not_declared() -> None:
    (batch,) = collate(sample(4, {"pixels": torch.rand(2, 3)}), sample(0, {"pixels": torch.rand(0, 3)}))
    assert batch["modality_counts"]["images"].embeddings is None


def test_declaration_and_placeholders_are_compared_by_sample() -> None:
    """Two errors that cancel, as rounding makes them."""
    message = r"^Sample 10: input_ids has 5 placeholder tokens for 'images', but its 1 inputs give 6 embeddings by the"
    with pytest.raises(ValueError, match=message):
        collate(sample(5, grids((1, 4, 6))), sample(7, grids((1, 4, 6))), sizes=GRID)


def test_placeholders_without_an_input_are_refused() -> None:
    collate(sample(6, grids((1, 4, 6))), sample(0, None), sizes=GRID)
    with pytest.raises(ValueError, match=r"^Sample 11: input_ids has 2 placeholder tokens .* its 0 inputs give 0"):
        collate(sample(6, grids((1, 4, 6))), sample(2, grids()), sizes=GRID)


# What encoders cannot be given.


@pytest.mark.parametrize(
    ("arguments", "sizes", "message"),
    [
        (
            {"pixel_values": torch.rand(7, WIDTH), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]])},
            GRID,
            r"images\.vit\.pixel_values has 7 rows, but its items have 4 \+ 4 = 8 by the encoder's item_sizes",
        ),
        (
            {"pixel_values": torch.rand(4, WIDTH)},
            GRID,
            r"images\.vit has the arguments \['pixel_values'\] .* item_sizes\.embeddings asks for 'image_grid_thw'",
        ),
        (
            {"pixel_values": torch.rand(4, WIDTH), "image_grid_thw": torch.tensor([[1, 2, 2]])},
            None,
            r"the inputs of module 'images' differ .*\{'vit\.pixel_values': 4, 'vit\.image_grid_thw': 1\}.*ItemSizes",
        ),
        (
            {"frames": Ragged(values=torch.rand(4, 2), lengths=torch.tensor([3, 2]))},
            None,
            r"images\.vit\.frames is Ragged with 4 rows, but its lengths \[3, 2\] add up to 5",
        ),
        ({"pixels": torch.tensor(1.0)}, None, r"images\.vit\.pixels is a single number"),
        (
            {"pixels": [torch.rand(3, 4), torch.rand(3, 5)]},
            None,
            r"images\.vit\.pixels is a list that is no rectangular array of numbers.*use lightning_mimo\.Ragged",
        ),
    ],
    ids=["rows", "missing", "undeclared", "lengths", "scalar", "list"],
)
def test_inputs_that_do_not_fit_together_are_refused(
    arguments: dict[str, Any], sizes: ItemSizes | None, message: str
) -> None:
    with pytest.raises(ValueError, match="^Sample 10: " + message):
        collate(sample(1, arguments), sizes=sizes)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            torch.rand(1, 3, 5),
            r"^Sample 11: images\.vit\.pixels is float32 \[n, 3, 5\], but float32 \[n, 3, 4\]",
        ),
        (torch.rand(1, 3, 4).double(), r"^Sample 11: images\.vit\.pixels is float64 \[n, 3, 4\], but float32"),
        (
            Ragged(values=torch.rand(1, 3, 4), lengths=torch.tensor([1])),
            r"^Sample 11: images\.vit\.pixels is Ragged float32 \[n, 3, 4\], but float32",
        ),
    ],
    ids=["size", "dtype", "ragged"],
)
def test_items_that_cannot_be_one_tensor_are_refused_by_sample(other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message + r".*sample 10, .*lightning_mimo\.Ragged"):
        collate(sample(1, {"pixels": torch.rand(1, 3, 4)}), sample(1, {"pixels": other}))


def test_argument_of_some_samples_only_is_refused_wherever_they_are() -> None:
    with_sizes = sample(1, {"pixels": torch.rand(1, 3), "sizes": torch.ones(1)})
    without = sample(1, {"pixels": torch.rand(1, 3)})
    message = r"^Sample 10 has images\.vit\.sizes in modality_inputs, but sample 11 has not"
    for microbatches in (1, 2):
        with pytest.raises(ValueError, match=message):
            collate(with_sizes, without, microbatches=microbatches)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": {"vit": {}}}, r"modality_inputs has 'image', but the encoder modules .* are \['images'\]"),
        (
            {"images": {"clip": {"x": torch.ones(1)}}},
            r"modality_inputs\['images'\] has the encoders \['clip'\], but the module has \['vit'\]",
        ),
        ({"images": {"pixels": torch.ones(1)}}, r"modality_inputs\['images'\] must be a dict \{encoder: "),
        ([1], r"modality_inputs is a list, but must be a dict"),
    ],
)
def test_inputs_that_nobody_would_take_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^Sample 10: " + message):
        collate(sample(0, None, modality_inputs=inputs))


def test_numpy_arrays_and_lists_of_numbers_are_taken() -> None:
    (batch,) = collate(sample(2, {"pixels": np.ones((2, 3), np.float32), "sizes": [[1, 2], [3, 4]]}))
    taken = batch["modality_inputs"]["images"]["vit"]
    assert taken["pixels"].dtype == torch.float32 and taken["sizes"].tolist() == [[1, 2], [3, 4]]


# Beside the usual keys.


def test_what_samples_have_beside_reaches_the_loss() -> None:
    keys = ("weight", "rank", "vector", "numbers", "source")
    first = {"weight": 0.1, "rank": 3, "vector": torch.ones(2), "numbers": torch.ones(3), "source": "a"}
    second = {"weight": 0.2, "rank": 4, "vector": torch.zeros(2), "numbers": torch.ones(2), "source": {"b": 1}}
    (batch,) = collate(
        sample(1, None, **first), sample(0, None, **second), extra_keys=keys, special_token_ids={"images": 8}
    )
    assert batch["weight"].tolist() == [0.1, 0.2]  # a Python float is a float64
    assert batch["rank"].tolist() == [3, 4]
    assert batch["vector"].tolist() == [[1, 1], [0, 0]]
    assert batch["numbers"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["source"] == ("a", {"b": 1})


def test_tensors_that_cannot_be_stacked_are_refused() -> None:
    given = [sample(0, None, vector=torch.ones(n)) for n in (3, 4)]
    with pytest.raises(ValueError, match=r"'vector' of different kinds.*\{10: 'float32 \[3\]', 11: 'float32 \[4\]'\}"):
        collate(*given, extra_keys=("vector",))


def test_positions_are_padded() -> None:
    given = [sample(1, None, position_ids=[4, 5, 6]), sample(0, None)]
    (batch,) = collate(*given, special_token_ids={"images": 8}, position_type="rope")
    assert batch["custom_positions"] and batch["position_ids"].tolist() == [[4, 5, 6], [0, 1, 0]]


def test_positions_in_space_are_padded() -> None:
    given = [
        sample(1, None, position_ids=torch.arange(9).view(3, 3)),
        sample(0, None),
        sample(0, None, position_ids=[2, 3]),
    ]
    (batch,) = collate(*given, special_token_ids={"images": 8}, position_type="mrope")
    assert batch["position_ids"].shape == (3, 3, 3)
    assert batch["position_ids"][:, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert batch["position_ids"][:, 1].tolist() == [[0, 1, 0]] * 3
    assert batch["position_ids"][:, 2].tolist() == [[2, 3, 0]] * 3


def test_usual_positions_are_marked_as_such() -> None:
    (batch,) = collate(sample(0, None), sample(0, None, position_ids=[0, 1]), position_type="rope")
    assert not batch["custom_positions"] and batch["position_ids"].tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("change", ["labels", "loss_mask", "position_ids", "pixels", "grid"])
def test_fingerprint_covers_all_that_a_module_takes(change: str) -> None:
    def fingerprints(changed: bool) -> dict[str, list[int]]:
        arguments = {"pixel_values": torch.arange(40.0).view(8, 5), "image_grid_thw": torch.tensor([[1, 2, 4]])}
        given = sample(2, arguments, loss_mask=[0, 0, 0, 1], position_ids=[0, 1, 1, 2])
        if changed and change in given:
            given[change] = torch.as_tensor(given[change]) + torch.tensor([0, 0, 0, 1])
        elif changed:
            arguments["pixel_values"] = arguments["pixel_values"] + (change == "pixels")
            arguments["image_grid_thw"] = torch.tensor([[1, 2, 4]] if change == "pixels" else [[1, 4, 2]])
        (batch,) = collate(given, sizes=GRID)
        return {name: each[0].tolist() for name, each in batch["sample_fingerprints"].items()}

    before, after = fingerprints(False), fingerprints(True)
    mine, other = ("images", "language") if change in ("pixels", "grid") else ("language", "images")
    assert before == fingerprints(False)
    assert before[other] == after[other]
    assert before[mine][:4] == after[mine][:4] and before[mine][4] != after[mine][4]


# Packed rows.


def test_samples_of_packed_rows_follow_each_other_without_padding() -> None:
    one, two = grids((1, 4, 6)), grids((1, 2, 2), (2, 4, 2))
    samples = (sample(6, one), sample(0, None, position_ids=[5, 6]), sample(5, two))
    (batch,) = collate(*samples, rows=[1, 2], sizes=GRID, extra_keys=())
    together = torch.cat([each["input_ids"] for each in samples]).tolist()
    assert batch["is_packed"] and batch["input_ids"].tolist() == [together]
    assert batch["labels"].tolist() == [torch.cat([each["labels"] for each in samples]).tolist()]
    assert batch["custom_positions"] and batch["position_ids"].tolist() == [[*range(8), 5, 6, *range(7)]]
    assert batch["sample_lengths"] == (8, 2, 7) and batch["lengths"].tolist() == [8, 2, 7]
    assert batch["sample_indices"] == (10, 11, 12) and batch["global_positions"] == (0, 1, 1)
    assert batch["sample_fingerprints"]["language"][:, :3].tolist() == [[0, 0, 10], [1, 0, 11], [1, 1, 12]]


def test_a_bridge_divides_placeholders_between_rows() -> None:
    one, two = grids((1, 4, 6)), grids((1, 2, 2), (2, 4, 2))
    (batch,) = collate(sample(6, one), sample(0, grids()), sample(5, two), rows=[1, 2], sizes=GRID)
    assert batch["placeholders"] == {"images": (6, 5)}
    counts = batch["modality_counts"]["images"]
    assert counts.placeholders == (6, 0, 5) and counts.placeholders_per_position == (6, 5)
    assert counts.items == (1, 0, 2) and counts.own == range(3)


def test_packed_positions_in_space_and_extras_stay_those_of_samples() -> None:
    space = torch.arange(6).view(3, 2)
    first = sample(0, None, position_ids=space, weight=0.5, numbers=torch.tensor([1.0, 2.0]), source="a")
    second = sample(1, grids((1, 2, 2)), position_ids=torch.zeros(3, 3, dtype=torch.int64), weight=2.0)
    second |= {"numbers": torch.tensor([3.0, 4.0, 5.0]), "source": "b"}
    (batch,) = collate(
        first, second, rows=[2], sizes=GRID, position_type="mrope", extra_keys=("weight", "numbers", "source")
    )
    assert batch["position_ids"].shape == (3, 1, 5)
    assert torch.equal(batch["position_ids"][:, 0], torch.cat([space, torch.zeros(3, 3, dtype=torch.int64)], dim=1))
    assert batch["weight"].tolist() == [0.5, 2.0] and batch["source"] == ("a", "b")
    assert batch["numbers"].tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]


def test_sums_over_samples_are_the_same_packed_and_padded() -> None:
    samples = (sample(6, grids((1, 4, 6))), sample(0, None), sample(5, grids((1, 2, 2), (2, 4, 2))))
    (packed,), (padded,) = collate(*samples, rows=[1, 2], sizes=GRID), collate(*samples, sizes=GRID)
    for batch in (packed, padded):
        assert sum_by_sample(batch["loss_mask"], batch).tolist() == [1.0, 1.0, 1.0]
        assert sum_by_sample(batch["input_ids"] == IMAGE, batch).tolist() == [6, 0, 5]


def test_a_sample_of_another_length_than_was_told_is_refused() -> None:
    collator = MicrobatchCollator(plan(1), SampleFormat(), packing=Packing(budget=9, lengths=np.array([4])))
    request = SampleRequest(index=0, position=0, drawn=0, modules=frozenset({"language"}), epoch=0, is_padding=False)
    with pytest.raises(DataError, match=r"Sample 0 has 2 tokens .* given as 4 by length\(0\)"):
        collator([(request, {"input_ids": [1, 2], "labels": [2, 3]})])
