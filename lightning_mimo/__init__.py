"""PyTorch Lightning for megatron-core's MimoModel, with every module on its own HyperCommGrid.

The public names are those of the stub file ``__init__.pyi``. They are imported when first used, so that
``import lightning_mimo`` costs milliseconds.
"""

from __future__ import annotations

import importlib
import sys

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

if "lightning.pytorch.strategies" in sys.modules:
    # Otherwise MimoModule does it: importing Lightning here would cost seconds.
    importlib.import_module("lightning_mimo.strategy.registration").register()
