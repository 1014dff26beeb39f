"""Spans around what a rank computes: forward and backward of each microbatch, by module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.utils import unwrap_model
from torch.autograd import Variable

from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.mimo.model import RaggedMimoModel, module_and_name
from lightning_mimo.observe.spans import BACKWARD, FORWARD, Span, SpanInfo
from lightning_mimo.parallel.infra import MimoModelInfra


class ComputeSpans:
    """Opens and closes them from inside of Megatron's schedule, which knows when it runs what, but does not tell.

    A backward pass begins when the gradient of a module's output arrives, and ends with autograd's pass.
    """

    def __init__(self, model: RaggedMimoModel, infra: MimoModelInfra) -> None:
        """
        Args:
            model: its encoders are watched for the rest of its life where they share ranks with the language module.
            infra: has the recorder.
        """
        self._spans = infra.spans
        names = infra.participating_modules
        self._works = {
            (kind, name): SpanInfo(kind=kind, label=f"{kind} of {name}", module=name)
            for name in names
            for kind in (FORWARD, BACKWARD)
        }
        self._loss = SpanInfo(kind=FORWARD, label="loss", module=LANGUAGE)
        # Where modules share the ranks, what the language module and the bridges do not compute is theirs.
        self._main = LANGUAGE if LANGUAGE in names else names[0]
        self._microbatch = -1
        self._backward: Span | None = None
        self._forward: list[Span] = []
        for name in names:
            if name != self._main:
                # megatron-core calls forward() of what is outermost itself, past its hooks.
                module = unwrap_model(module_and_name(model, name)[0])
                module.register_forward_pre_hook(partial(self._before_encoder, name))
                module.register_forward_hook(partial(self._after_encoder, name))

    def begin(self) -> None:
        """The next microbatch is the first of a pass."""
        self._microbatch = -1
        self._backward = None
        self._forward.clear()

    def forward(self) -> Span:
        """Around the forward pass of one microbatch, in a ``with`` statement."""
        self._microbatch += 1
        return self._spans.span(self._works[FORWARD, self._main], self._microbatch)

    def output(self, output: Any) -> Any:
        """Watch the backward pass through what the forward pass returned, which is handed back."""
        for name, tensor in output.items() if isinstance(output, dict) else ():
            self._watch(name, tensor)
        return output

    def around_loss(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The loss function of the microbatch that was last run forward, recorded."""
        microbatch = self._microbatch

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._spans.span(self._loss, microbatch):
                result = loss(*args, **kwargs)
            if isinstance(result, tuple):
                self._watch(LANGUAGE, result[0])
            return result

        return call

    def _watch(self, name: str, tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(partial(self._begin_backward, self._works[BACKWARD, name], self._microbatch))

    def _begin_backward(self, work: SpanInfo, microbatch: int, gradient: torch.Tensor) -> None:
        if self._backward is None:
            # The loss scale is part of the pass, but comes before; it is a multiplication.
            Variable._execution_engine.queue_callback(self._end_backward)
        else:
            self._spans.end(self._backward)
        self._backward = self._spans.span(work, microbatch)

    def _end_backward(self) -> None:
        assert self._backward is not None, "the callback was queued when it began"
        self._spans.end(self._backward)
        self._backward = None

    def _before_encoder(self, name: str, *args: Any) -> None:
        self._forward.append(self._spans.span(self._works[FORWARD, name], self._microbatch))

    def _after_encoder(self, name: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._spans.end(self._forward.pop())
        self._watch(name, output[0] if isinstance(output, tuple) else output)
