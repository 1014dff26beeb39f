"""The MimoModel that the strategy trains, built on this rank's modules only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.config.role import ModuleLayout, ModuleStageInfo, RankRole
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch.nn.functional import pad

from lightning_mimo.comm.bridges import RaggedColocatedBridge
from lightning_mimo.errors import DataError
from lightning_mimo.layers.balancing_loss import balance_experts, check_experts, packed_token_weights, token_weights
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import ModalityCounts, TokenOrder, combine
from lightning_mimo.mimo.dtypes import FLOAT32, DtypePolicy, transformer_configs
from lightning_mimo.mimo.initialization import RecordInitializers, initialize_by_name
from lightning_mimo.mimo.model_check import (
    check_batch_norm,
    check_dropout,
    check_embedding,
    check_one_encoder,
    check_stages,
)
from lightning_mimo.mimo.packing import check_packing, packing_arguments
from lightning_mimo.mimo.positions import follow_positions
from lightning_mimo.mimo.recompute import let_recomputed_layers_train
from lightning_mimo.parallel.host_copies import to_device
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.parallel.random import default_generators_kept, seed_default_generators, seed_for


class RaggedMimoModel(MimoModel):
    """megatron-core's MimoModel for samples with different numbers of items, with fan-in and fan-out bridges."""

    # forward_backward_no_pipelining reads this attribute, but MimoModel does not set it.
    model_type = ModelType.encoder_or_decoder

    def __init__(self, mimo_config: MimoModelConfig, infra: MimoModelInfra, *, seed: int) -> None:
        """Collective over the world if modules are colocated with different data-parallel sizes.

        Args:
            mimo_config: specs of all modules; ``module_to_grid_map`` must be ``infra.module_to_grid_map``.
            infra: grids and process groups.
            seed: the run's seed.
        """
        self._infra = infra
        self._seed = seed
        self._modality_counts: Mapping[str, ModalityCounts] = {}
        self._token_order: TokenOrder | None = None
        self._uniform: set[torch.nn.Module] = set()  # encoders whose last output was [items, tokens, hidden]
        groups = infra.pg_collections.get(LANGUAGE)
        super().__init__(mimo_config, cp_group=groups.cp if groups else None, tp_group=groups.tp if groups else None)
        self._sequence_divisor = groups.tp.size() if groups and self.config.sequence_parallel else 1
        self._rotary = follow_positions(self.language_model) if groups else None
        self._balance = balance_experts(self.language_model) if groups else None
        self._text_token = next(token for token in count() if token not in self.special_token_ids.values())
        for name in self.modality_submodules:
            for encoder in _encoders_of(self, name):
                encoder.register_forward_hook(partial(self._look_at_output, name), with_kwargs=True)

    def _look_at_output(
        self, name: str, encoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Record whether an encoder made equally many embeddings per item, and reject a wrong dimension order."""
        # As in upstream's encode: the first element of a tuple holds the embeddings.
        embeddings = output[0] if isinstance(output, tuple) else output
        counts = self._modality_counts.get(name)
        items = 0 if counts is None else sum(counts.items) or 1  # without items, a stand-in is encoded
        self._uniform.discard(encoder)
        if embeddings.ndim == 3 and embeddings.size(0) == items:
            self._uniform.add(encoder)
        is_whole = self.role.is_first_stage(name) and self.role.is_last_stage(name)
        if counts is not None and is_whole and embeddings.ndim == 3 and embeddings.size(0) != items:
            raise DataError(
                f"Module {name!r}: {type(encoder).__name__} was given {items} items and returned embeddings of "
                f"the shape {tuple(embeddings.shape)}. They must be batch first, (items, tokens, hidden); otherwise "
                f"samples would get features of other samples. Megatron's transformers return (tokens, items, hidden): "
                f"add .transpose(0, 1)."
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        modality_inputs: dict[str, dict[str, Any]] | None = None,
        packing_kwargs: dict[str, Any] | None = None,
        *,
        modality_counts: Mapping[str, ModalityCounts] | None = None,
        token_order: TokenOrder | None = None,
        custom_positions: bool = False,
        lengths: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
        packed_lengths: Sequence[int] | None = None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Run the forward pass as :meth:`MimoModel.forward`, given the number of embeddings of each sample.

        Sequences may have any length. Sequence parallelism requires a multiple of tp, so they are padded with text
        tokens at the end, and the output is truncated to the original length.

        Args:
            input_ids: int64 ``[b, s]``.
            position_ids: int64 ``[b, s]``, or ``[3, b, s]`` for multimodal rotary positions.
            attention_mask: ``None`` for causal attention.
            loss_mask: ``[b, s]``, returned unchanged.
            labels: int64 ``[b, s]``; if given, the language module returns token losses instead of logits.
            modality_inputs: encoder name -> its inputs.
            packing_kwargs: arguments for packed sequences.
            modality_counts: encoder name -> counts, for the encoders of this rank.
            token_order: order of ``input_ids``, for the language module; ``None`` to compute it on the device.
            custom_positions: whether ``position_ids`` differ from 0, 1, 2, …; otherwise rotary positions count from 0.
            lengths: int64 ``[n]``, tokens of each sample before padding.
            counted: ``[b, s]``, 0 where a token does not count in the loss; with ``lengths`` for the balancing loss of
                experts. ``None`` adds none.
            packed_lengths: tokens of each sample, if these follow each other in one row, ``[1, s]``; requires
                ``custom_positions``. Attention then is that of each sample.
        """
        self._modality_counts = modality_counts or {}
        self._token_order = token_order
        length = input_ids.size(1)
        missing = -length % self._sequence_divisor

        def fill(tensor: torch.Tensor | None, value: int = 0) -> torch.Tensor | None:
            return tensor if tensor is None or not missing else pad(tensor, (0, missing), value=value)

        if self._rotary is not None:
            self._rotary.positions = fill(position_ids) if custom_positions else None
        if self._balance is not None:
            padded = fill(counted)
            self._balance.token_weights = None
            if lengths is not None and padded is not None:
                weights_of = token_weights if packed_lengths is None else packed_token_weights
                self._balance.token_weights = weights_of(lengths, padded)
        if packed_lengths is not None:
            packing_kwargs = packing_arguments(packed_lengths, missing)
        output, mask = super().forward(
            # With a token order, padding is added after text and embeddings are combined.
            input_ids if token_order is not None else fill(input_ids, self._text_token),
            fill(position_ids),
            attention_mask,
            fill(loss_mask),
            fill(labels),
            modality_inputs,
            packing_kwargs,
        )
        self._modality_counts = {}  # none for an encoder that is called directly
        if missing and isinstance(output, torch.Tensor):
            output = output[:, :length]
        return output, mask if mask is None else mask[:, :length]

    def check_packing(self) -> None:
        """Check that the language module of this rank, if there is one, keeps the samples of a packed row apart.

        Raises:
            ConfigError: naming the part that does not.
        """
        if self.language_model is not None:
            params = self.mimo_config.language_model_spec.params
            check_packing(self.language_model, params.get("position_embedding_type"))

    def positions_computed(self, input_ids: torch.Tensor) -> int:
        """Positions that the language module computes for ``input_ids`` ``[b, s]``, padding included."""
        rows, length = input_ids.shape
        return rows * (length + -length % self._sequence_divisor)

    def get_text_embeddings(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, special_token_ids: dict[str, int]
    ) -> torch.Tensor:
        """Text embeddings ``[text tokens, hidden]``; if the token order is known, without a search on the device."""
        if self._token_order is None:
            return super().get_text_embeddings(input_ids, position_ids, special_token_ids)
        text = self._token_order.text
        if position_ids is not None:
            # Multimodal rotary positions have three rows; an embedding uses the first.
            positions = position_ids[0] if position_ids.ndim == 3 else position_ids
            position_ids = positions[:, : input_ids.size(1)].flatten().index_select(0, text).unsqueeze(0)
        embedding = unwrap_model(self.language_model).embedding
        return embedding(input_ids.flatten().index_select(0, text).unsqueeze(0), position_ids).squeeze(1)

    def align_embeddings_by_token_positions(
        self,
        modality_embeddings: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        special_token_ids: dict[str, int],
    ) -> torch.Tensor:
        """Combined embeddings ``[s, b, hidden]``; if the token order is known, without a search on the device."""
        if self._token_order is None:
            return super().align_embeddings_by_token_positions(modality_embeddings, input_ids, special_token_ids)
        ordered = [modality_embeddings[name] for name in ("text", *special_token_ids) if name in modality_embeddings]
        combined = combine(ordered, self._token_order, input_ids.shape)
        missing = -combined.size(0) % self._sequence_divisor
        return pad(combined, (0, 0, 0, 0, 0, missing)) if missing else combined

    def sample_limits(self) -> dict[str, Any]:
        """Requirements of the modules, as fields of :class:`lightning_mimo.data.sample_format.SampleFormat`."""
        language = self.mimo_config.language_model_spec.params
        return {
            # Padding of the vocabulary is no token.
            "vocab_size": language.get("true_vocab_size") or language.get("vocab_size"),
            "max_sequence_length": language.get("max_sequence_length"),
            "position_type": language.get("position_embedding_type"),
            "modules": tuple(self.mimo_config.modality_submodules_spec),
            "encoders": {
                name: {
                    encoder: getattr(module, "item_sizes", None)
                    for encoder, module in unwrap_model(self.modality_submodules[name]).encoders.items()
                }
                for name in self.modality_submodules
            },
        }

    def _initialize_submodules(self) -> None:
        # As upstream, but numbers that a module draws from the default generator (torch.randn in a user's encoder)
        # must not depend on the other modules that this rank builds.
        if not self._infra.colocated and not self._infra.layout.encoders:
            self.role = _pipeline_role(self._infra)
        for name in self.role.modality_module_names:
            seed_default_generators(seed_for(self._seed, name))
            spec, stage = self.mimo_config.modality_submodules_spec[name], self.role.modules[name]
            self.modality_submodules[name] = spec.module.from_spec(
                spec, is_first_stage=stage.is_first_stage, is_last_stage=stage.is_last_stage
            )
            check_one_encoder(name, _encoders_of(self, name))

    def _initialize_language_model(self) -> None:
        seed_default_generators(seed_for(self._seed, LANGUAGE))
        super()._initialize_language_model()

    def _forward_encoders(
        self,
        input_ids: torch.Tensor | None,
        modality_inputs: dict[str, Any] | None,
        input_tensors: dict[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        for name in self.role.modality_module_names:
            if not (modality_inputs or {}).get(name) and self.role.is_first_stage(name):
                self._modality_counts[name].check_rows(name, 0, uniform=True)
            if not self.role.is_first_stage(name) and (per_item := self._modality_counts[name].per_item):
                arguments = {key: torch.tensor(rows, dtype=torch.int64, device="cpu") for key, rows in per_item.items()}
                unwrap_model(self.modality_submodules[name]).stage_arguments = {
                    key: to_device(rows, torch.cuda.current_device()) for key, rows in arguments.items()
                }
        outputs = super()._forward_encoders(input_ids, modality_inputs, input_tensors)
        return {
            name: self._own_rows(name, output) if self.role.is_last_stage(name) else output
            for name, output in outputs.items()
        }

    def _attach_modality_split_sizes(
        self, output: torch.Tensor, input_ids: torch.Tensor | None, encoder_name: str
    ) -> None:
        """Do nothing: the counts are part of the batch. Upstream counts on the device and does not support fan-in."""

    def _has_encoder_tokens(self, input_ids: torch.Tensor | None, encoder_name: str) -> bool:
        """Whether this rank's samples have placeholders of an encoder. Unlike upstream's, does not read the device."""
        return sum(self._modality_counts[encoder_name].own_placeholders) > 0

    def _empty_encoder_output(self, encoder_name: str) -> torch.Tensor:
        """Empty output that requires a gradient only if the encoder is trained; a frozen encoder receives none."""
        empty = super()._empty_encoder_output(encoder_name)
        parameters = self.modality_submodules[encoder_name].parameters()
        return empty.requires_grad_(any(parameter.requires_grad for parameter in parameters))

    def _own_rows(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """Check the number of an encoder's rows, and drop the rows of the stand-in that is encoded without items."""
        counts = self._modality_counts[name]
        if sum(counts.items) == 0:
            output = output[:0].clone()
        counts.check_rows(name, output.size(0), uniform=self._is_uniform(name))
        return output

    def _is_uniform(self, name: str) -> bool:
        """Whether the encoder returned ``[n, tokens, hidden]``, that is, equally many embeddings per item."""
        return self._uniform.issuperset(_encoders_of(self, name))

    def _build_colocated_communicators(self) -> None:
        for name in self._infra.layout.encoders:
            bridge = RaggedColocatedBridge(self._infra, name)
            self._infra.register_communicator(bridge)
            self.colocated_comms[(name, LANGUAGE)] = bridge

    def _apply_colocated_comms(self, modality_embeddings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for (name, _), bridge in self.colocated_comms.items():
            if name not in modality_embeddings:
                # This rank has no items, but other ranks of the bridge's group may have some.
                modality_embeddings[name] = self._empty_encoder_output(name)
            rows = self._own_rows(name, modality_embeddings[name])
            modality_embeddings[name] = bridge.communicate(rows, self._modality_counts[name].placeholders_per_position)
        return modality_embeddings


def build_mimo_model(
    config: MimoModelConfig,
    infra: MimoModelInfra,
    *,
    seed: int,
    dtype_policy: DtypePolicy = FLOAT32,
    initialize: Sequence[str] | None = None,
) -> RaggedMimoModel:
    """Build this rank's modules with weights that depend only on the seed and on parameter names.

    Collective over the world. A default device (``with torch.device("cuda")``, which Lightning enters) is ignored:
    tensors without an explicit device are created and initialized on the CPU.

    Args:
        config: specs of all modules. Its ``module_to_grid_map`` is set here.
        infra: grids and process groups.
        seed: the run's seed, the same on all ranks.
        dtype_policy: the dtypes of the run, set in all configs of transformers.
        initialize: names of modules or submodules whose weights are drawn; ``None`` for all. The others are undefined
            until they are loaded.

    Raises:
        LayoutError: if the modules of the config and of the layout differ.
    """
    if initialize is not None and not initialize:
        for transformer in transformer_configs(config):
            # Not perform_initialization=False: with that, megatron-core would not mark what tensor parallelism cuts.
            transformer.init_method = transformer.output_layer_init_method = transformer.embedding_init_method = _leave
    with default_generators_kept(), torch.device("cpu"), RecordInitializers() as initializers:
        model = construct_mimo_model(config, infra, seed=seed, dtype_policy=dtype_policy)
    check_stages({name: module_and_name(model, name)[0] for name in infra.participating_modules}, infra)
    for name in infra.participating_modules:
        module, prefix = module_and_name(model, name)
        under = None
        if initialize is not None:
            under = [prefix + each.removeprefix(name) for each in initialize if each.partition(".")[0] == name]
        groups = infra.pg_collections[name]
        initialize_by_name(module, prefix=prefix, seed=seed, initializers=initializers, groups=groups, under=under)
    return dtype_policy.convert(model)


def _pipeline_role(infra: MimoModelInfra) -> RankRole:
    """Role of a rank of a language module without encoders, which upstream takes for colocated without a pipeline."""
    pp = infra.pg_collections[LANGUAGE].pp
    stage = ModuleStageInfo(is_first_stage=pp.rank() == 0, is_last_stage=pp.rank() == pp.size() - 1)
    return RankRole(modules={LANGUAGE: stage}, mode=ModuleLayout.NON_COLOCATED)


def _leave(tensor: torch.Tensor) -> torch.Tensor:
    """An initializer that does nothing."""
    return tensor


def construct_mimo_model(
    config: MimoModelConfig, infra: MimoModelInfra, *, seed: int, dtype_policy: DtypePolicy
) -> RaggedMimoModel:
    """Build this rank's modules with the weights of their own code; same arguments as :func:`build_mimo_model`.

    Raises:
        LayoutError: if the modules of the config and of the layout differ.
    """
    infra.layout.check_modules([LANGUAGE, *config.modality_submodules_spec])
    config.module_to_grid_map = infra.module_to_grid_map
    for transformer in transformer_configs(config):
        check_experts(transformer)
        dtype_policy.apply_to(transformer)
    _prepare_language_config(config.language_model_spec.params["config"])
    model = RaggedMimoModel(config, infra, seed=seed)
    check_embedding(model)
    check_dropout(model, infra)
    check_batch_norm(model)
    let_recomputed_layers_train(model)
    return model


def _encoders_of(model: MimoModel, name: str) -> list[torch.nn.Module]:
    return list(unwrap_model(model.modality_submodules[name]).encoders.values())


def module_and_name(model: MimoModel, name: str) -> tuple[torch.nn.Module, str]:
    """One of this rank's modules (wrapped, if the model is), and the prefix of its parameters' global names."""
    if name == LANGUAGE:
        return model.language_model, "language_model"
    return model.modality_submodules[name], f"modality_submodules.{name}"


def _prepare_language_config(config: TransformerConfig) -> None:
    """Set the fields that the multi-module schedule requires."""
    config.calculate_per_token_loss = True
    config.variable_seq_lengths = True
