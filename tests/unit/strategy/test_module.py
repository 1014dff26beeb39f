"""What a MimoModule says of its samples."""

from __future__ import annotations

import pytest
import torch

from lightning_mimo import ConfigError, MimoModule
from lightning_mimo.mimo.model_check import check_one_encoder


@pytest.mark.parametrize("key", ["labels", "attention_mask", "token_order", "sample_indices"])
def test_key_that_has_a_meaning_cannot_be_declared_as_another(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"extra_keys=\['weight', '{key}'\] holds '{key}', which has a meaning of its"
    ):
        MimoModule(extra_keys=["weight", key])


def test_one_name_is_no_list_of_names() -> None:
    with pytest.raises(ConfigError, match=r"extra_keys='weight' is a string\. Give a list"):
        MimoModule(extra_keys="weight")


def test_encoders_that_share_a_module_are_refused() -> None:
    check_one_encoder("images", [torch.nn.Linear(1, 1)])
    with pytest.raises(
        ValueError, match=r"Module 'images' has 2 encoders \(Linear, Identity\).*a module and a placeholder"
    ):
        check_one_encoder("images", [torch.nn.Linear(1, 1), torch.nn.Identity()])
