"""Whether a plugin can be listed without importing torch, asked of a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

HEAVY = ("torch", "transformers")
_CODE = f"import importlib, sys; importlib.import_module(sys.argv[1]); print(*sorted({set(HEAVY)} & set(sys.modules)))"


def heavy_imports(module: str) -> list[str]:
    """Return which of :data:`HEAVY` the import of ``module`` loads; raises RuntimeError when it cannot be imported."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", _CODE, module], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{module} cannot be imported: {done.stderr.strip()}")
    return done.stdout.split()
