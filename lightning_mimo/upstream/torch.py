"""What is private in torch."""

from __future__ import annotations

from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from lightning_mimo.upstream import Attribute

IMPORTED = {
    "_get_default_store": "the one way for ranks to talk while their process groups hang",
    "_BatchNorm": "base class of all batch norms, which are refused",
    "FakeTensor": "tensors without memory, on which an estimate runs a step",
    "FakeTensorMode": "makes them",
    "in_kernel_invocation_manager": "runs an operation on the shapes of fake tensors alone",
    "unset_fake_temporarily": "for what an estimate must compute",
    "TorchDispatchMode": "sees every operation, to count it",
    "_disable_current_modes": "for samples, which are real",
    "tree_map": "torch's own walk through lists and dictionaries, as DataLoaders use it",
}
"""Name -> reason."""

ATTRIBUTES = (
    Attribute("torch", "_foreach_norm", "norms of all gradients in one kernel, as torch's own clipping takes them"),
    Attribute("torch", "_foreach_mul_", "the same for the clipping"),
    Attribute("torch", "_assert_async", "a check on the device, for which the host does not wait"),
    Attribute("torch.nn.Module", "_apply", "moves and converts a module; rotary frequencies must keep their dtype"),
    Attribute("torch.nn.Module", "_non_persistent_buffers_set", "which buffers belong into a checkpoint"),
    Attribute("torch.autograd.variable.Variable", "_execution_engine", "calls back when a backward pass ends"),
    Attribute(
        "torch.utils.data._utils.worker",
        "_worker_info",
        "hidden while a stream is read: libraries divide it over workers, and every worker reads all of it",
    ),
    Attribute("torch.distributed.ProcessGroup", "_device_types", "whose backends a timeout is set for, in torch 2.11"),
    Attribute("torch.distributed.ProcessGroup", "_get_backend", "one of them"),
    Attribute("torch.distributed.ProcessGroupGloo", "_set_default_timeout", "sets it"),
    Attribute("torch.ops.aten", "_local_scalar_dense", "the operation with which code reads a number"),
    Attribute("torch.ops.aten", "_unsafe_view", "a view that its schema does not call one"),
    Attribute("torch.ops.c10d", "_allgather_base_", "the operation of all_gather_into_tensor"),
    Attribute("torch.ops.c10d", "_reduce_scatter_base_", "the operation of reduce_scatter_tensor"),
    Attribute("torch.UntypedStorage", "_cdata", "tells storages apart"),
    Attribute("torch._ops.OpOverload", "_schema", "whether an operation makes a view, and its arguments' names"),
    Attribute("torch._ops.OpOverload", "_overloadpacket", "the operation without the kinds of its arguments"),
    Attribute("torch.nn.Module", "_parameters", "where an estimate puts parameters without memory"),
    Attribute("torch.nn.Module", "_buffers", "the same for buffers"),
    Attribute(
        "torch.testing._internal.distributed.fake_pg",
        "FakeProcessGroup",
        "its options; importing it registers the backend, so it is imported there only",
    ),
    Attribute(
        "torch.testing._internal.distributed.fake_pg",
        "FakeStore",
        "a rank without others, for a dry run; importing it registers the backend, so it is imported there only",
    ),
)
