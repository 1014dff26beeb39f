"""Ready-made model configurations, one family per file. The public names are listed in the stub ``__init__.pyi``.

Imports ``layers``, ``comm`` and below, and megatron-core.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
