"""The table of the whole model, from what ranks say they hold."""

from __future__ import annotations

from lightning.pytorch.callbacks import ModelSummary, RichModelSummary, Timer

from lightning_mimo.callbacks.model_summary import (
    HeldModules,
    HeldParameter,
    MimoModelSummary,
    draw_summary,
    replace_model_summary,
)


class Own(ModelSummary):
    """A user's."""


def held(path: str, whole: int, here: int, *, trainable: bool = True) -> HeldParameter:
    return HeldParameter(path=path, whole=whole, here=here, size=4, trainable=trainable)


def test_lightnings_summaries_are_replaced_and_users_own_are_not() -> None:
    timer, own = Timer("00:00:01:00"), Own()
    callbacks = [ModelSummary(max_depth=3), timer, RichModelSummary(), own]
    replace_model_summary(callbacks)
    assert [type(each) for each in callbacks] == [MimoModelSummary, Timer, MimoModelSummary, Own]
    assert callbacks[0]._max_depth == 3
    assert callbacks[1] is timer and callbacks[3] is own


def test_shards_are_added_up_and_replicas_are_not() -> None:
    vision = HeldModules(
        parameters=[held("images.encoders.vit.weight", 2000, 2000, trainable=False), held("images.out.bias", 100, 100)],
        types={"images": "Vision"},
    )
    stages = [
        HeldModules(parameters=[held(f"language.layers.{stage}.weight", 3000, 1500)], types={"language": "GPT"})
        for stage in (0, 0, 1, 1)
    ]
    lines = draw_summary([vision, vision, *stages], ["images", "language"], max_depth=2).splitlines()
    assert [line.split() for line in lines if not line.startswith("---")] == [
        ["name", "type", "parameters", "trainable", "ranks", "per", "rank"],
        ["images", "Vision", "2.1", "K", "100", "0-1", "2.1", "K"],
        ["images.encoders", "2.0", "K", "frozen", "0-1", "2.0", "K"],
        ["images.out", "100", "all", "0-1", "100"],
        ["language", "GPT", "6.0", "K", "all", "2-5", "1.5", "K"],
        ["language.layers", "6.0", "K", "all", "2-5", "1.5", "K"],
        ["all", "8.1", "K", "6.1", "K", "0-5", "1.5", "K", "to", "2.1", "K"],
        ["0.0324", "MB", "of", "parameters", "in", "all"],
    ]


def test_ranks_of_a_module_need_not_lie_together() -> None:
    one = HeldModules(parameters=[held("images.a", 8, 8)], types={"images": "Vision"})
    other = HeldModules(parameters=[held("language.a", 8, 8)], types={"language": "GPT"})
    table = draw_summary([one, other, one, one], ["images", "language"], max_depth=1)
    assert "0, 2-3" in table
