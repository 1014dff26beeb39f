"""Pipeline communication for modules on disjoint ranks.

Bridges between modules split activations at sample boundaries; hops connect the pipeline stages of one module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator, RankModuleInfo
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_mimo.comm.first_wait import OnFirstWait
from lightning_mimo.comm.p2p import DynamicShape, P2PLink, Receiver, Sender, Shapes
from lightning_mimo.layout.module_parallelism import LANGUAGE
from lightning_mimo.layout.pass_order import stages_behind
from lightning_mimo.layout.routes import routes_between
from lightning_mimo.microbatch import Microbatch
from lightning_mimo.parallel.infra import MimoModelInfra

ShapesOf = Callable[[Microbatch], Shapes | DynamicShape]
"""Function that returns the shapes of a microbatch's parts."""


class StageLink:
    """Links from one pipeline stage of a module to the previous and the next stage.

    Implements the methods of megatron-core's P2PCommunicator that its MultiModulePipelineCommunicator calls. The links
    already know the shapes and the position of the stage, so the corresponding arguments are ignored.
    """

    def __init__(self, previous: Receiver | None, following: Sender | None) -> None:
        self._previous, self._following = previous, following

    def recv_forward(self, tensor_shapes: Any, is_first_stage: bool) -> torch.Tensor:
        return self._receiver.recv_forward()

    def send_forward(self, output_tensors: torch.Tensor, is_last_stage: bool) -> None:
        self._sender.send_forward(output_tensors)

    def recv_backward(self, tensor_shapes: Any, is_last_stage: bool) -> torch.Tensor | None:
        return self._sender.recv_backward()

    def send_backward(self, input_tensor_grads: torch.Tensor, is_first_stage: bool) -> None:
        self._receiver.send_backward(input_tensor_grads)

    def send_forward_recv_backward(
        self, output_tensors: torch.Tensor, tensor_shapes: Any, is_last_stage: bool
    ) -> torch.Tensor | None:
        return self._sender.send_forward_recv_backward(output_tensors)

    def send_backward_recv_forward(
        self, input_tensor_grads: torch.Tensor, tensor_shapes: Any, is_first_stage: bool
    ) -> torch.Tensor:
        return self._receiver.send_backward_recv_forward(input_tensor_grads)

    @property
    def _receiver(self) -> Receiver:
        assert self._previous is not None, "the first stage receives no activations"
        return self._previous

    @property
    def _sender(self) -> Sender:
        assert self._following is not None, "the last stage sends no activations"
        return self._following


class MimoPipelineCommunicator(MultiModulePipelineCommunicator):
    """Communicator through which Megatron's 1F1B schedule transfers activations and gradients."""

    def __init__(
        self,
        infra: MimoModelInfra,
        config: TransformerConfig,
        *,
        needs_gradient: Callable[[str, int], bool],
        encoder_run_ahead: int,
        on_first_wait: Callable[[], None] | None = None,
    ) -> None:
        """Collective over the world on the first call for an infra: creates a process group for each direction.

        Args:
            infra: layout, grids and topology; its modules must be on disjoint ranks.
            config: config of the language module; ``pipeline_dtype`` is the dtype of the transferred tensors.
            needs_gradient: ``(module, pipeline stage)`` -> whether the output of that stage needs a gradient; must be
                the same on every rank. If not, no gradient is sent back.
            encoder_run_ahead: number of additional microbatches that encoders compute ahead of the schedule.
            on_first_wait: called once in every training pass, before this rank first waits for another; must not raise.
                A rank that receives nothing never calls it.
        """
        self._infra = infra
        self._run_ahead = encoder_run_ahead
        self._needs_gradient = needs_gradient
        self._on_first_wait = OnFirstWait(on_first_wait)
        self._ends: list[tuple[Receiver | Sender, ShapesOf]] = []
        self._encoder_hops: dict[str, tuple[Receiver | None, Sender | None]] = {}
        # Created here because it is collective, and every rank runs this whichever links it has.
        self._forward_group = infra.group_of_all("activations sent")
        self._backward_group = infra.group_of_all("gradients sent")
        layout = infra.layout
        has_announcements = any(layout.modules[encoder].pp > 1 for encoder in layout.encoders)
        self._announcement_group = infra.group_of_all("announcements") if has_announcements else None
        super().__init__(infra.module_to_grid_map, infra.topology, config)

    @property
    def current_stage(self) -> int:
        """Index of this rank's pipeline stage, computed from the end of the pipeline, which all modules share.

        Upstream counts from the beginning. An encoder with fewer stages than another would then run ahead of it by the
        difference and keep that many more microbatches in memory. The number of warm-up forward passes in the schedule
        is the number of later stages, so a larger distance from the end lets encoders run ahead.
        """
        name, place = next(iter(self.rank_module_map.items()))
        return self.total_stages - 1 - self._behind(name, place.pp_rank)

    def begin(self, microbatches: Sequence[Microbatch], *, forward_only: bool) -> None:
        """Prepare a pass. Call it before every pass.

        Args:
            microbatches: microbatches of the pass.
            forward_only: whether the pass has no backward.
        """
        self._on_first_wait.begin(is_due=not forward_only)
        for end, shapes_of in self._ends:
            end.expect([shapes_of(microbatch) for microbatch in microbatches], forward_only=forward_only)

    def complete(self, microbatch: Microbatch) -> None:
        """Fill in the counts that only the first stage of an encoder has loaded. Call it before every forward pass.

        Args:
            microbatch: the next microbatch; its ``modality_counts`` are updated in place.
        """
        for name, (previous, following) in self._encoder_hops.items():
            counts = microbatch["modality_counts"]
            if previous is not None:
                counts[name] = counts[name].told(previous.told, previous.told_more)
            if following is not None:
                following.tell(*counts[name].to_tell())

    def finish(self) -> None:
        """Wait for all pending sends. Call it after every pass."""
        for end, _ in self._ends:
            end.finish()

    def _build_bridge_comms(self) -> None:
        """Do nothing: :meth:`_build_rank_module_info_map` builds the bridges."""

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
        """Build this rank's end of the bridge from an encoder to the language module."""
        modules = self._infra.layout.modules
        theirs, stage = (encoder, modules[encoder].pp - 1) if mine == LANGUAGE else (LANGUAGE, 0)
        link = self._link("bridge", f"{encoder} -> {LANGUAGE}", mine, theirs, stage)
        parts, width = link.routes.parts, self.config.hidden_size

        def shapes_of(microbatch: Microbatch) -> Shapes:
            rows = microbatch["placeholders"][encoder]
            positions = len(rows) // parts
            return [(sum(rows[part * positions : (part + 1) * positions]), width) for part in range(parts)]

        gradients = self._needs_gradient(encoder, modules[encoder].pp - 1)
        return self._keep(kind(link, source=encoder, gradients=gradients), shapes_of)

    def _hop[End: (Receiver, Sender)](self, kind: type[End], name: str, stage: int, *, other: int) -> End:
        """Build this rank's end of the link between two adjacent pipeline stages of a module."""
        first = min(stage, other)
        link = self._link("pipeline", f"{name} stage {first} -> {first + 1}", name, name, other)
        shapes_of = self._language_stage if name == LANGUAGE else partial(_announced_by, name)
        return self._keep(kind(link, source=name, gradients=self._needs_gradient(name, first)), shapes_of)

    def _behind(self, name: str, stage: int) -> int:
        return stages_behind(self._infra.layout.modules, name, stage, encoder_run_ahead=self._run_ahead)

    def _language_stage(self, microbatch: Microbatch) -> Shapes:
        samples, length = microbatch["input_ids"].shape
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return [(-(-length // ranks), samples, self.config.hidden_size)]

    def _link(self, kind: str, label: str, mine: str, theirs: str, stage: int) -> P2PLink:
        modules = self._infra.layout.modules
        own = modules[mine].coordinates(dist.get_rank())["pp"]
        distance = abs(self._behind(mine, own) - self._behind(theirs, stage))
        return P2PLink(
            kind=kind,
            label=label,
            module=mine,
            routes=routes_between(modules[mine], modules[theirs], rank=dist.get_rank(), stage=stage),
            dtype=self.config.pipeline_dtype,
            # 1F1B itself never exceeds this limit; it takes effect if no gradient is sent back.
            in_flight=self.total_stages + self._run_ahead,
            # A stage that has sent activations `distance + 1` later than those of a gradient has received the gradient.
            gradients_in_flight=distance + 1,
            forward_group=self._forward_group,
            backward_group=self._backward_group,
            announcement_group=self._announcement_group,
            spans=self._infra.spans,
            on_first_wait=self._on_first_wait,
        )

    def _keep[End: (Receiver, Sender)](self, end: End, shapes_of: ShapesOf) -> End:
        self._ends.append((end, shapes_of))
        return end


def _announced_by(encoder: str, microbatch: Microbatch) -> DynamicShape:
    """Return the shape of activations between an encoder's stages, which only the encoder's own code knows.

    The counts that later stages check are announced with it.
    """
    return DynamicShape(numbers=len(microbatch["modality_counts"][encoder].to_tell()[0]))
