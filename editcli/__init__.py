"""Rewrite facts inside a causal language model's weights.

Every public name can be imported from here; none is loaded before it is asked for, so that importing the package, and
listing plugins, does not import torch. What a plugin may import is in :mod:`editcli.plugin`.
"""

from __future__ import annotations

from typing import Any

from editcli.lazy import attach

_get, __dir__, __all__ = attach(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("editcli")
    return _get(name)
