"""The LightningModule that users subclass: which model, which optimizer, which loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from lightning_mimo.errors import ConfigError
from lightning_mimo.layers.vocab_parallel import greedy_tokens, token_losses
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.mimo.freezing import freeze
from lightning_mimo.mimo.model import RaggedMimoModel, build_mimo_model
from lightning_mimo.optim.optimizer import MimoTorchOptimizer, build_optimizer
from lightning_mimo.optim.param_groups import OptimizerOverride
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.schedule.forward_backward import Metrics
from lightning_mimo.strategy.registration import register

# Here, because nobody trains anything without a MimoModule.
register()


class MimoModule(pl.LightningModule):
    """A MimoModel under Lightning. Override :meth:`configure_mimo`, :meth:`configure_optimizers`, maybe :meth:`loss`.

    The steps are per microbatch: the strategy cuts a global batch into microbatches and sends them through Megatron's
    schedule, which calls :meth:`training_step` (or its siblings) for each, and :meth:`loss` where the last stage of
    the language module is. A microbatch holds ``input_ids``, ``position_ids`` (int64 ``[b, s]``), on ranks of the
    language module ``labels`` (int64 ``[b, s]``) and ``loss_mask`` (``[b, s]``), and ``modality_inputs``.

    All other hooks of Lightning run in its order and as often as on one device. The schedule interleaves the forward
    and backward passes of the microbatches, so both lie before ``on_before_zero_grad``, the first hook of a batch after
    its steps: ``on_before_backward`` and ``on_after_backward`` find the same gradients, and find them reduced where the
    batch is the last one of an accumulation window.

    Logged by the strategy, the same on every rank: ``train/loss``, ``train/grad_norm``, ``train/grad_norm/images`` and
    so on for each module, ``train/skipped_steps``, ``train/tokens_per_sec`` (by each rank's own clock), ``val/loss``,
    ``test/loss``, the metrics of :meth:`loss`, and ``telemetry/images/compute_s`` and the like, see
    :class:`lightning_mimo.observe.telemetry.Telemetry`.
    """

    _initialize_weights = True  # not where all of them are read from files before the first batch

    def __init__(self, *, pad_token_id: int = 0, max_new_tokens: int = 16, frozen: Sequence[str] = ()) -> None:
        """
        Args:
            pad_token_id: fills up ``input_ids`` where samples of a microbatch differ in length.
            max_new_tokens: tokens that ``predict`` writes for each sample.
            frozen: what is not trained: names of modules (``"images"``, ``"language"``) or of parts of them
                (``"images.encoders"`` leaves the projector). Nothing is sent back to or reduced for what is frozen.
        """
        super().__init__()
        self.pad_token_id = pad_token_id
        self.max_new_tokens = max_new_tokens
        self.frozen = tuple(frozen)
        self.model: RaggedMimoModel | None = None
        self._sees_microbatches = False

    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        """Describe the model. Called on every rank, once, after the process groups exist.

        Args:
            infra: layout, grids and process groups. ``infra.pg_collections`` has entries for this rank's modules only.

        Returns:
            Specs of all modules, whose names are those of the layout.
        """
        raise NotImplementedError(f"{type(self).__name__} must override configure_mimo(infra) -> MimoModelConfig.")

    def check_layout(self, layout: MimoLayout) -> None:
        """Refuse a layout that the model cannot run in. Called before any process starts; does nothing by itself.

        Args:
            layout: what runs where.

        Raises:
            LayoutError: to say which number to change.
        """

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return ``self.build_optimizer(OptimizerConfig(...))``, alone or with a learning-rate scheduler on it."""
        raise NotImplementedError(
            f"{type(self).__name__} must override configure_optimizers(); return "
            f"self.build_optimizer(OptimizerConfig(optimizer='adam', lr=...))."
        )

    def build_optimizer(
        self, config: OptimizerConfig, *, overrides: Mapping[str, OptimizerOverride] | None = None
    ) -> MimoTorchOptimizer:
        """Megatron's optimizer over all modules. Collective over the world; call it in ``configure_optimizers``.

        Any learning-rate scheduler of ``torch.optim.lr_scheduler``, or Megatron's OptimizerParamScheduler, works on it
        and drives all modules, each from its own learning rate; ``lightning_mimo.PerModuleLR`` gives each its own.

        Args:
            config: Megatron's optimizer settings. ``Trainer(gradient_clip_val=...)`` takes the place of ``clip_grad``;
                dtypes come from ``Trainer(precision=...)``, and ``MimoStrategy(ddp=...)`` decides whether the optimizer
                is distributed.
            overrides: what is different for a module (``"images"``) or for a part of one (its projector is
                ``"images.input_projections"``).

        Raises:
            ConfigError: if ``lr`` is not set, everything is frozen, or an override fits nothing.
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
        """Advance a scheduler, unless it counts optimizer steps and the last one was skipped.

        Megatron's OptimizerParamScheduler is advanced by 1: its ``lr_decay_steps`` and the like are optimizer steps.
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
        """Token cross-entropy; outside training also the exact match of every sample's counted tokens.

        Called on all tensor-parallel ranks of the language module's last stage, so it may use their group.

        Args:
            output: logits ``[b, s, vocabulary / tp]``.
            batch: the microbatch.

        Returns:
            Sum over the tokens that count, their number, and metrics: name -> (sum, count). The trainer's loss is the
            first sum over the second, taken over the global batch, not over microbatches.
        """
        group = self.infra.pg_collections[LANGUAGE].tp
        mask, labels = batch["loss_mask"], batch["labels"]
        metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if not self.training:
            counted = mask > 0
            wrong = (greedy_tokens(output, group) != labels) & counted
            asked = counted.any(dim=1)
            metrics["exact_match"] = ((asked & ~wrong.any(dim=1)).sum(), asked.sum())
        return (token_losses(output, labels, group) * mask).sum(), (mask > 0).sum(), metrics

    def forward(self, batch: Microbatch) -> Any:
        """Run this rank's modules on one microbatch.

        Returns:
            Logits ``[b, s, vocabulary / tp]`` on the language module's last stage, what goes to the next stage before.
        """
        output, _ = self.mimo_model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=None,
            modality_inputs=self._first_stage_inputs(batch["modality_inputs"]),
            modality_counts=batch["modality_counts"],
            token_order=batch.get("token_order"),
        )
        return output

    def training_step(self, batch: Microbatch, batch_idx: int) -> Any:
        """Forward of one microbatch; what it returns goes to :meth:`loss`."""
        return self(batch)

    def validation_step(self, batch: Microbatch, batch_idx: int) -> Any:
        """Forward of one microbatch; what it returns goes to :meth:`loss`."""
        return self(batch)

    def test_step(self, batch: Microbatch, batch_idx: int) -> Any:
        """Forward of one microbatch; what it returns goes to :meth:`loss`."""
        return self(batch)

    def predict_step(self, batch: Microbatch, batch_idx: int) -> Any:
        """Forward of one microbatch; the strategy takes the next token from it."""
        return self(batch)

    @contextlib.contextmanager
    def microbatches(self) -> Iterator[None]:
        """Around the steps and the loss of a global batch. The strategy opens it; nothing can be logged inside."""
        self._sees_microbatches = True
        try:
            yield
        finally:
            self._sees_microbatches = False

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's, in every hook that runs once for a global batch or more.

        Raises:
            ConfigError: inside of a step or of :meth:`loss`.
        """
        if self._sees_microbatches:
            raise ConfigError(
                f"self.log({name!r}, ...) inside of a step or of loss(): they run once for each microbatch, and what "
                f"they see differs from rank to rank, so other layouts would log other numbers. Return it from loss() "
                f"as a metric, {{{name!r}: (sum, count)}}, or log it in a hook such as on_train_batch_end."
            )
        if self._trainer is None or not self._trainer.barebones:  # where Lightning warns of every name
            super().log(name, value, *args, **kwargs)

    @property
    def infra(self) -> MimoModelInfra:
        """Grids and process groups of the strategy.

        Raises:
            ConfigError: under a strategy that has none.
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
        """This rank's part of the model, once :meth:`configure_model` has built it."""
        assert self.model is not None, "configure_model() builds it"
        return self.model

    def configure_model(self) -> None:
        """Build this rank's modules. Lightning may call it more than once; only the first call builds."""
        if self.model is None:
            strategy: Any = self.trainer.strategy
            self.model = build_mimo_model(
                self.configure_mimo(self.infra),
                self.infra,
                seed=strategy.seed,
                dtype_policy=strategy.precision_plugin.dtype_policy,
                initialize=self._initialize_weights,
            )
            freeze(self.model, self.infra, self.frozen)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the schedule ran the backward passes of all microbatches, after the forward pass of each."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: Megatron's optimizer clips by the norm over all modules, inside its step."""

    def _first_stage_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Only the first pipeline stage of an encoder takes images; later ones get hidden states."""
        return {name: value for name, value in inputs.items() if self.mimo_model.role.is_first_stage(name)}


def as_mimo_module(module: pl.LightningModule | None) -> MimoModule:
    """The module of a Trainer whose strategy is MimoStrategy.

    Raises:
        ConfigError: if it is no MimoModule.
    """
    if not isinstance(module, MimoModule):
        raise ConfigError(
            f"MimoStrategy trains a MimoModule, but got a {type(module).__name__}. Subclass "
            f"lightning_mimo.MimoModule and override configure_mimo."
        )
    return module
