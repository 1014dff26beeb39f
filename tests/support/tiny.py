"""The smallest vision-language model that every layout of a few ranks can hold. For use inside a rank."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig

from lightning_mimo.cpu import megatron_on_cpu
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import ModuleParallelism
from lightning_mimo.mimo.model import RaggedMimoModel, build_mimo_model
from lightning_mimo.models.vision import ImagePatches
from lightning_mimo.models.vision_language import TransformerSize, vision_language_config
from lightning_mimo.optim.ddp import wrap_with_ddp
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.parallel.random import seed_megatron

IMAGE_PATCHES = ImagePatches(image_size=4, patch_size=2, channels=1)
VOCAB_SIZE = 16
MAX_SEQUENCE_LENGTH = 8
IMAGE_TOKEN_ID = 15

# Two layers and four heads: enough for pp=2 and tp=4.
_SIZE = TransformerSize(num_layers=2, hidden_size=16, num_attention_heads=4, ffn_hidden_size=16)


def tiny_model(infra: MimoModelInfra, *, seed: int = 1) -> RaggedMimoModel:
    """The modules `images` and `language` of this rank, not wrapped. Collective over the world."""
    config = vision_language_config(
        infra,
        patches=IMAGE_PATCHES,
        vision=_SIZE,
        language=_SIZE,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        image_token_id=IMAGE_TOKEN_ID,
    )
    return build_mimo_model(config, infra, seed=seed)


@contextmanager
def tiny_world(
    modules: Mapping[str, ModuleParallelism],
    *,
    colocate: bool = False,
    ddp: DistributedDataParallelConfig | None = None,
    seed: int = 1,
) -> Iterator[tuple[MimoModelInfra, RaggedMimoModel]]:
    """Grids and model of a layout, with megatron-core on the CPU while this is open. Collective over the world.

    Args:
        modules: sizes of `images` and `language`.
        colocate: put both on all ranks.
        ddp: how the modules are wrapped in DDP; without it they stay bare.
        seed: of the weights and of the random numbers drawn in training.
    """
    layout = MimoLayout.resolve(modules, world_size=dist.get_world_size(), colocate=colocate)
    with megatron_on_cpu():
        seed_megatron(layout, dist.get_rank(), seed=seed)
        infra = MimoModelInfra.build(layout)
        model = tiny_model(infra, seed=seed)
        if ddp is not None:
            wrap_with_ddp(model, infra, dict.fromkeys(layout.modules, ddp))
        yield infra, model
        # Only after success: a rank that raised must not wait for the others.
        infra.destroy()
