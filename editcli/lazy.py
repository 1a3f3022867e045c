"""Public names that load when they are first asked for (PEP 562), so that importing a package does not import torch.

A package lists its public names once, as absolute imports in the stub beside its ``__init__.py``, which type checkers
read as well. The library ``lazy_loader`` reads such stubs too, but only for names from inside of the package.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


@cache
def public_names(stub: Path) -> dict[str, str]:
    """Return the module of each name that a stub imports."""
    imports = [node for node in ast.parse(stub.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports if node.module for alias in node.names if alias.asname}


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of the package whose ``__init__.py`` is ``file``."""
    homes = public_names(Path(file).with_suffix(".pyi"))

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name]), name)

    return get, lambda: sorted(homes), sorted(homes)
