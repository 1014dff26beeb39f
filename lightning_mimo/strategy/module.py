"""The LightningModule that users subclass to define the model, the optimizer and the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from lightning_mimo.checkpoint.sources import WeightSource, source_of
from lightning_mimo.data.sample_format import SampleFormat, check_extra_keys
from lightning_mimo.errors import ConfigError
from lightning_mimo.layers.vocab_parallel import exact_matches, token_losses
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.mimo.dtypes import DtypePolicy
from lightning_mimo.mimo.freezing import freeze
from lightning_mimo.mimo.model import RaggedMimoModel, build_mimo_model
from lightning_mimo.optim.optimizer import MimoTorchOptimizer, build_optimizer
from lightning_mimo.optim.param_groups import OptimizerOverride
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.schedule.forward_backward import Metrics
from lightning_mimo.strategy.from_checkpoint import arguments_of, check_options, saved_hyperparameters
from lightning_mimo.strategy.initial_weights import check_init_missing
from lightning_mimo.strategy.local_paths import local_path
from lightning_mimo.strategy.registration import register

# Here, because every training script imports MimoModule.
register()


class MimoModule(pl.LightningModule):
    """A LightningModule that trains a MimoModel.

    Subclasses override :meth:`configure_mimo` and :meth:`configure_optimizers`, and optionally :meth:`loss`.

    Steps run once per microbatch. The strategy splits a global batch into microbatches and runs Megatron's schedule.
    The schedule calls :meth:`training_step` (or ``validation_step`` and so on) for each microbatch, and :meth:`loss` on
    the last stage of the language module. A microbatch holds ``input_ids``, ``position_ids`` (int64 ``[b, s]``) and
    ``modality_inputs``; on ranks of the language module also ``labels`` (int64 ``[b, s]``), ``loss_mask``
    (``[b, s]``) and the ``extra_keys``. See :class:`lightning_mimo.microbatch.Microbatch`, and
    :class:`lightning_mimo.data.sample_format.SampleFormat` for the format of samples.

    All other hooks of Lightning run in its order and as often as on one device. The schedule interleaves the forward
    and backward passes of the microbatches, so both run before ``on_before_zero_grad``, the first hook of a batch after
    its steps. ``on_before_backward`` and ``on_after_backward`` therefore see the same gradients. These are reduced if
    the batch is the last one of an accumulation window.

    The strategy logs these metrics, equal on every rank: ``train/loss``, ``train/grad_norm``,
    ``train/grad_norm/images`` and so on for each module, ``train/skipped_steps``, ``train/tokens_per_sec`` (by each
    rank's own clock), ``val/loss``, ``test/loss``, the metrics of :meth:`loss`, and ``telemetry/images/compute_s`` and
    similar, see :class:`lightning_mimo.observe.telemetry.Telemetry`.

    Attributes:
        model: this rank's part of the model; ``None`` before :meth:`configure_model`.
        built_for: layout and dtypes that it was built for; ``None`` before.
    """

    takes_packed: bool | None = None
    """Whether the class's own steps, ``forward()`` and ``loss()`` are right for packed microbatches, which hold several
    samples in one row (``MimoStrategy(pack_to=...)``); ``None`` if it has none of its own. A ``loss()`` that only
    weights tokens is right; one that sums over samples uses :func:`lightning_mimo.sum_by_sample`."""

    _draws_weights = True  # False where all weights come from files, but for those under init_missing

    def __init__(
        self,
        *,
        pad_token_id: int = 0,
        max_new_tokens: int = 16,
        frozen: Sequence[str] = (),
        labels_shifted: bool = True,
        extra_keys: Sequence[str] = (),
        init_from: str | Path | None = None,
        init_missing: Sequence[str] = (),
    ) -> None:
        """
        Args:
            pad_token_id: token that pads ``input_ids`` if samples of a microbatch differ in length.
            max_new_tokens: number of tokens that ``predict`` generates for each sample.
            frozen: names of modules that are not trained (``"images"``, ``"language"``), or of submodules
                (``"images.encoders"`` does not include the projector). No gradients are sent to or reduced for frozen
                parameters.
            labels_shifted: whether a sample's ``labels[t]`` is the token after ``input_ids[t]``. Set to ``False`` for
                labels in the format of transformers: equal to ``input_ids`` where they count and -100 elsewhere.
            extra_keys: additional keys of every sample, for :meth:`loss`. A microbatch of ``n`` samples holds numbers
                as ``[n]``, tensors of equal shape as ``[n, ...]``, tensors with one entry per token as ``[b, s]``
                padded with 0, and anything else as a tuple of length ``n``. Unless it is packed, ``b`` is ``n``.
            init_from: weights that a run starts with at step 0: a checkpoint of this package (of any layout), a
                safetensors file with global names, or a folder of such files. Optimizer, step and epoch are new. Not
                read if the run goes on from ``ckpt_path``. Every rank reads the shards that it holds.
            init_missing: names of modules or submodules that ``init_from`` does not hold, as for ``frozen``; these
                start from the seed. Anything else that is missing is an error.

        Raises:
            ConfigError: if one of ``extra_keys`` is already a key of microbatches or samples, or ``init_missing`` is a
                string.
        """
        super().__init__()
        if isinstance(init_missing, str):
            raise ConfigError(f"init_missing={init_missing!r} is a string; write [{init_missing!r}].")
        check_extra_keys(extra_keys)
        self.pad_token_id = pad_token_id
        self.max_new_tokens = max_new_tokens
        self.frozen = tuple(frozen)
        self.labels_shifted = labels_shifted
        self.extra_keys = tuple(extra_keys)
        self.init_from = init_from
        self.init_missing = tuple(init_missing)
        self.has_initial_weights = False
        self.model: RaggedMimoModel | None = None
        self.built_for: tuple[MimoLayout, DtypePolicy] | None = None
        self._sees_microbatches = False

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        """Describe the model. Called on every rank, once, after the process groups exist.

        Args:
            infra: layout, grids and process groups. ``infra.pg_collections`` has entries for this rank's modules only.

        Returns:
            Specs of all modules, under the names of the layout.
        """
        raise NotImplementedError(f"{type(self).__name__} must override configure_mimo(infra) -> MimoModelConfig.")

    def check_layout(self, layout: MimoLayout) -> None:
        """Refuse a layout that the model cannot run in. Called before any process starts; does nothing by itself.

        Args:
            layout: what runs where.

        Raises:
            LayoutError: to say which number to change.
        """

    def check_weights(self, layout: MimoLayout) -> None:
        """Refuse initial weights that cannot be used. Called before any process starts.

        Args:
            layout: what runs where.

        Raises:
            ConfigError: if ``init_from`` or ``init_missing`` cannot be used; a CheckpointError if files are damaged.
        """
        check_init_missing(self.init_missing, layout, has_sources=bool(self.weight_sources(layout)))

    def check_packing(self) -> None:
        """Refuse a model that does not keep the samples of a packed row apart; does nothing by itself.

        Called before any process starts. The model is checked once more when it has been built.

        Raises:
            ConfigError: naming what to change.
        """

    def missing_files(self) -> str | None:
        """What a run needs and a dry run does without, in a sentence; ``None`` if nothing is missing."""
        return None

    def weight_sources(self, layout: MimoLayout) -> list[WeightSource]:
        """Files that initial weights come from, the most important first; empty if all weights start from the seed.

        Args:
            layout: what runs where.

        Raises:
            ConfigError: if ``init_from`` cannot be used; a CheckpointError if files are damaged.
        """
        return [] if self.init_from is None else [source_of(Path(self.init_from), argument="init_from")]

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Make a module with the hyperparameters of a checkpoint, whose weights are read when a run begins.

        Args:
            checkpoint_path: a checkpoint of any layout; becomes ``init_from``.
            map_location: must be ``None``: the Trainer says which devices there are.
            hparams_file: must be ``None``.
            strict: must not be ``False``.
            weights_only: no effect; a checkpoint is always read without executing code.
            kwargs: arguments of the module that replace those of the checkpoint.

        Raises:
            ConfigError: if an option is not supported, or an argument of the module has no value.
            CheckpointError: if there is no checkpoint.
        """
        check_options(cls, map_location=map_location, hparams_file=hparams_file, strict=strict)
        path = local_path(checkpoint_path)
        module = cls(**arguments_of(cls, saved_hyperparameters(path), kwargs))
        module.init_from = path
        return module

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return ``self.build_optimizer(OptimizerConfig(...))``, optionally with a learning-rate scheduler."""
        raise NotImplementedError(
            f"{type(self).__name__} must override configure_optimizers(); return "
            f"self.build_optimizer(OptimizerConfig(optimizer='adam', lr=...))."
        )

    def build_optimizer(
        self, config: OptimizerConfig, *, overrides: Mapping[str, OptimizerOverride] | None = None
    ) -> MimoTorchOptimizer:
        """Build Megatron's optimizer over all modules. Collective over the world; call it in ``configure_optimizers``.

        Any scheduler of ``torch.optim.lr_scheduler`` works with it, and so does Megatron's OptimizerParamScheduler.
        They drive the learning rate of every module, each from its own initial value.
        ``lightning_mimo.PerModuleLR`` gives each module a scheduler of its own.

        Args:
            config: Megatron's optimizer settings. ``Trainer(gradient_clip_val=...)`` overrides ``clip_grad``, dtypes
                are set by ``Trainer(precision=...)``, and ``MimoStrategy(ddp=...)`` determines whether the optimizer is
                distributed.
            overrides: different settings for a module (``"images"``) or a submodule (the projector is
                ``"images.input_projections"``).

        Raises:
            ConfigError: if ``lr`` is not set, everything is frozen, or an override matches no parameter.
        """
        clip = self.trainer.gradient_clip_val
        strategy: Any = self.trainer.strategy
        return build_optimizer(
            self.mimo_model,
            self.infra,
            config if clip is None else replace(config, clip_grad=float(clip)),
            overrides=overrides or {},
            ddp=strategy.ddp_by_module,
            dtype_policy=strategy.precision_plugin.dtype_policy,
        )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advance a scheduler, unless it counts optimizer steps and the last step was skipped.

        Megatron's OptimizerParamScheduler advances by 1, so its ``lr_decay_steps`` and so on count optimizer steps.
        """
        interval = next(each.interval for each in self.trainer.lr_scheduler_configs if each.scheduler is scheduler)
        optimizer = self.optimizers(use_pl_optimizer=False)
        outcome = optimizer.outcome if isinstance(optimizer, MimoTorchOptimizer) else None
        if interval == "step" and outcome is not None and not outcome.updated:
            return
        if isinstance(scheduler, OptimizerParamScheduler):
            scheduler.step(1)
        else:
            super().lr_scheduler_step(scheduler, metric)

    def loss(self, output: torch.Tensor, batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """Compute the token cross-entropy; outside training also the exact match of each sample's counted tokens.

        Called on all tensor-parallel ranks of the language module's last stage, so collectives over their group are
        allowed.

        Args:
            output: logits ``[b, s, vocabulary / tp]``; ``[1, s, vocabulary / tp]`` if the microbatch is packed.
            batch: the microbatch.

        Returns:
            Sum of the losses of counted tokens, the number of these tokens, and metrics: name -> (sum, count). The
            loss of a global batch is the sum of the first divided by the sum of the second over the whole batch. It is
            not a mean over microbatches.
        """
        group = self.infra.pg_collections[LANGUAGE].tp
        mask = batch["loss_mask"]
        metrics = {} if self.training else {"exact_match": exact_matches(output, batch, group)}
        return (token_losses(output, batch["labels"], group) * mask).sum(), (mask > 0).sum(), metrics

    def forward(self, batch: Microbatch) -> Any:
        """Run this rank's modules on one microbatch.

        Returns:
            Logits ``[b, s, vocabulary / tp]`` on the language module's last stage; on other stages the activations for
            the next stage.
        """
        output, _ = self.mimo_model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            custom_positions=batch.get("custom_positions", False),
            attention_mask=None,
            modality_inputs=self._first_stage_inputs(batch["modality_inputs"]),
            modality_counts=batch["modality_counts"],
            token_order=batch.get("token_order"),
            lengths=batch.get("lengths"),
            counted=batch.get("loss_mask"),
            packed_lengths=batch["sample_lengths"] if batch.get("is_packed", False) else None,
        )
        return output

    def training_step(self, batch: Microbatch, batch_idx: int) -> Any:
        """Forward of one microbatch; what it returns goes to :meth:`loss`."""
        return self(batch)

    def validation_step(self, batch: Microbatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Forward of one microbatch; what it returns goes to :meth:`loss`."""
        return self(batch)

    def test_step(self, batch: Microbatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Forward of one microbatch; what it returns goes to :meth:`loss`."""
        return self(batch)

    def predict_step(self, batch: Microbatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Forward pass of one microbatch; the strategy decodes the next token from the result."""
        return self(batch)

    @contextlib.contextmanager
    def microbatches(self) -> Iterator[None]:
        """Context in which the strategy runs the steps and the loss of a global batch; :meth:`log` raises inside."""
        self._sees_microbatches = True
        try:
            yield
        finally:
            self._sees_microbatches = False

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log a value as Lightning does. Allowed in hooks that run at most once per global batch.

        Raises:
            ConfigError: in a step or in :meth:`loss`.
        """
        if self._sees_microbatches:
            raise ConfigError(
                f"self.log({name!r}, ...) inside of a step or of loss(): they run once per microbatch and get "
                f"different data on different ranks, so logged values would depend on the layout. Return it from "
                f"loss() as a metric, {{{name!r}: (sum, count)}}, or log it in a hook such as on_train_batch_end."
            )
        if self._trainer is None or not self._trainer.barebones:  # barebones: Lightning warns about every name
            super().log(name, value, *args, **kwargs)

    @property
    def infra(self) -> MimoModelInfra:
        """Layout, grids and process groups of the strategy.

        Raises:
            ConfigError: if the strategy has none.
        """
        infra = getattr(self.trainer.strategy, "infra", None)
        if infra is None:
            raise ConfigError(
                f"{type(self).__name__} is a MimoModule and needs Trainer(strategy=MimoStrategy(...)); the trainer has "
                f"{type(self.trainer.strategy).__name__}."
            )
        return infra

    @property
    def mimo_model(self) -> RaggedMimoModel:
        """This rank's part of the model. Available after :meth:`configure_model`."""
        assert self.model is not None, "configure_model() builds it"
        return self.model

    def configure_model(self) -> None:
        """Build this rank's modules. Lightning may call it more than once; only the first call builds."""
        if self.model is None:
            strategy: Any = self.trainer.strategy
            self.built_for = self.infra.layout, strategy.precision_plugin.dtype_policy
            self.model = build_mimo_model(
                self.configure_mimo(self.infra),
                self.infra,
                seed=strategy.seed,
                dtype_policy=strategy.precision_plugin.dtype_policy,
                initialize=None if self._draws_weights and self.init_from is None else self.init_missing,
            )
            if strategy.pack_to is not None:
                self.model.check_packing()
            freeze(self.model, self.infra, self.frozen)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the schedule has already run the backward passes of all microbatches."""

    def sample_format(self) -> SampleFormat:
        """Format of the samples of this run, as the model requires it. The modules must have been built."""
        return SampleFormat(
            **self.mimo_model.sample_limits(),
            special_token_ids=self.mimo_model.special_token_ids,
            pad_token_id=self.pad_token_id,
            labels_shifted=self.labels_shifted,
            labels_required=not self.trainer.predicting,
            extra_keys=self.extra_keys,
        )

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: Megatron's optimizer clips by the norm over all modules, inside its step."""

    def _first_stage_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of encoders whose first pipeline stage is on this rank; later stages receive hidden states."""
        return {name: value for name, value in inputs.items() if self.mimo_model.role.is_first_stage(name)}
