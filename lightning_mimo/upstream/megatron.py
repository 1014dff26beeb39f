"""What is private in megatron-core. Its public names are as little promised: its version is pinned."""

from __future__ import annotations

from lightning_mimo.upstream import Attribute

_MODEL = "megatron.core.models.mimo.model.base.MimoModel"
_COMMUNICATOR = "megatron.core.pipeline_parallel.multimodule_communicator.MultiModulePipelineCommunicator"
_PARALLEL_STATE = "megatron.core.parallel_state"

ATTRIBUTES = (
    # RaggedMimoModel: samples with different numbers of images, and modules that are on other ranks
    Attribute(_MODEL, "_initialize_submodules", "encoders are built on their ranks only"),
    Attribute(_MODEL, "_initialize_language_model", "the language model is built on its ranks only"),
    Attribute(_MODEL, "_forward_encoders", "embeddings are cut to each rank's own samples"),
    Attribute(_MODEL, "_attach_modality_split_sizes", "items are counted by our bridges"),
    Attribute(_MODEL, "_has_encoder_tokens", "an encoder runs on all ranks alike, also without an item"),
    Attribute(_MODEL, "_empty_encoder_output", "what stands for the output where there is no item"),
    Attribute(_MODEL, "_build_colocated_communicators", "our bridges take their place"),
    Attribute(_MODEL, "_apply_colocated_comms", "our bridges take their place"),
    # MimoPipelineCommunicator
    Attribute(_COMMUNICATOR, "_build_bridge_comms", "our bridges take their place"),
    Attribute(_COMMUNICATOR, "_build_rank_module_info_map", "where our links between stages are put"),
    # Gradients, optimizer, generators
    Attribute(
        "megatron.core.distributed.distributed_data_parallel.DistributedDataParallel",
        "_make_backward_post_hook",
        "to start reductions in the same order on all replicas",
    ),
    Attribute(
        "megatron.core.optimizer.optimizer.MegatronOptimizer",
        "_filter_grads_for_norm",
        "the gradients that count once, by its own rules",
    ),
    Attribute(
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer",
        "_get_model_param_range_map",
        "which part of a parameter this rank's optimizer holds",
    ),
    Attribute(_PARALLEL_STATE, "_GLOBAL_MEMORY_BUFFER", "whether there is scratch space for tensor-parallel layers"),
    Attribute(_PARALLEL_STATE, "_set_global_memory_buffer", "makes it, as initialize_model_parallel would have"),
)
