"""Which samples go where: shards, batch sizes that do not divide, and what one rank loads."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_mimo.errors import LayoutError
from lightning_mimo.layout.batch_plan import RankBatchPlan, shard, validate_batch_sizes
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism

# On a machine with other work an example may take its time.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plans(
    modules: dict[str, ModuleParallelism],
    world_size: int,
    *,
    colocate: bool = False,
    batch: int = 8,
    microbatches: int = 2,
) -> list[RankBatchPlan]:
    layout = MimoLayout.resolve(modules, world_size=world_size, colocate=colocate)
    return [
        RankBatchPlan.build(layout, rank, global_batch_size=batch, num_microbatches=microbatches)
        for rank in range(world_size)
    ]


def test_shard_is_the_picture_in_the_module_docstring():
    images = [
        [shard(global_batch_size=8, num_microbatches=2, dp=2, dp_rank=d, microbatch=m) for d in range(2)]
        for m in range(2)
    ]
    assert images == [[range(2), range(2, 4)], [range(4, 6), range(6, 8)]]
    assert shard(global_batch_size=8, num_microbatches=2, dp=1, dp_rank=0, microbatch=1) == range(4, 8)


def test_micro_batch_size_of_each_module():
    sizes = validate_batch_sizes({"images": 4, "language": 2}, global_batch_size=16, num_microbatches=2)
    assert sizes == {"images": 2, "language": 4}


@pytest.mark.parametrize("value", [0, -8, True, 8.0, "8", None])
def test_batch_numbers_must_be_positive_whole_numbers(value):
    with pytest.raises(LayoutError, match=f"^global_batch_size={value!r} must be a whole number of at least 1"):
        validate_batch_sizes({"language": 1}, global_batch_size=value, num_microbatches=1)
    with pytest.raises(LayoutError, match=f"^num_microbatches={value!r} must be a whole number of at least 1"):
        validate_batch_sizes({"language": 1}, global_batch_size=8, num_microbatches=value)


def test_batch_that_does_not_divide_names_the_module_the_arithmetic_and_batches_that_do():
    message = (
        r"global_batch_size=14 does not divide over module 'images': num_microbatches \* dp = 2 \* 4 = 8, and "
        r"14 / 8 = 1\.75\. Use global_batch_size=8 or 16, or other num_microbatches"
    )
    with pytest.raises(LayoutError, match=message):
        validate_batch_sizes({"language": 1, "images": 4}, global_batch_size=14, num_microbatches=2)


def test_batch_smaller_than_one_sample_each_offers_only_a_larger_one():
    with pytest.raises(LayoutError, match="Use global_batch_size=8, or other"):
        validate_batch_sizes({"language": 1, "images": 4}, global_batch_size=2, num_microbatches=2)


@unhurried
@given(
    dp=st.dictionaries(st.sampled_from(["images", "audio", "language"]), st.integers(1, 6), min_size=1),
    batch=st.integers(1, 100),
    microbatches=st.integers(1, 5),
)
def test_batch_sizes_are_exact_or_the_ones_offered_are(dp, batch, microbatches):
    try:
        sizes = validate_batch_sizes(dp, global_batch_size=batch, num_microbatches=microbatches)
    except LayoutError as error:
        offered = str(error).partition("Use global_batch_size=")[2].partition(",")[0].split(" or ")
        assert offered
        for number in offered:
            validate_batch_sizes(dp, global_batch_size=int(number), num_microbatches=microbatches)
    else:
        assert all(sizes[name] * microbatches * dp[name] == batch for name in dp)


def test_plan_holds_only_the_modules_of_its_rank():
    images_0, images_1, language = plans({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=1)}, 3)
    assert images_0.shards == {"images": (range(2), range(4, 6))}
    assert images_1.shards == {"images": (range(2, 4), range(6, 8))}
    assert language.shards == {"language": (range(4), range(4, 8))}
    assert [plan.num_microbatches for plan in (images_0, images_1, language)] == [2, 2, 2]


def test_encoder_rank_reads_the_text_of_its_own_samples():
    images_0, images_1, language = plans({"images": ModuleParallelism(dp=2), "language": ModuleParallelism(dp=1)}, 3)
    assert images_0.samples_on_rank(1) == images_0.text_samples(1) == range(4, 6)
    assert images_1.samples_on_rank(0) == images_1.text_samples(0) == range(2, 4)
    assert language.samples_on_rank(0) == language.text_samples(0) == range(4)


def test_ranks_of_one_replica_share_a_plan():
    _, *language = plans({"images": ModuleParallelism(dp=1), "language": ModuleParallelism(tp=2, pp=2, dp=2)}, 9)
    by_replica = [[plan.shards for i, plan in enumerate(language) if i // 2 % 2 == d] for d in range(2)]
    assert all(shards == by_replica[0][0] for shards in by_replica[0])
    assert all(shards == by_replica[1][0] for shards in by_replica[1])
    assert by_replica[0][0] != by_replica[1][0]


def test_colocated_rank_loads_the_larger_shard():
    encodes_fewer = plans(
        {"images": ModuleParallelism(dp=4), "language": ModuleParallelism(tp=2, dp=2)}, 4, colocate=True
    )[3]
    assert encodes_fewer.shards == {"images": (range(3, 4), range(7, 8)), "language": (range(2, 4), range(6, 8))}
    assert encodes_fewer.samples_on_rank(0) == encodes_fewer.text_samples(0) == range(2, 4)

    encodes_more = plans(
        {"images": ModuleParallelism(tp=4, dp=1), "language": ModuleParallelism(tp=2, dp=2)}, 4, colocate=True
    )[3]
    assert encodes_more.samples_on_rank(0) == range(4)
    assert encodes_more.text_samples(0) == range(2, 4)


def test_needed_by_names_the_modules_that_use_a_sample():
    plan = plans({"images": ModuleParallelism(dp=4), "language": ModuleParallelism(tp=2, dp=2)}, 4, colocate=True)[3]
    assert plan.needed_by(2, 0) == {"language"}
    assert plan.needed_by(3, 0) == {"images", "language"}
    assert plan.needed_by(0, 0) == frozenset()
    assert plan.needed_by(3, 1) == frozenset()


def test_only_the_first_stage_of_an_encoder_loads_its_inputs():
    first, second, language = plans({"images": ModuleParallelism(pp=2), "language": ModuleParallelism()}, 3)
    assert first.needed_by(0, 0) == {"images"}
    assert second.needed_by(0, 0) == frozenset()
    assert second.shards == first.shards
    assert language.needed_by(0, 0) == {"language"}


def test_plan_refuses_a_batch_that_does_not_divide():
    with pytest.raises(LayoutError, match=r"does not divide over module 'images': .* 2 \* 2 = 4"):
        plans({"images": ModuleParallelism(dp=2), "language": ModuleParallelism()}, 3, batch=6)
