"""A user's DataLoader, rebuilt for each rank: order, loading, collation, and the state for a resume; conversations.

Imports ``layout``, ``microbatch``, ``parallel`` and torch. The public names are listed in the stub ``__init__.pyi``.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
