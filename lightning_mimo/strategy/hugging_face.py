"""A MimoModule that starts from a pretrained model of the Hugging Face hub, in any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, override

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.optimizer import OptimizerConfig

from lightning_mimo.checkpoint.initial import check_origins, find_origins
from lightning_mimo.checkpoint.sources import PretrainedSource, WeightSource
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.layers.attention import AttentionKind, check_packed_attention
from lightning_mimo.layout.layout import MimoLayout
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.mimo.parameter_names import lies_under
from lightning_mimo.models.hugging_face.decoder import BuildOptions
from lightning_mimo.models.hugging_face.folder import check_tokenizer, read_config
from lightning_mimo.models.hugging_face.hub import folder_of
from lightning_mimo.models.hugging_face.registry import model_of
from lightning_mimo.models.sizes import Recompute
from lightning_mimo.optim.param_groups import OptimizerOverride
from lightning_mimo.parallel.infra import MimoModelInfra
from lightning_mimo.strategy.module import MimoModule
from lightning_mimo.weights.files import SafetensorsFolder, has_weights
from lightning_mimo.weights.rules import RuleTable

PRETRAINED_FOLDER = "hugging_face_folder"
"""Key of a checkpoint's ``trainer.pt`` under which the absolute path of the folder stands."""


class HuggingFaceModule(MimoModule):
    """A model of the Hugging Face hub: sizes come from the folder's config.json, the first weights from its files.

    The layout has the modules of the model: ``language`` for a text model, ``images`` and ``language`` for a LLaVA or a
    Qwen-VL. The ``modality_inputs`` of samples are ``{"images": {"vision": {"pixel_values": [n, 3, height, width]}}}``;
    for a Qwen-VL ``{"images": {"vision": {"pixel_values": [patches, d], "image_grid_thw": [n, 3]}}}``, as its
    processor makes them.

    Weights are read once, when a run starts at step 0; with ``ckpt_path`` the checkpoint has them. Each rank reads only
    the slices of the files that it holds. ``lightning-mimo export-hf`` turns a checkpoint into a folder again.

    Example::

        model = HuggingFaceModule("models/llava-1.5-7b-hf", frozen=["images.encoders"], lr=2e-5)
        strategy = MimoStrategy({"images": ModuleParallelism(tp=2), "language": ModuleParallelism(tp=4)}, 128)
        Trainer(devices=6, strategy=strategy, precision="bf16-mixed").fit(model, data)
    """

    _draws_weights = False

    def __init__(
        self,
        pretrained: str | Path,
        *,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        overrides: Mapping[str, OptimizerOverride] | None = None,
        frozen: Sequence[str] = (),
        init_from: str | Path | None = None,
        init_missing: Sequence[str] = (),
        max_sequence_length: int | None = None,
        sequence_parallel: bool = False,
        attention: AttentionKind = "sdpa",
        recompute: Recompute | None = None,
        pad_token_id: int | None = None,
        max_new_tokens: int = 16,
        labels_shifted: bool = True,
        extra_keys: Sequence[str] = (),
    ) -> None:
        """
        Args:
            pretrained: folder with config.json and safetensors files, or the id of a model of the hub such as
                ``llava-hf/llava-1.5-7b-hf``, which is downloaded. No code in it is run. For a dry run, config.json is
                enough.
            lr: learning rate of Adam, with Megatron's defaults otherwise (gradients are clipped to a norm of 1);
                override :meth:`configure_optimizers` for anything else.
            weight_decay: of all weights but biases and norms.
            overrides: what is different for a module or a part of one, as for :meth:`MimoModule.build_optimizer`.
            frozen: as for MimoModule; ``"images.encoders"`` is the vision encoder, ``"images.input_projections"`` the
                projector.
            init_from: as for MimoModule; goes before the folder, which holds what it does not.
            init_missing: names of modules or submodules that neither holds; these start from the seed.
            max_sequence_length: longest sequence in tokens; ``None`` for what the model was made for.
            sequence_parallel: divide the language module's sequence over its tensor-parallel ranks between attention
                and MLP; a mixture of experts with tp > 1 needs it.
            attention: of all transformers, as for TransformerSize.
            recompute: of the language module, as for TransformerSize.
            pad_token_id: fills up samples; ``None`` takes the config's, or 0 where it has none.
            max_new_tokens: as for MimoModule.
            labels_shifted: as for MimoModule; ``False`` for labels in the format of transformers.
            extra_keys: as for MimoModule.

        Raises:
            ConfigError: if transformers is not installed, the folder is none of a model, the download failed, or the
                model is not supported.
        """
        folder = folder_of(pretrained)
        config = read_config(folder)
        self._pretrained = model_of(config)
        check_tokenizer(folder, self._pretrained.vocab_size)
        super().__init__(
            pad_token_id=_pad_token_of(config) if pad_token_id is None else pad_token_id,
            max_new_tokens=max_new_tokens,
            frozen=frozen,
            labels_shifted=labels_shifted,
            extra_keys=extra_keys,
            init_from=init_from,
            init_missing=init_missing,
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

    @override
    def check_layout(self, layout: MimoLayout) -> None:
        """
        Raises:
            LayoutError: if the model does not divide over the layout.
            ConfigError: for a sequence length at which the model would compute something else.
        """
        layout.check_modules(self._pretrained.modules)
        self._pretrained.check(layout, self._options)

    @override
    def check_weights(self, layout: MimoLayout) -> None:
        """
        Raises:
            ConfigError: if the folder holds no weights that may be read, or they do not fit its config.json.
            CheckpointError: if files are damaged, or a parameter has no weight.
        """
        super().check_weights(layout)
        with SafetensorsFolder(self.pretrained) as files:
            table = self._table(files.shapes(), layout)
        held = {name: rule.shape for name, rule in table.rules.items()}
        origins = find_origins(held, self.weight_sources(layout), self.init_missing)
        check_origins(origins, self.init_missing)

    @override
    def check_packing(self) -> None:
        """
        Raises:
            ConfigError: for an attention that does not keep the samples of a row apart.
        """
        check_packed_attention(self._options.attention)

    @override
    def missing_files(self) -> str | None:
        if has_weights(self.pretrained):
            return None
        return f"{self.pretrained} holds its config.json only; a run needs the whole folder of the model."

    @override
    def weight_sources(self, layout: MimoLayout) -> list[WeightSource]:
        """
        Raises:
            ConfigError: if the folder holds no weights that may be read, or they do not fit its config.json.
            CheckpointError: if files are damaged.
        """
        before = super().weight_sources(layout)
        with SafetensorsFolder(self.pretrained) as files:
            shapes = files.shapes()
        table = self._table(shapes, layout)
        elsewhere = {name for source in before for name in source.shapes}
        table.check_files(
            shapes,
            where=str(self.pretrained),
            is_optional=lambda name: name in elsewhere or any(lies_under(name, each) for each in self.init_missing),
        )
        return [*before, PretrainedSource(self.pretrained, table)]

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
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the folder, so that ``lightning-mimo export-hf`` finds it."""
        checkpoint[PRETRAINED_FOLDER] = str(self.pretrained.resolve())

    def _table(self, shapes: Mapping[str, tuple[int, ...]], layout: MimoLayout) -> RuleTable:
        return self._pretrained.rules(shapes, self._pretrained.padded_vocab_size(layout.modules[LANGUAGE].tp))


def _pad_token_of(config: Any) -> int:
    for each in (getattr(config, "text_config", None), config):
        if (token := getattr(each, "pad_token_id", None)) is not None:
            return token
    return 0
