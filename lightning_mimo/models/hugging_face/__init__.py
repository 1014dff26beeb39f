"""Models of the Hugging Face hub as MimoModels: for each family what its config means, and the rules of its weights.

``registry`` finds the family of a config; ``decoder`` and ``vit`` hold what families share. The public names, for a
family of a user's own, are listed in the stub ``__init__.pyi``.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
