"""The image encoders of CLIP and SigLIP."""

from __future__ import annotations

from typing import Any

from lightning_mimo.models.hugging_face.config_values import activation_of, refuse
from lightning_mimo.models.hugging_face.vit import VitFeatures, VitTower
from lightning_mimo.models.sizes import TransformerSize
from lightning_mimo.models.vision import ImagePatches


def clip_tower(config: Any, *, layer: int, drop_first: bool) -> VitTower:
    """Of a CLIPVisionConfig; arguments as for :func:`lightning_mimo.models.hugging_face.towers.tower_of`."""
    return _tower(config, layer=layer, drop_first=drop_first, clip=True)


def siglip_tower(config: Any, *, layer: int, drop_first: bool) -> VitTower:
    """Of a SiglipVisionConfig; arguments as for :func:`lightning_mimo.models.hugging_face.towers.tower_of`."""
    return _tower(config, layer=layer, drop_first=drop_first, clip=False)


def siglip_tower_with_norm(config: Any) -> VitTower:
    """Of the config of an encoder like SigLIP's: the features after its last layer and norm."""
    return _tower(config, layer=config.num_hidden_layers, drop_first=False, clip=False, final_norm=True)


def _tower(config: Any, *, layer: int, drop_first: bool, clip: bool, final_norm: bool = False) -> VitTower:
    if config.attention_dropout:
        raise refuse(config, f"attention_dropout={config.attention_dropout}", "Set it to 0.0 in config.json.")
    size = TransformerSize(
        num_layers=layer,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.intermediate_size,
        activation=activation_of(config, "hidden_act"),
        layernorm_epsilon=config.layer_norm_eps,
    )
    features = VitFeatures(
        patches=ImagePatches(
            image_size=config.image_size,
            patch_size=config.patch_size,
            channels=config.num_channels,
            tokens_per_image=(config.image_size // config.patch_size) ** 2,
        ),
        class_token=clip,
        patch_bias=not clip,
        pre_norm=clip,
        drop_first=drop_first,
        final_norm=final_norm,
    )
    return VitTower(size, features, layers_in_files=config.num_hidden_layers)
