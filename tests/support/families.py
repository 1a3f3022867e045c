"""Families of models to run a test on: all of them, or in the quick selection those that are stored differently."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import pytest

from editcli.testing import TINY

LAYOUTS = ("gpt2", "llama", "gemma2")
"""A transposed weight, a plain one, and a norm behind the MLP: the three ways in which families differ to an editor."""

QUICK_FAMILIES = frozenset({*LAYOUTS, "gpt_neox"})
"""The layouts, and a family whose attention and MLP read the stream in parallel."""


PACKED_EXPERTS = find_spec("transformers.integrations.moe") is not None
"""Whether transformers holds the experts of a layer in one parameter, as from its fifth release on."""
needs_packed_experts = pytest.mark.skipif(
    not PACKED_EXPERTS, reason="this transformers keeps experts as modules of their own"
)


def families(names: Iterable[str] = TINY) -> list[object]:
    """Return parameters, one a family, of which a plain ``pytest`` runs the quick ones."""
    return [pytest.param(n, marks=[] if n in QUICK_FAMILIES else pytest.mark.slow, id=n) for n in names]
