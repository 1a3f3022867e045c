"""What processes compare before they begin, so that none of them works on something else than the others."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import transformers

from editcli.distributed.team import Team


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {
        "editcli": version("editcli"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def agree_on_inputs(team: Team, what: str, parts: Mapping[str, Any]) -> None:
    """Raise :class:`StateError` unless all ranks were asked for the same and read the same, as JSON tells it."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    team.agree(what, digest, remedy="start them with the same command and files")


def agree_on_models(team: Team, fingerprints: Sequence[str], others: Any = None) -> None:
    """Raise :class:`StateError` unless all ranks have these model files, and the same versions of all packages."""
    team.agree("model files", list(fingerprints), remedy="give every machine the same copy of the model")
    team.agree("versions", [versions(), others], remedy="install the same packages on every machine")
