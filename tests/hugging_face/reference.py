"""What transformers itself makes of a folder: logits, loss, answers, and a plain loop of training, all in float64."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from tests.hugging_face.tiny_models import IMAGE_TOKEN, MODELS, VOCABULARY, Items

LEARNING_RATE = 1e-3
STEPS = 2
NEW_TOKENS = 4
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        ids: int64 ``[S]``, prompt with placeholders and answer.
        answer: tokens of the answer, which alone counts.
        inputs: what a processor gives beside tokens; empty where there are no items.
        items: where they belong in this package; ``None`` for text alone.
    """

    ids: torch.Tensor
    answer: int
    inputs: Tensors
    items: Items | None

    @property
    def labels(self) -> torch.Tensor:
        """As transformers wants them: not shifted, -100 where nothing counts."""
        return torch.where(torch.arange(len(self.ids)) >= len(self.ids) - self.answer, self.ids, -100)


def conversations(number: int, items: Items | None = None) -> list[Conversation]:
    """Samples with 0, 1 and 2 items; text alone where there are none."""
    generator = torch.Generator().manual_seed(3)

    def text(length: int) -> list[int]:
        return torch.randint(3, IMAGE_TOKEN, (length,), generator=generator).tolist()

    result = []
    for i in range(number):
        placeholders, inputs = items.make(i % 3, generator) if items and i % 3 else ([], {})
        ids = [1]
        for tokens in placeholders:
            ids += [*text(2), *items.before, *[IMAGE_TOKEN] * tokens]
        answer = 3 + i % 2
        ids += text(3 + i) + text(answer)
        result.append(Conversation(torch.tensor(ids), answer, inputs, items))
    return result


class _Exactly(TorchFunctionMode):
    """Lifts roundings of float64 to float32.

    transformers has them in norms, softmax, routers and loss, megatron-core in the routers of experts.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_double = bool(args) and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64
        if is_double and func is torch.Tensor.float:
            return args[0]
        if is_double and func is torch.Tensor.to:
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        if is_double and kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def exactly() -> Iterator[None]:
    with _Exactly():
        yield


def load(folder: Path) -> transformers.PreTrainedModel:
    """The model of a folder, in float64 and with eager attention."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    if hasattr(config, "_experts_implementation"):  # since transformers 5, whose fastest has no float64
        options["experts_implementation"] = "eager"
    model = kind.from_pretrained(folder, **options).eval()
    # What a class of transformers does not train, transformers 5 trains once it is loaded.
    with torch.device("meta"):
        for name, parameter in kind(config).named_parameters():
            model.get_parameter(name).requires_grad_(parameter.requires_grad)
    return model


def positions_are_exact(kind: str) -> bool:
    """Whether the image encoder of Idefics3 or SmolVLM gives each patch of a whole tile a position of its own.

    transformers 4.56 rounds, so that some patches have the position of the one before, other ones in other dtypes.
    """
    config = MODELS[kind]().config.vision_config
    embeddings = MODELS[kind]().model.vision_model.embeddings
    side = config.image_size // config.patch_size
    with torch.no_grad():
        for parameter in embeddings.patch_embedding.parameters():
            parameter.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
        pixels = torch.zeros(1, 3, config.image_size, config.image_size)
        found = embeddings(pixels, torch.ones(1, side, side, dtype=torch.bool))
    return torch.equal(found[0, :, 0], torch.arange(float(side**2)))


def logits_of(model: transformers.PreTrainedModel, sample: Conversation, **options: Any) -> Any:
    """transformers' output for one sample alone."""
    ids = sample.ids[None]
    # Without a mask, transformers 4 takes the tokens of an image, whose positions do not increase, for packed samples.
    mask = torch.ones_like(ids)
    inputs = {**sample.inputs, **_token_types(model, ids)}
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs, **options)


def _token_types(model: transformers.PreTrainedModel, ids: torch.Tensor) -> Tensors:
    """Which tokens are of images, for models that compute positions in space from it."""
    wanted = "mm_token_type_ids" in inspect.signature(model.forward).parameters
    return {"mm_token_type_ids": (ids == IMAGE_TOKEN).int()} if wanted else {}


@dataclass(frozen=True)
class Truth:
    """Attributes:
    logits: of each sample, ``[S, vocabulary]``.
    losses: over all samples before each step, and after the last.
    answers: of each sample, greedy.
    gradients: of each step, under the names of the files.
    weights: after the last step, under the names of the files.
    """

    logits: list[torch.Tensor]
    losses: list[float]
    answers: list[list[int]]
    gradients: list[Tensors]
    weights: Tensors


def truth(folder: Path, samples: Sequence[Conversation], *, frozen: Sequence[str] = ()) -> Truth:
    """Run a folder's model in transformers.

    Args:
        folder: of the model.
        samples: one global batch.
        frozen: names of parameters, in transformers' model, that contain one of these are not trained.
    """
    model = load(folder)
    with exactly():
        with torch.no_grad():
            logits = [logits_of(model, sample).logits[0] for sample in samples]
            answers = [_answer(model, sample) for sample in samples]
        for name, parameter in model.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
        losses, gradients = [], []
        for _ in range(STEPS):
            optimizer.zero_grad()
            losses.append(_loss(model, samples))
            gradients.append(_under_file_names(model, lambda parameter: parameter.grad))
            optimizer.step()
        with torch.no_grad():
            losses.append(_loss(model, samples))
    return Truth(logits, losses, answers, gradients, _under_file_names(model, lambda parameter: parameter))


def _answer(model: transformers.PreTrainedModel, sample: Conversation) -> list[int]:
    prompt = sample.ids[: len(sample.ids) - sample.answer][None]
    model.generation_config.eos_token_id = None
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        suppress_tokens=[IMAGE_TOKEN] if sample.items else None,
        **sample.inputs,
        **_token_types(model, prompt),
    )
    return written[0, prompt.size(1) :].tolist()


def _loss(model: transformers.PreTrainedModel, samples: Sequence[Conversation]) -> float:
    """The mean over all tokens that count, by transformers' own loss. Leaves its gradients, if they are wanted."""
    total = sum(sample.answer for sample in samples)
    result = 0.0
    for sample in samples:
        loss = logits_of(model, sample, labels=sample.labels[None]).loss * sample.answer / total
        if torch.is_grad_enabled():
            loss.backward()
        result += loss.item()
    return result


def _under_file_names(
    model: transformers.PreTrainedModel, value: Callable[[torch.nn.Parameter], torch.Tensor | None]
) -> Tensors:
    """A tensor for each parameter, under the names that save_pretrained gives to it, zeros where there is none."""
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for parameter in model.parameters():
            found = value(parameter)
            parameter.data = torch.zeros_like(parameter) if found is None else found.detach().clone()
        model.save_pretrained(folder)
        for name, parameter in model.named_parameters():
            parameter.data = held[name]
        return load_file(Path(folder, "model.safetensors"))


assert IMAGE_TOKEN < VOCABULARY
