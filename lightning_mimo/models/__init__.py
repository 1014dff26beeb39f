"""Ready-made model configurations, one family a file. The public names are those of the stub file ``__init__.pyi``.

Imports ``layers``, ``comm`` and below, and megatron-core.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
