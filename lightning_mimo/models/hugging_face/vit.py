"""Vision transformers of CLIP's kind as Megatron modules, with tensor and pipeline parallelism."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.errors import DataError
from lightning_mimo.layers.attention import AttentionKind
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.models.hugging_face.decoder import BuildOptions
from lightning_mimo.models.patches import vit_layer
from lightning_mimo.models.sizes import TransformerSize, check_sizes, stage_ends, transformer_config
from lightning_mimo.models.vision import ImagePatches, to_patches
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.weights.rules import InterleaveGroups, Rename, Rule, Source


@dataclass(frozen=True, kw_only=True)
class VitFeatures:
    """What is before and after the layers of a vision transformer.

    Attributes:
        patches: of an image.
        class_token: whether one learned token comes before the patches.
        patch_bias: whether the embedding of patches has a bias.
        pre_norm: whether there is a norm before the first layer.
        drop_first: whether the first token is left out of the features.
        final_norm: whether there is a norm after the last layer.
    """

    patches: ImagePatches
    class_token: bool
    patch_bias: bool
    pre_norm: bool
    drop_first: bool
    final_norm: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of an image inside of the transformer."""
        return self.patches.num_patches + self.class_token


class FeatureVit(MegatronModule):
    """Images -> the tokens' hidden states after the last of the layers that are built."""

    def __init__(
        self,
        transformer_config: TransformerConfig,
        features: VitFeatures,
        pg_collection: ProcessGroupCollection,
        attention: AttentionKind = "sdpa",
    ) -> None:
        """
        Args:
            transformer_config: of the layers.
            features: what is around them.
            pg_collection: the module's process groups; one pipeline stage of several may be built.
            attention: as for TransformerSize.
        """
        super().__init__(config=transformer_config)
        self.features = features
        self._first = pg_collection.pp.rank() == 0
        self._last = pg_collection.pp.rank() == pg_collection.pp.size() - 1
        if self._first:
            self._build_embeddings(transformer_config)
        self.decoder = TransformerBlock(
            config=transformer_config,
            spec=vit_layer(attention),
            pre_process=self._first,
            post_process=self._last,
            post_layer_norm=features.final_norm,
            pg_collection=pg_collection,
        )

    def example_inputs(self, items: int) -> tuple[dict[str, torch.Tensor], int]:
        """Black images as :meth:`forward` takes them, and the embeddings of each, for estimates without data."""
        patches = self.features.patches
        return {"pixel_values": patches.blank(items)}, patches.tokens_per_item

    def _build_embeddings(self, config: TransformerConfig) -> None:
        dtype, device = config.params_dtype, torch.cuda.current_device()
        features, hidden = self.features, config.hidden_size

        def learned(*shape: int) -> torch.nn.Parameter:
            parameter = torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))
            torch.nn.init.normal_(parameter, std=config.embedding_init_method_std)
            return parameter

        self.patch_embedding = torch.nn.Linear(
            features.patches.values_per_patch, hidden, bias=features.patch_bias, dtype=dtype, device=device
        )
        self.positions = learned(features.tokens, hidden)
        self.class_token = learned(hidden) if features.class_token else None
        self.pre_norm = (
            torch.nn.LayerNorm(hidden, eps=config.layernorm_epsilon, dtype=dtype, device=device)
            if features.pre_norm
            else None
        )

    def forward(
        self, pixel_values: torch.Tensor | None = None, hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode images, or continue from the stage before.

        Args:
            pixel_values: ``[n, channels, image_size, image_size]``, on the first stage; n may be 0.
            hidden_states: ``[tokens, n, hidden]`` from the stage before, on later stages.

        Returns:
            ``[n, tokens, hidden]`` on the last stage, less the first token where that is left out; ``[tokens, n,
            hidden]`` before.

        Raises:
            DataError: for images of another size.
        """
        if self._first:
            assert pixel_values is not None, "the first stage is given images"
            hidden_states = self.decoder(self._embed(pixel_values), attention_mask=None)
        else:
            self.decoder.set_input_tensor(hidden_states)
            hidden_states = self.decoder(None, attention_mask=None)
        if not self._last:
            return hidden_states
        return hidden_states[int(self.features.drop_first) :].transpose(0, 1)

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[n, channels, size, size] -> [tokens, n, hidden]``"""
        patches = self.features.patches
        expected = (patches.channels, patches.image_size, patches.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise DataError(
                f"pixel_values has the shape {tuple(pixel_values.shape)}, but this encoder takes images of {expected} "
                f"(channels, height, width). Use the image processor of the model's folder."
            )
        # Image processors make float32, whatever the precision.
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        embedded = self.patch_embedding(to_patches(pixel_values, patches))
        if self.class_token is not None:
            embedded = torch.cat([self.class_token.expand(len(embedded), 1, -1), embedded], dim=1)
        embedded = embedded + self.positions
        if self.pre_norm is not None:
            embedded = self.pre_norm(embedded)
        return embedded.transpose(0, 1).contiguous()


class VitTower:
    """A vision transformer of CLIP's kind, up to the layer whose features are used."""

    def __init__(self, size: TransformerSize, features: VitFeatures, *, layers_in_files: int) -> None:
        """
        Args:
            size: of the layers that are used.
            features: what is around them.
            layers_in_files: layers that the files hold; the model has no use for those after ``size.num_layers``.
        """
        self.size = size
        self.features = features
        self._layers_in_files = layers_in_files

    @property
    def width(self) -> int:
        """Of a feature."""
        return self.size.hidden_size

    @property
    def tokens(self) -> int:
        """Features of an image."""
        return self.features.tokens - self.features.drop_first

    def check(self, layout: MimoLayout, module: str) -> None:
        """Refuse a layout that the transformer does not divide over.

        Raises:
            LayoutError: with the arithmetic.
        """
        check_sizes(layout, module, self._size(layout, module), sequence_parallel=False)

    def encoder_spec(self, infra: MimoModelInfra, module: str, options: BuildOptions) -> ModuleSpec:
        """ModuleSpec of the encoder."""
        return ModuleSpec(
            module=FeatureVit,
            params={
                "transformer_config": transformer_config(infra.layout, module, self._size(infra.layout, module)),
                "features": self.features,
                "pg_collection": infra.pg_collections.get(module),
                "attention": options.attention,
            },
        )

    def rules(self, target: str, source: str, shapes: object) -> list[Rule]:
        """Rules of the encoder.

        Args:
            target: prefix of its parameters.
            source: prefix of its tensors in the files.
            shapes: of the files' tensors; not needed.
        """
        hidden, patches = self.size.hidden_size, self.features.patches
        kernel = (hidden, patches.channels, patches.patch_size, patches.patch_size)
        embeddings = f"{source}embeddings."
        patch = Source(name=f"{embeddings}patch_embedding.weight", shape=kernel, flatten=True)
        positions = Source(name=f"{embeddings}position_embedding.weight", shape=(self.features.tokens, hidden))
        rules = [Rename(f"{target}patch_embedding.weight", patch), Rename(f"{target}positions", positions)]
        vectors = {}
        if self.features.patch_bias:
            vectors["patch_embedding.bias"] = "embeddings.patch_embedding.bias"
        if self.features.class_token:
            vectors["class_token"] = "embeddings.class_embedding"
        if self.features.pre_norm:  # spelled like this in all files of CLIP
            vectors |= {f"pre_norm.{kind}": f"pre_layrnorm.{kind}" for kind in ("weight", "bias")}
        if self.features.final_norm:
            vectors |= {f"decoder.final_layernorm.{kind}": f"post_layernorm.{kind}" for kind in ("weight", "bias")}
        rules += [
            Rename(target + ours, Source(name=source + their, shape=(hidden,))) for ours, their in vectors.items()
        ]
        for layer in range(self.size.num_layers):
            rules += self._layer_rules(f"{target}decoder.layers.{layer}.", f"{source}encoder.layers.{layer}.")
        return rules

    def _layer_rules(self, ours: str, theirs: str) -> list[Rule]:
        hidden, ffn = self.size.hidden_size, self.size.ffn
        rules = []
        for kind, columns in (("weight", (hidden,)), ("bias", ())):
            qkv = [Source(name=f"{theirs}self_attn.{each}_proj.{kind}", shape=(hidden, *columns)) for each in "qkv"]
            target = f"{ours}self_attention.linear_qkv.{kind}"
            rules.append(InterleaveGroups(target, qkv, groups=self.size.num_attention_heads))
            wide = (ffn, *columns)
            narrow = (hidden, ffn) if columns else (hidden,)
            for name, their, shape in (
                ("self_attention.linear_proj", "self_attn.out_proj", (hidden, *columns)),
                ("mlp.linear_fc1", "mlp.fc1", wide),
                ("mlp.linear_fc2", "mlp.fc2", narrow),
                ("input_layernorm", "layer_norm1", (hidden,)),
                ("pre_mlp_layernorm", "layer_norm2", (hidden,)),
            ):
                rules.append(Rename(f"{ours}{name}.{kind}", Source(name=f"{theirs}{their}.{kind}", shape=shape)))
        return rules

    def kept(self, source: str) -> list[str]:
        """Patterns of the tensors that the model has no use for."""
        unused = range(self.size.num_layers, self._layers_in_files)
        return [
            *(f"{source}encoder.layers.{layer}.*" for layer in unused),
            f"{source}post_layernorm.*",
            f"{source}head.*",
            f"{source}embeddings.position_ids",
        ]

    def _size(self, layout: MimoLayout, module: str) -> TransformerSize:
        first, last = stage_ends(self.size.num_layers, layout.modules[module].pp)
        return replace(self.size, first_stage_layers=first, last_stage_layers=last)
