"""Clips of Qwen2-Audio: filled up with silence, which gives no embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers

from lightning_mimo import ConfigError, DataError, HuggingFaceModule, LayoutError, MimoLayout, ModuleParallelism
from lightning_mimo.data.encoder_inputs import read_inputs
from lightning_mimo.data.sample_format import SampleFormat
from lightning_mimo.models.hugging_face.qwen2_audio import Clips
from lightning_mimo.models.hugging_face.registry import model_of
from tests.hugging_face.processors import word_tokenizer
from tests.hugging_face.tiny_models import AUDIO, MODELS, save_model

CLIPS = Clips(bins=AUDIO["num_mel_bins"], positions=AUDIO["max_source_positions"])
FORMAT = SampleFormat(encoders={"audio": {"encoder": CLIPS.item_sizes}})


def _read(inputs: dict[str, Any]) -> Any:
    return read_inputs(7, {"modality_inputs": {"audio": {"encoder": inputs}}}, "audio", FORMAT)


def test_embeddings_are_counted_as_in_transformers() -> None:
    model = MODELS["qwen2_audio"]()
    tower = getattr(model, "model", model).audio_tower  # the latter in transformers 4
    frames = torch.arange(1, 3001)
    positions, embeddings = tower._get_feat_extract_output_lengths(frames)
    assert torch.equal(CLIPS.positions_of(frames), positions)
    assert torch.equal(CLIPS.embeddings_of(positions), embeddings)


def test_what_the_processor_gives_is_a_sample() -> None:
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=AUDIO["num_mel_bins"], sampling_rate=16000, hop_length=1000, chunk_length=1, n_fft=2000
    )
    processor = transformers.Qwen2AudioProcessor(
        extractor, word_tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "what")
    )
    sounds = [np.sin(np.arange(length, dtype=np.float32)) for length in (16000, 7000, 9100)]
    text = "<|audio_bos|><|AUDIO|><|audio_eos|> what " * len(sounds)
    made = processor(audio=sounds, text=text, sampling_rate=16000, return_tensors="pt")
    read = _read({name: made[name] for name in ("input_features", "feature_attention_mask")})
    assert (read.items, read.embeddings) == (3, int((made["input_ids"] == processor.audio_token_id).sum()))


def test_other_clips_are_refused() -> None:
    features, mask = torch.zeros(1, CLIPS.bins, CLIPS.frames), torch.ones(1, CLIPS.frames)
    short = {"input_features": features[..., :10], "feature_attention_mask": mask[:, :10]}
    with pytest.raises(DataError, match=r"^Sample 7: audio.encoder: input_features has the shape \[1, 6, 10\] and .*"):
        _read(short)
    mask[0, 0] = 0
    with pytest.raises(DataError, match=r"^Sample 7: audio.encoder: feature_attention_mask is not ones and then zeros"):
        _read({"input_features": features, "feature_attention_mask": mask})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio_config.dropout": 0.1}, r"dropout=0.1 is not supported\. Set it to 0.0"),
        ({"audio_config.encoder_layerdrop": 0.1}, r"encoder_layerdrop=0.1 is not supported"),
        ({"text_config.tie_word_embeddings": True}, r"tie_word_embeddings=True is not supported"),
    ],
)
def test_config_that_is_not_covered_is_refused(changes: dict[str, Any], message: str) -> None:
    config = MODELS["qwen2_audio"]().config
    for path, value in changes.items():
        part, _, name = path.partition(".")
        setattr(getattr(config, part), name, value)
    with pytest.raises(ConfigError, match=message):
        model_of(config)


def test_encoder_is_not_divided(tmp_path: Any) -> None:
    model = HuggingFaceModule(str(save_model("qwen2_audio", tmp_path / "model")))
    cuts = {"audio": ModuleParallelism(tp=2), "language": ModuleParallelism()}
    layout = MimoLayout.resolve(cuts, world_size=3, colocate=False)
    with pytest.raises(LayoutError, match=r"'audio': tp=2, pp=1, but an encoder of the kind 'qwen2_audio_encoder'"):
        model.check_layout(layout)
