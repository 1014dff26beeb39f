"""A MimoModule that starts from a pretrained model of the Hugging Face hub, in any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, override

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig

from lightning_mimo.checkpoint.state import load_shards
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.errors import ConfigError
from lightning_mimo.layers.attention import AttentionKind
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.models.hugging_face.decoder import BuildOptions
from lightning_mimo.models.hugging_face.folder import check_tokenizer, read_config
from lightning_mimo.models.hugging_face.registry import model_of
from lightning_mimo.models.sizes import Recompute
from lightning_mimo.optim.ddp import complete_gathering
from lightning_mimo.optim.param_groups import OptimizerOverride
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.weights.files import SafetensorsFolder
from lightning_mimo.weights.importing import PretrainedReader
from lightning_mimo.weights.rules import RuleTable


class HuggingFaceModule(MimoModule):
    """A model of the Hugging Face hub: sizes come from the folder's config.json, the first weights from its files.

    The layout has the modules of the model: ``language`` for a text model, ``images`` and ``language`` for a LLaVA or a
    Qwen-VL. The ``modality_inputs`` of samples are ``{"images": {"vision": {"pixel_values": [n, 3, height, width]}}}``;
    for a Qwen-VL ``{"images": {"vision": {"pixel_values": [patches, d], "image_grid_thw": [n, 3]}}}``, as its
    processor makes them.

    Weights are read once, when a run starts at step 0; with ``ckpt_path`` the checkpoint has them. Each rank reads only
    the slices of the files that it holds.

    Example::

        model = HuggingFaceModule("models/llava-1.5-7b-hf", frozen=["images.encoders"], lr=2e-5)
        strategy = MimoStrategy({"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=4)}, 128)
        Trainer(devices=6, strategy=strategy, precision="bf16-mixed").fit(model, data)
    """

    _initialize_weights = False

    def __init__(
        self,
        pretrained: str,
        *,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        overrides: Mapping[str, OptimizerOverride] | None = None,
        frozen: Sequence[str] = (),
        max_sequence_length: int | None = None,
        sequence_parallel: bool = False,
        attention: AttentionKind = "sdpa",
        recompute: Recompute | None = None,
        pad_token_id: int | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        """
        Args:
            pretrained: folder with config.json and safetensors files. No code in it is run.
            lr: learning rate of Adam, with Megatron's defaults otherwise (gradients are clipped to a norm of 1);
                override :meth:`configure_optimizers` for anything else.
            weight_decay: of all weights but biases and norms.
            overrides: what is different for a module or a part of one, as for :meth:`MimoModule.build_optimizer`.
            frozen: as for MimoModule; ``"images.encoders"`` is the vision encoder, ``"images.input_projections"`` the
                projector.
            max_sequence_length: longest sequence in tokens; ``None`` for what the model was made for.
            sequence_parallel: divide the language module's sequence over its tensor-parallel ranks between attention
                and MLP; a mixture of experts with tp > 1 needs it.
            attention: of all transformers, as for TransformerSize.
            recompute: of the language module, as for TransformerSize.
            pad_token_id: fills up samples; ``None`` takes the config's, or 0 where it has none.
            max_new_tokens: as for MimoModule.

        Raises:
            ConfigError: if transformers is not installed, the folder is none of a model, or the model is not supported.
        """
        folder = Path(pretrained)
        config = read_config(folder)
        self._pretrained = model_of(config)
        check_tokenizer(folder, self._pretrained.vocab_size)
        super().__init__(
            pad_token_id=_pad_token_of(config) if pad_token_id is None else pad_token_id,
            max_new_tokens=max_new_tokens,
            frozen=frozen,
        )
        self.pretrained = folder
        self.lr = lr
        self.weight_decay = weight_decay
        self.overrides = dict(overrides or {})
        self._options = BuildOptions(
            max_sequence_length=max_sequence_length,
            sequence_parallel=sequence_parallel,
            attention=attention,
            recompute=recompute,
        )
        self._has_weights = False

    @override
    def check_layout(self, layout: MimoLayout) -> None:
        """
        Raises:
            LayoutError: if the model does not divide over the layout.
            ConfigError: if the folder holds no weights that may be read, or they do not fit its config.json.
        """
        layout.check_modules(self._pretrained.modules)
        self._pretrained.check(layout, self._options)
        with SafetensorsFolder(self.pretrained) as folder:
            self._table(folder, layout)

    @override
    def configure_mimo(self, infra: MimoModelInfra) -> MimoModelConfig:
        return self._pretrained.mimo_config(infra, self._options)

    @override
    def sample_format(self) -> SampleFormat:
        return self._pretrained.complete_format(super().sample_format())

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = OptimizerConfig(optimizer="adam", lr=self.lr, weight_decay=self.weight_decay)
        return self.build_optimizer(config, overrides=self.overrides)

    @override
    def forward(self, batch: Microbatch) -> Any:
        """As MimoModule's.

        Raises:
            ConfigError: if the weights have not been read, because of an override of :meth:`configure_callbacks`.
        """
        if not self._has_weights:
            raise ConfigError(
                f"{type(self).__name__} has no weights yet: its configure_callbacks() must call super()'s."
            )
        return super().forward(batch)

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        """Puts the callback that reads the weights before all others, which may look at them."""
        callbacks: list[pl.Callback] = vars(self.trainer)["callbacks"]  # the Trainer's connector sets it
        if not any(isinstance(callback, _LoadPretrained) for callback in callbacks):
            callbacks.insert(0, _LoadPretrained())
        return []

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The checkpoint has filled the model."""
        self._has_weights = True

    def load_pretrained(self) -> None:
        """Fill this rank's weights, and the optimizer's copies of them, from the folder, unless they have been filled.

        No collective. Called after a checkpoint would have been read and before the first batch.

        Raises:
            CheckpointError: if the files do not fit the model.
        """
        if self._has_weights:
            return
        strategy: Any = self.trainer.strategy
        optimizer = strategy.optimizers[0].mimo if strategy.optimizers else None
        complete_gathering(self.mimo_model)
        with SafetensorsFolder(self.pretrained) as folder:
            reader = PretrainedReader(folder, self._table(folder, self.infra.layout))
            load_shards(self.mimo_model, self.infra, reader, optimizer)
        self._has_weights = True

    def _table(self, folder: SafetensorsFolder, layout: MimoLayout) -> RuleTable:
        shapes = folder.shapes()
        table = self._pretrained.rules(shapes, self._pretrained.padded_vocab_size(layout.modules[LANGUAGE].tp))
        table.check_files(shapes, where=str(self.pretrained))
        return table


class _LoadPretrained(pl.Callback):
    """Calls :meth:`HuggingFaceModule.load_pretrained` when a checkpoint, if there is one, has been read."""

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load(pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load(pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._load(pl_module)

    @staticmethod
    def _load(module: pl.LightningModule) -> None:
        assert isinstance(module, HuggingFaceModule), "it brought this callback along"
        module.load_pretrained()


def _pad_token_of(config: Any) -> int:
    for each in (config, getattr(config, "text_config", None)):
        if (token := getattr(each, "pad_token_id", None)) is not None:
            return token
    return 0
