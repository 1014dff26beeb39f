"""The public face, pinned: a change here is a change for users."""

from __future__ import annotations

import inspect
from inspect import Parameter

import pytest

import lightning_mimo
import lightning_mimo.data
import lightning_mimo.models
import lightning_mimo.models.hugging_face

PUBLIC_NAMES = [
    "CheckpointError",
    "CheckpointWriteError",
    "Checks",
    "ConfigError",
    "DataError",
    "HuggingFaceModule",
    "ItemSizes",
    "LayoutError",
    "MimoError",
    "MimoLayout",
    "MimoModelInfra",
    "MimoModule",
    "MimoPrecision",
    "MimoStrategy",
    "ModuleParallelism",
    "Monitoring",
    "NcclGroupOptions",
    "NcclOptions",
    "NonFiniteError",
    "OptimizerOverride",
    "PerModuleLR",
    "Ragged",
    "ReplicaError",
    "Saving",
    "StepTrace",
    "build_pg_collection_for_schedule",
    "fan_in_normal_",
    "finalize_model_grads_multimodule",
    "get_module_to_grid_tuple",
    "is_current_rank_in_grid",
    "multimodule_no_sync",
    "sum_by_sample",
    "unwrap_mimo_model",
    "validate_data_loader_contract",
    "validate_no_stub_ranks",
    "zero_grad_buffer_for_multimodule",
]

MODEL_NAMES = [
    "AudioEncoder",
    "ClipPatches",
    "Encoder",
    "ImagePatches",
    "PatchEncoder",
    "PipelinedAudioSubmodules",
    "PipelinedSubmodules",
    "PipelinedVisionSubmodules",
    "Recompute",
    "TransformerSize",
    "VisionEncoder",
    "audio_spec",
    "encoder_spec",
    "gpt_spec",
    "multimodal_config",
    "transformer_config",
    "vision_language_config",
    "vision_spec",
]

DATA_NAMES = ["ChatData", "ChatDataset", "ParquetShards", "ShardSampler", "StreamDataset", "TarShards"]
FAMILY_NAMES = [
    "PretrainedModel",
    "TextModel",
    "llama_size",
    "refuse",
    "register",
    "register_tower",
    "text_model",
]

POSITIONAL = Parameter.POSITIONAL_OR_KEYWORD
KEYWORD = Parameter.KEYWORD_ONLY
REQUIRED = Parameter.empty

SIGNATURES = {
    "unwrap_mimo_model": [("model", POSITIONAL, REQUIRED)],
    "is_current_rank_in_grid": [("grid", POSITIONAL, REQUIRED)],
    "get_module_to_grid_tuple": [("mimo_model", POSITIONAL, REQUIRED), ("infra", POSITIONAL, REQUIRED)],
    "build_pg_collection_for_schedule": [("infra", POSITIONAL, REQUIRED)],
    "multimodule_no_sync": [("module_to_grid_tuple", KEYWORD, REQUIRED)],
    "finalize_model_grads_multimodule": [
        ("model", POSITIONAL, REQUIRED),
        ("num_tokens", POSITIONAL, None),
        ("pg_collection", POSITIONAL, None),
        ("force_all_reduce", POSITIONAL, None),
        ("infra", KEYWORD, REQUIRED),
        ("module_to_grid_tuple", KEYWORD, REQUIRED),
    ],
    "zero_grad_buffer_for_multimodule": [("module_to_grid_tuple", POSITIONAL, REQUIRED)],
    "validate_no_stub_ranks": [("module_to_grid_map", POSITIONAL, REQUIRED), ("world_size", POSITIONAL, REQUIRED)],
    "validate_data_loader_contract": [
        ("infra", POSITIONAL, REQUIRED),
        ("global_batch_size", POSITIONAL, REQUIRED),
        ("micro_batch_size", POSITIONAL, REQUIRED),
        ("num_microbatches", POSITIONAL, REQUIRED),
    ],
}


def test_public_names_are_pinned():
    assert lightning_mimo.__all__ == dir(lightning_mimo) == PUBLIC_NAMES
    assert lightning_mimo.models.__all__ == dir(lightning_mimo.models) == MODEL_NAMES
    assert lightning_mimo.data.__all__ == dir(lightning_mimo.data) == DATA_NAMES
    families = lightning_mimo.models.hugging_face
    assert sorted(families.__all__) == sorted(dir(families)) == FAMILY_NAMES
    assert all(getattr(families, name).__name__ == name for name in FAMILY_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name_is_importable_from_the_package(name):
    assert getattr(lightning_mimo, name).__name__ == name


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_model_name_is_importable_from_models(name):
    assert getattr(lightning_mimo.models, name).__name__ == name


@pytest.mark.parametrize("name", DATA_NAMES)
def test_data_name_is_importable_from_data(name):
    assert getattr(lightning_mimo.data, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(
        AttributeError,
        match=r"No lightning_mimo attribute MimoTrainer",
    ):
        _ = lightning_mimo.MimoTrainer


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_the_reference_page(name):
    parameters = inspect.signature(getattr(lightning_mimo, name)).parameters.values()
    assert [(each.name, each.kind, each.default) for each in parameters] == SIGNATURES[name]
