"""Warnings of other libraries: hidden, unless the user asks with ``-v``; then each is shown once."""

from __future__ import annotations

import os
import sys
import warnings

_VERBOSITY = "TRANSFORMERS_VERBOSITY"


def quieten() -> None:
    """Hide other libraries' warnings, unless the environment says otherwise."""
    # Libraries read these variables when they are imported, which is later.
    os.environ.setdefault(_VERBOSITY, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def show() -> None:
    """Show other libraries' warnings, each once."""
    if os.environ.get(_VERBOSITY) == "error":
        os.environ[_VERBOSITY] = "warning"
    loaded = sys.modules.get("transformers")
    if loaded is not None:
        loaded.utils.logging.set_verbosity_warning()
    if not sys.warnoptions:
        warnings.simplefilter("once")
