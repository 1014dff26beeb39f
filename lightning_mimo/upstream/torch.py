"""What is private in torch."""

from __future__ import annotations

from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from lightning_mimo.upstream import Attribute

IMPORTED = {
    "_get_default_store": "the one way for ranks to talk while their process groups hang",
    "_BatchNorm": "base class of all batch norms, which are refused",
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
    Attribute("torch.distributed.distributed_c10d", "_set_pg_timeout", "the name of set_timeout before it was public"),
    Attribute(
        "torch.testing._internal.distributed.fake_pg",
        "FakeStore",
        "a rank without others, for a dry run; importing it registers the backend, so it is imported there only",
    ),
)
