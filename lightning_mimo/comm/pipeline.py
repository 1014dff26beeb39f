"""The pipeline through all modules of a layout with ranks of their own: bridges that keep every sample's rows together,
and hops between the stages of one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator, RankModuleInfo
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.comm.p2p import DynamicShape, OnFirstWait, P2PLink, Receiver, Sender, Shapes
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.layout.routes import routes_between
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.parallel.infra import MimoModelInfra

ShapesOf = Callable[[Microbatch], Shapes | DynamicShape]
"""Microbatch -> shapes of its parts."""


class StageLink:
    """The neighbours of one pipeline stage of a module.

    Has the methods of megatron-core's P2PCommunicator that its MultiModulePipelineCommunicator calls. Shapes and
    places are known here, so the arguments that tell them are not looked at.
    """

    def __init__(self, previous: Receiver | None, following: Sender | None) -> None:
        self._previous, self._following = previous, following

    def recv_forward(self, tensor_shapes: Any, is_first_stage: bool) -> torch.Tensor:
        return self._previous.recv_forward()

    def send_forward(self, output_tensors: torch.Tensor, is_last_stage: bool) -> None:
        self._following.send_forward(output_tensors)

    def recv_backward(self, tensor_shapes: Any, is_last_stage: bool) -> torch.Tensor | None:
        return self._following.recv_backward()

    def send_backward(self, input_tensor_grads: torch.Tensor, is_first_stage: bool) -> None:
        self._previous.send_backward(input_tensor_grads)

    def send_forward_recv_backward(
        self, output_tensors: torch.Tensor, tensor_shapes: Any, is_last_stage: bool
    ) -> torch.Tensor | None:
        return self._following.send_forward_recv_backward(output_tensors)

    def send_backward_recv_forward(
        self, input_tensor_grads: torch.Tensor, tensor_shapes: Any, is_first_stage: bool
    ) -> torch.Tensor:
        return self._previous.send_backward_recv_forward(input_tensor_grads)


class MimoPipelineCommunicator(MultiModulePipelineCommunicator):
    """What Megatron's 1F1B schedule calls to move activations and gradients."""

    def __init__(
        self,
        infra: MimoModelInfra,
        config: TransformerConfig,
        *,
        needs_gradient: Callable[[str, int], bool],
        encoder_run_ahead: int,
        on_first_wait: Callable[[], None] | None = None,
    ) -> None:
        """Collective over the world the first time for an infra: it creates a process group for each direction.

        Args:
            infra: layout, grids and topology; none of its modules share ranks.
            config: the language module's; ``pipeline_dtype`` is the dtype on the wire.
            needs_gradient: ``(module, pipeline stage)`` -> whether the output of that stage needs a gradient; the same
                on every rank. Nothing is sent back where it does not.
            encoder_run_ahead: microbatches that encoders compute before it is their turn.
            on_first_wait: what this rank does once in every training pass, before it waits for others first; it must
                not raise. A rank that receives nothing never calls it.
        """
        self._infra = infra
        self._run_ahead = encoder_run_ahead
        self._needs_gradient = needs_gradient
        self._on_first_wait = OnFirstWait(on_first_wait)
        self._ends: list[tuple[Receiver | Sender, ShapesOf]] = []
        self._encoder_hops: dict[str, tuple[Receiver | None, Sender | None]] = {}
        # Here, where every rank comes by, whatever edges it has.
        self._forward_group = infra.group_of_all("activations sent")
        self._backward_group = infra.group_of_all("gradients sent")
        super().__init__(infra.module_to_grid_map, infra.topology, config)

    @property
    def current_stage(self) -> int:
        """This rank's stage, counted from the end of the pipeline, where all modules meet.

        Upstream counts from the beginning, so that an encoder with fewer stages than another would run ahead of it by
        the difference and keep that many more microbatches. The schedule begins with as many forward passes as there
        are stages behind this one, so an encoder runs ahead of its turn by standing further from the end.
        """
        modules = self._infra.layout.modules
        name, place = next(iter(self.rank_module_map.items()))
        behind = place.pp_size - 1 - place.pp_rank
        if name != LANGUAGE:
            behind += modules[LANGUAGE].pp + self._run_ahead
        return self.total_stages - 1 - behind

    def begin(self, microbatches: Sequence[Microbatch], *, forward_only: bool) -> None:
        """Call it before every pass.

        Args:
            microbatches: that go through the schedule.
            forward_only: whether no gradient comes back.
        """
        self._on_first_wait.begin(is_due=not forward_only)
        for end, shapes_of in self._ends:
            end.expect([shapes_of(microbatch) for microbatch in microbatches], forward_only=forward_only)

    def complete(self, microbatch: Microbatch) -> None:
        """Call it before every forward pass: fill in what only the first stage of an encoder has loaded.

        Args:
            microbatch: the next one; its numbers of items are changed.
        """
        for name, (previous, following) in self._encoder_hops.items():
            counts = microbatch["modality_counts"]
            if previous is not None:
                counts[name] = replace(counts[name], items=previous.told)
            if following is not None:
                following.tell(counts[name].items)

    def finish(self) -> None:
        """Call it after every pass. Waits for what is still on its way."""
        for end, _ in self._ends:
            end.finish()

    def _build_bridge_comms(self) -> None:
        """Nothing: they belong to the modules of this rank, below."""

    def _build_rank_module_info_map(self) -> None:
        modules, rank = self._infra.layout.modules, dist.get_rank()
        for name in self._infra.participating_modules:
            stage, stages = modules[name].coordinates(rank)["pp"], modules[name].pp
            is_first, is_last = stage == 0, stage == stages - 1
            into = self._infra.layout.encoders if name == LANGUAGE and is_first else ()
            previous = None if is_first else self._hop(Receiver, name, stage, other=stage - 1)
            following = None if is_last else self._hop(Sender, name, stage, other=stage + 1)
            if name != LANGUAGE:
                self._encoder_hops[name] = previous, following
            self.rank_module_map[name] = RankModuleInfo(
                pp_rank=stage,
                pp_size=stages,
                p2p_communicator=StageLink(previous, following),
                bridge_comms_as_src_module=[self._bridge(Sender, name, name)] if name != LANGUAGE and is_last else [],
                bridge_comms_as_dest_module=[self._bridge(Receiver, encoder, name) for encoder in into],
            )

    def _bridge[End: (Receiver, Sender)](self, kind: type[End], encoder: str, mine: str) -> End:
        """This rank's end of the bridge from an encoder to the language module."""
        modules = self._infra.layout.modules
        theirs, stage = (encoder, modules[encoder].pp - 1) if mine == LANGUAGE else (LANGUAGE, 0)
        link = self._link("bridge", f"{encoder} -> {LANGUAGE}", mine, theirs, stage)
        parts, width = link.routes.parts, self.config.hidden_size

        def shapes_of(microbatch: Microbatch) -> Shapes:
            rows = microbatch["placeholders"][encoder]
            samples = len(rows) // parts
            return [(sum(rows[part * samples : (part + 1) * samples]), width) for part in range(parts)]

        gradients = self._needs_gradient(encoder, modules[encoder].pp - 1)
        return self._keep(kind(link, source=encoder, gradients=gradients), shapes_of)

    def _hop[End: (Receiver, Sender)](self, kind: type[End], name: str, stage: int, *, other: int) -> End:
        """This rank's end of what lies between two pipeline stages of a module."""
        first = min(stage, other)
        link = self._link("pipeline", f"{name} stage {first} -> {first + 1}", name, name, other)
        shapes_of = self._language_stage if name == LANGUAGE else partial(_announced_by, name)
        return self._keep(kind(link, source=name, gradients=self._needs_gradient(name, first)), shapes_of)

    def _language_stage(self, microbatch: Microbatch) -> Shapes:
        samples, length = microbatch["input_ids"].shape
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return [(-(-length // ranks), samples, self.config.hidden_size)]

    def _link(self, kind: str, label: str, mine: str, theirs: str, stage: int) -> P2PLink:
        modules = self._infra.layout.modules
        return P2PLink(
            kind=kind,
            label=label,
            module=mine,
            routes=routes_between(modules[mine], modules[theirs], rank=dist.get_rank(), stage=stage),
            dtype=self.config.pipeline_dtype,
            # By itself 1F1B has no more under way in either direction; where no gradient comes back, this holds it.
            in_flight=self.total_stages + self._run_ahead,
            forward_group=self._forward_group,
            backward_group=self._backward_group,
            spans=self._infra.spans,
            on_first_wait=self._on_first_wait,
        )

    def _keep[End: (Receiver, Sender)](self, end: End, shapes_of: ShapesOf) -> End:
        self._ends.append((end, shapes_of))
        return end


def _announced_by(encoder: str, microbatch: Microbatch) -> DynamicShape:
    """What an encoder passes on between its stages only its own code knows; the items of every sample go with it."""
    return DynamicShape(numbers=len(microbatch["modality_counts"][encoder].items))
