"""How far a layout is from transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_mimo.checkpoint.shards import join
from lightning_mimo.commands.export_hf import export_hf
from lightning_mimo.models.hugging_face.folder import read_config
from lightning_mimo.models.hugging_face.registry import model_of
from lightning_mimo.weights.files import SafetensorsFolder
from tests.hugging_face.reference import Conversation, Tensors, Truth, conversations, exactly, load, logits_of, truth
from tests.hugging_face.runs import Found, Layout
from tests.hugging_face.tiny_models import ITEMS, save_model

SAMPLES = 6
_EMBEDDINGS = "language.embedding.word_embeddings.weight"
# What is smaller than this part of the largest gradient counts as this large: those of the biases of keys, where there
# are no rotary positions, are zero but for rounding.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Pretrained:
    """A folder, samples, and what transformers makes of them."""

    folder: Path
    samples: list[Conversation]
    truth: Truth


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Largest relative differences. A tensor's is relative to its own largest entry.

    Attributes:
        logits: of all samples before training.
        loss: before and after training.
        gradient: of each step, under the files' names.
        weight: after training, under the files' names.
        export: of transformers' logits on what was exported after training, from this package's.
        answers_are_equal: whether the greedy answers are.
    """

    logits: float
    loss: float
    gradient: float
    weight: float
    export: float
    answers_are_equal: bool


def make_pretrained(kind: str, folder: Path) -> Pretrained:
    """Make a tiny model and run it in transformers."""
    # The files have float64, too: an export then shows every digit of the training.
    save_model(kind, folder, dtype=torch.float64)
    samples = conversations(SAMPLES, ITEMS.get(kind))
    return Pretrained(folder, samples, truth(folder, samples))


def compare(model: Pretrained, layout: Layout, found: Sequence[Found], checkpoint: Path, out: Path) -> Differences:
    """Compare what all ranks saw with transformers.

    Args:
        model: in transformers.
        layout: in which it ran.
        found: by rank.
        checkpoint: after training.
        out: for the export of it.
    """
    expected = model.truth
    export_hf(checkpoint, out, pretrained=model.folder)
    exported = load(out)
    with torch.no_grad(), exactly():
        theirs = [logits_of(exported, sample).logits[0] for sample in model.samples]
    losses = [_loss(found, "logits", model.samples), _loss(found, "trained_logits", model.samples)]
    for rank in found:
        # Logged are validation and the loss of each step before its update, both rounded to float32.
        wanted = [expected.losses[0], *expected.losses[:-1]]
        assert all(abs(a - b) < 1e-6 * b for a, b in zip(rank.losses, wanted, strict=True))
    gradients = [_in_files_form(model, layout, found, step) for step in range(len(expected.gradients))]
    with SafetensorsFolder(out) as files:
        weights = {name: files.whole(name) for name in files.names()}
    return Differences(
        logits=_of_logits(found, "logits", expected.logits),
        loss=max(abs(a - b) / b for a, b in zip(losses, expected.losses[:: len(expected.losses) - 1], strict=True)),
        gradient=max(
            (
                _relative(
                    ours[name], whole[name], floor=_FLOOR * max(float(each.abs().max()) for each in whole.values())
                )
                for ours, whole in zip(gradients, expected.gradients, strict=True)
                for name in ours
            ),
            default=0.0,
        ),
        weight=max(_relative(weights[name], expected.weights[name]) for name in weights),
        export=_of_logits(found, "trained_logits", theirs),
        answers_are_equal=all(each.answers == expected.answers for each in found),
    )


def _in_files_form(model: Pretrained, layout: Layout, found: Sequence[Found], step: int) -> Tensors:
    """Gradients of a step under the files' names: the rules of import, read backwards, hold for them, too."""
    pieces: dict[str, list] = {}
    for rank in found:
        for name, piece in rank.gradients[step].items():
            pieces.setdefault(name, []).append(piece)
    whole = {name: join(each) for name, each in pieces.items()}
    with SafetensorsFolder(model.folder) as files:
        table = model_of(read_config(model.folder)).rules(files.shapes(), whole[_EMBEDDINGS].size(0))
    for name in set().union(*(rank.untrained for rank in found)):  # transformers' loop has zeros there, too
        whole[name] = torch.zeros(table.rules[name].shape, dtype=torch.float64)
    table.check_parameters({name: tensor.shape for name, tensor in whole.items()}, all_of=True)
    return {name: table.gather(name, whole.__getitem__) for name in table.sources}


def _whole_logits(found: Sequence[Found], which: str) -> dict[int, torch.Tensor]:
    parts: dict[int, dict[int, torch.Tensor]] = {}
    for rank in found:
        for sample, logits in getattr(rank, which).items():
            parts.setdefault(sample, {})[rank.tp_rank] = logits
    return {sample: torch.cat([each[tp] for tp in sorted(each)], dim=-1) for sample, each in parts.items()}


def _of_logits(found: Sequence[Found], which: str, expected: Sequence[torch.Tensor]) -> float:
    whole = _whole_logits(found, which)
    assert sorted(whole) == list(range(len(expected)))
    for sample, logits in whole.items():
        assert (logits[:, expected[sample].size(-1) :] == -torch.inf).all(), "padding can be chosen"
    return max(
        _relative(logits[:, : expected[sample].size(-1)], expected[sample][:-1]) for sample, logits in whole.items()
    )


def _loss(found: Sequence[Found], which: str, samples: Sequence[Conversation]) -> float:
    """The mean over all tokens that count, from this package's logits: what the trainer logs is rounded to float32."""
    whole, total = _whole_logits(found, which), 0.0
    for i, sample in enumerate(samples):
        losses = torch.nn.functional.cross_entropy(whole[i], sample.labels[1:], reduction="sum", ignore_index=-100)
        total += float(losses)
    return total / sum(sample.answer for sample in samples)


def _relative(found: torch.Tensor, expected: torch.Tensor, *, floor: float = 0.0) -> float:
    assert found.shape == expected.shape
    difference = float((found.double() - expected.double()).abs().max())
    assert difference == difference, "a difference is not a number"
    scale = max(floor, float(expected.abs().max()))
    return difference / scale if scale else difference
