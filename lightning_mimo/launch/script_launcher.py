"""Starts the script once more for each further GPU of this node, where ranks cannot be forked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, override

from lightning.fabric.plugins import ClusterEnvironment

from lightning_mimo.upstream.lightning import _SubprocessScriptLauncher


class ScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, which starts no process before the layout has been checked."""

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        *,
        num_processes: int,
        num_nodes: int,
        validate: Callable[[Any], object],
    ) -> None:
        """
        Args:
            cluster_environment: Lightning's ClusterEnvironment.
            num_processes: ranks on this node.
            num_nodes: nodes.
            validate: called with the Trainer before any process is started; raises if the run cannot work.
        """
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._validate = validate

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks of this node, and call ``function`` in each."""
        self._validate(trainer)
        return super().launch(function, *args, trainer=trainer, **kwargs)
