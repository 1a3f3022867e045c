"""Everything that a plugin may import; the built-in plugins import nothing else from editcli.

The names load when they are first asked for, so that a plugin may import them at the top of its module: none of the
interfaces needs torch, and ``InverseGram``, ``ridge`` and the spectra load it only where they are used.
"""

from editcli.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
