"""Positions of tokens that are written: one above the largest of the prompt, as transformers counts."""

from __future__ import annotations

import torch

from lightning_mimo.schedule.generation import _continued


def test_usual_positions_go_on() -> None:
    positions = torch.arange(5).expand(2, 5)
    assert _continued(positions, torch.tensor([3, 5]), 2).tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 2


def test_positions_of_a_sample_go_on_behind_its_prompt() -> None:
    # The second prompt has 2 tokens; what was given for its answer is not looked at.
    positions = torch.tensor([[4, 4, 9, 7], [1, 5, 90, 91]])
    assert _continued(positions, torch.tensor([4, 2]), 2).tolist() == [[4, 4, 9, 7, 10, 11], [1, 5, 6, 7, 8, 9]]


def test_positions_in_space_go_on_above_the_largest_of_all_rows() -> None:
    positions = torch.tensor([[[0, 1, 1]], [[0, 1, 1]], [[0, 1, 2]]])
    assert _continued(positions, torch.tensor([3]), 2).tolist() == [
        [[0, 1, 1, 3, 4]],
        [[0, 1, 1, 3, 4]],
        [[0, 1, 2, 3, 4]],
    ]
