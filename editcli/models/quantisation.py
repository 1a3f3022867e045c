"""The ways in which a model can be quantised for a measurement, by name; never imports torch.

``gguf:TYPE`` is a type of llama.cpp's files that the ``gguf`` package can write; ``int8`` is LLM.int8()
(arXiv:2208.07339) and ``nf4`` is 4-bit NormalFloat (arXiv:2305.14314), both of bitsandbytes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from editcli.errors import OptionError

GGUF = "gguf"
INT8, NF4 = "int8", "nf4"
GGUF_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What the ``gguf`` package quantises to, the most exact first; it reads llama.cpp's K and IQ types but writes none."""
NAMES = (*(f"{GGUF}:{name}" for name in GGUF_TYPES), INT8, NF4)
"""Every spelling of ``eval --as``."""
_PACKAGES = {GGUF: ("gguf",), INT8: ("bitsandbytes", "accelerate"), NF4: ("bitsandbytes", "accelerate")}
EXTRA = "pip install 'editcli[quantise]'"


@dataclass(frozen=True, slots=True)
class Quantisation:
    """One way of quantising a model."""

    kind: str
    """:data:`GGUF`, :data:`INT8` or :data:`NF4`."""
    type: str = ""
    """One of :data:`GGUF_TYPES`; empty for the others."""

    @property
    def name(self) -> str:
        """The spelling of ``eval --as``."""
        return f"{self.kind}:{self.type}" if self.type else self.kind

    def require(self) -> None:
        """Raise :class:`OptionError` where a package that quantises is not installed."""
        missing = [package for package in _PACKAGES[self.kind] if importlib.util.find_spec(package) is None]
        if missing:
            raise OptionError(f"--as {self.name} needs the package {' and '.join(missing)}; install it with: {EXTRA}")


def parse_quantisation(text: str) -> Quantisation:
    """Read one of :data:`NAMES`, whatever its case; raise :class:`OptionError` for anything else."""
    names = {name.lower(): name for name in NAMES}
    name = names.get(text.strip().lower())
    if name is None:
        raise OptionError(f"--as {text} is not supported: it must be one of {', '.join(NAMES)}")
    kind, _, type = name.partition(":")
    return Quantisation(kind, type)


def parse_quantisations(texts: Sequence[str]) -> tuple[Quantisation, ...]:
    """Read several of :data:`NAMES`, each once."""
    return tuple(dict.fromkeys(parse_quantisation(text) for text in texts))
