"""What the libraries below may say: nothing, unless the user asks with ``-v``; then each warning once."""

from __future__ import annotations

import os
import sys
import warnings

_VERBOSITY = "TRANSFORMERS_VERBOSITY"


def quieten() -> None:
    """Keep other libraries' warnings off the terminal, unless the user has set them up otherwise."""
    # Libraries read these when they are imported, which is later.
    os.environ.setdefault(_VERBOSITY, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def show() -> None:
    """Let other libraries warn, each warning once."""
    if os.environ.get(_VERBOSITY) == "error":
        os.environ[_VERBOSITY] = "warning"
    loaded = sys.modules.get("transformers")
    if loaded is not None:
        loaded.utils.logging.set_verbosity_warning()
    if not sys.warnoptions:
        warnings.simplefilter("once")
