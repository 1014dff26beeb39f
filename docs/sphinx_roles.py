"""A griffe extension: docstrings have Sphinx's roles and literal blocks, and mkdocstrings renders Markdown."""

from __future__ import annotations

import re

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`(~?)([\w.]+)`")


def to_markdown(text: str) -> str:
    """``:class:`~a.b.C``` becomes the code ``C``, a link where the site has an entry for ``a.b.C``."""

    def link(role: re.Match[str]) -> str:
        shortened, target = role.groups()
        shown = target.rpartition(".")[2] if shortened or target.startswith("lightning_mimo.") else target
        return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

    return re.sub(r"::$", ":", _ROLE.sub(link, text), flags=re.MULTILINE)


class SphinxRoles(griffe.Extension):
    """Runs :func:`to_markdown` over the docstring of every object."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
